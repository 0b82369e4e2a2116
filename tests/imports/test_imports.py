"""Fresh processes: what importing the package loads, how long it takes, and what works with parts missing."""

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Makes a module impossible to import, as on a machine that does not have it.
BLOCK = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def __init__(self, *names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if any(name == n or name.startswith(n + ".") for n in self.names):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
"""


def fresh(code, cwd=ROOT, **environment):
    """Standard output of ``code`` in a new interpreter; TRITON_INTERPRET is off unless asked for."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")} | environment
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_light_and_fast():
    out = fresh(
        """
        import time, torch
        loaded = set(sys.modules)
        start = time.process_time()
        import pyvideo_kernels as pv
        dir(pv)
        for name in ("layer_norm_modulate", "qk_norm_rope", "spacetime_attention", "causal_conv3d", "guidance_step"):
            getattr(pv, name)
        import pyvideo_kernels._native, pyvideo_kernels.schemas
        seconds = time.process_time() - start
        heavy = ("triton", "diffusers", "transformers", "accelerate", "av", "rich", "typer", "pyvideo_kernels._C")
        print(seconds, *[m for m in sys.modules if m in heavy and m not in loaded])
        """
    )
    seconds, *heavy = out
    assert heavy == []
    # CPU time, so that a busy machine does not decide.
    assert float(seconds) < 1.0


def test_works_without_triton_diffusers_and_the_extension():
    out = fresh(
        """
        sys.meta_path.insert(0, Blocked("triton", "diffusers", "transformers", "pyvideo_kernels._C"))
        import torch, pyvideo_kernels as pv
        from pyvideo_kernels import dispatch, _native
        from pyvideo_kernels.errors import UnsupportedError
        from pyvideo_kernels.schemas import OPS
        x, scale = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
        y = pv.layer_norm_modulate(x, scale, scale)
        expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + scale
        assert torch.allclose(y, expected, atol=1e-5)
        assert dispatch.calls() == {("layer_norm_modulate", "reference"): 1}, dispatch.calls()
        assert not _native.available() and _native.why_not()
        for impl, word in (("cpu", "extension"), ("triton", "triton")):
            try:
                pv.layer_norm_modulate(x, scale, scale, impl=impl)
            except Exception as error:
                assert word in str(error).lower(), error
                print(type(error).__name__)
        try:
            dispatch.load(OPS["layer_norm_modulate"], "triton")
        except UnsupportedError as error:
            print(type(error).__name__)
        """
    )
    # On the CPU Triton is refused for the device first; loading it is refused because it is missing.
    assert out == ["UnsupportedError", "DeviceError", "UnsupportedError"]


def test_the_command_without_its_packages_is_a_sentence():
    (script,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    module, _, function = script.partition(":")
    code = f"""
sys.meta_path.insert(0, Blocked(*{{names}}))
from {module} import {function} as command
sys.argv = ["pyvideo", "--version"]
command()
"""
    run = lambda *names: subprocess.run(
        [sys.executable, "-c", BLOCK + code.format(names=names)], capture_output=True, text=True, cwd=ROOT
    )
    without = run("typer")
    hint = "error: pyvideo needs typer, which is not installed: pip install 'pyvideo-kernels[sampler]'\n"
    assert (without.returncode, without.stdout, without.stderr) == (2, "", hint)
    broken = run("pyvideo_kernels.sampler.settings")  # no extra mends that
    assert broken.returncode == 1 and "Traceback" in broken.stderr
    whole = run()
    assert whole.returncode == 0 and whole.stdout.startswith("pyvideo-kernels ")


def test_cold_first_call_under_fullgraph():
    out = fresh(
        """
        import torch, pyvideo_kernels as pv
        f = torch.compile(lambda x: pv.rms_norm(pv.layer_norm_modulate(x)) * 2, fullgraph=True, backend="eager")
        x = torch.randn(2, 3, 8)
        print(torch.equal(f(x), pv.rms_norm(pv.layer_norm_modulate(x)) * 2))
        """
    )
    assert out == ["True"]


def test_an_extension_that_does_not_load_is_a_reason(tmp_path):
    out = fresh(
        """
        import types, torch
        class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, name, path=None, target=None):
                if name == "pyvideo_kernels._C":
                    from importlib.machinery import ModuleSpec
                    return ModuleSpec(name, self)
            def exec_module(self, module):
                raise ImportError("undefined symbol: aoti_torch_something")
        sys.meta_path.insert(0, Broken())
        from pyvideo_kernels import _native
        print(_native.why_not().replace(" ", "_"))
        """
    )
    assert out == ["the_extension_does_not_load:_undefined_symbol:_aoti_torch_something"]


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "tests"], ids=["checkout", "elsewhere"])
def test_kernels_is_hugging_faces(cwd):
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
    out = fresh("import kernels; print(kernels.__file__, hasattr(kernels, 'get_kernel'))", cwd=cwd)
    assert str(ROOT / "kernels") not in out[0] and out[0].endswith("kernels/__init__.py")
    assert out[1] == "True"


def test_kernels_folder_passes_for_no_package_where_hugging_faces_is_absent():
    # In the checkout's root the folder is importable as an empty namespace; diffusers and transformers ask for the
    # installed distribution, and must still hear that there is none.
    pytest.importorskip("diffusers")
    out = fresh(
        """
        import importlib.machinery, importlib.metadata
        class OnlyHere(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "kernels":
                    return importlib.machinery.PathFinder.find_spec(name, ["."])
        sys.meta_path.insert(0, OnlyHere())
        version = importlib.metadata.version
        def hidden(name):
            if name == "kernels":
                raise importlib.metadata.PackageNotFoundError(name)
            return version(name)
        importlib.metadata.version = hidden
        import kernels
        assert kernels.__file__ is None
        import diffusers.utils.import_utils as d, transformers.utils.import_utils as t
        print(d.is_kernels_available(), t.is_kernels_available())
        """
    )
    assert out == ["False", "False"]


def test_triton_kernels_import_as_part_of_the_package():
    pytest.importorskip("triton", reason="Triton is not installed")
    out = fresh(
        """
        import pkgutil, importlib, pyvideo_kernels.kernels as k
        names = sorted(m.name for m in pkgutil.iter_modules(k.__path__))
        for name in names:
            importlib.import_module(f"pyvideo_kernels.kernels.{name}")
        print(*names)
        """
    )
    files = sorted(p.stem for p in (ROOT / "kernels").glob("*.py"))
    assert out == files and files


def test_installed_package_is_found_from_any_folder(tmp_path):
    code = (
        "import pyvideo_kernels.kernels.layer_norm_modulate as k, pyvideo_kernels as p; print(p.__file__, k.__file__)"
    )
    probe = subprocess.run([sys.executable, "-c", "import pyvideo_kernels"], cwd=tmp_path, capture_output=True)
    if probe.returncode != 0:
        pytest.skip("pyvideo-kernels is not installed in this environment (make test installs it)")
    package, kernel = fresh(code, cwd=tmp_path)
    assert Path(package).parent.name == "pyvideo_kernels"
    assert Path(kernel).parent.name == "kernels"


def test_the_drop_in_does_not_import_the_compiler():
    # torch._dynamo costs over a second, which every film and every accelerate() would wait for.
    code = "import sys, pyvideo_kernels.integrations; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
