"""csrc/build_native.py and setup.py: what is decided, and what is said where something cannot be built."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def builder():
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "csrc" / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_native"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["build_native"]


def test_cuda_is_built_for_the_cards_present_only(builder, monkeypatch):
    monkeypatch.delenv("PYVIDEO_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(builder, "_output", lambda *_: "")
    archs, why = builder.cuda_plan()
    assert archs == [] and "no NVIDIA card" in why
    monkeypatch.setattr(builder, "_output", lambda *_: "9.0\n9.0\n8.9\n")
    monkeypatch.setattr(builder, "find_nvcc", lambda: "/x/nvcc")
    assert builder.cuda_plan() == (["89", "90a"], "")
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    archs, why = builder.cuda_plan()
    assert archs == [] and "nvcc" in why


def test_requested_architectures(builder, monkeypatch):
    monkeypatch.setattr(builder, "find_nvcc", lambda: "/x/nvcc")
    monkeypatch.setenv("PYVIDEO_CUDA_ARCHS", "80;90a;100a;120a")
    assert builder.cuda_plan() == (["80", "90a", "100a", "120a"], "")
    assert builder.cuda_plan("90a")[0] == ["90a"]
    assert builder.cuda_plan("none")[0] == []
    with pytest.raises(builder.BuildError, match="sm_90"):
        builder.cuda_plan("sm_90")
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    with pytest.raises(builder.BuildError, match="nvcc is not on the path"):
        builder.cuda_plan("90a")


def test_without_a_compiler_the_reason_is_recorded_and_nothing_stale_stays(builder, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    target = tmp_path / "_C.so"
    target.write_bytes(b"an older build")
    info = builder.build(target, tmp_path / "build")
    assert not info.native and "CXX=no-such-compiler" in info.why_not
    assert not target.exists()
    info.save(tmp_path)
    assert json.loads((tmp_path / "_build_info.json").read_text())["why_not"] == info.why_not


def test_a_failing_compiler_is_a_reason_too(builder, monkeypatch, tmp_path, capfd):
    fake = tmp_path / "cxx"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo fake 1.0; exit; }\necho "x.cpp:1: error: no" >&2\nexit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("PYVIDEO_CUDA_ARCHS", "none")
    info = builder.build(tmp_path / "_C.so", tmp_path / "build")
    assert not info.native and info.why_not.startswith("compilation failed: x.cpp:1: error: no")
    assert info.compiler == "fake 1.0"


def test_ninja_file_names_each_architecture(builder):
    info = builder.BuildInfo(torch="2.13.0", cuda_archs=["80", "90a"])
    text = builder._ninja_file(Path("/out/_C.so"), info, ["g++"], Path("/torch"), "/nowhere/nvcc")
    assert "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a" in text
    assert "TORCH_TARGET_VERSION=0x020b" in text and "guidance_step.cu.o: nvcc" in text
    without = builder._ninja_file(Path("/out/_C.so"), builder.BuildInfo(torch="2.13.0"), ["g++"], Path("/torch"), None)
    assert "nvcc" not in without and "cudart" not in without


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel made without a compiler: its contents, minus the extension, in a second or two."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    # A copy: building in the checkout would leave build/ and egg-info behind, and read what older builds left.
    generated = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in ("benchmarks", "csrc", "kernels", "pyvideo_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=generated)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = dict(os.environ, CXX="no-such-compiler")
    code = "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("installed without the native extension") == 1
    (path,) = out.glob("*.whl")
    return path


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {f"pyvideo_kernels/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert kernels and kernels <= names
    assert "pyvideo_kernels/kernels/__init__.py" in names
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pyvideo_kernels").rglob("*.py")}
    assert sources <= names
    assert "pyvideo_kernels/py.typed" in names
    benchmarks = {p.relative_to(ROOT).as_posix() for p in (ROOT / "benchmarks").rglob("*.py")}
    architectures = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "benchmarks" / "models" / "architectures").glob("*.json")
    }
    assert len(architectures) >= 12 and {f"pyvideo_kernels/{name}" for name in benchmarks | architectures} <= names
    # Results are measured in a checkout, and published from there.
    assert not [n for n in names if n.startswith("pyvideo_kernels/benchmarks/results/")]
    # Only our own top-level package: never `kernels`, never the tests.
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pyvideo_kernels"}
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".pyc", ".o"))]


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # An editable install of this checkout would find the extension that the wheel lacks.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
        "import torch, pyvideo_kernels as pv, pyvideo_kernels.kernels.launch as k; from pyvideo_kernels import _native;"
        "print(pv.__file__); print(k.__file__); print(_native.why_not());"
        "print(pv.rms_norm(torch.ones(2, 4)).sum().item())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, kernel, reason, total = done.stdout.splitlines()
    assert package.startswith(str(tmp_path)) and kernel.startswith(str(tmp_path))
    assert "CXX=no-such-compiler" in reason
    assert float(total) == pytest.approx(8, rel=1e-5)


def test_a_sanitized_build_has_its_own_flags_and_the_planted_faults(builder):
    info = builder.BuildInfo(torch="2.13.0")

    def text(*sanitizer):
        return builder._ninja_file(Path("/out/_C.so"), info, ["g++"], Path("/torch"), None, sanitizer)

    plain, asan = text(), text(*builder.sanitizer_flags("address,undefined", "x86-64-v4"))
    assert "sanitize" not in plain and "planted" not in plain and "PYVIDEO_SANITIZED" not in plain
    flags = next(line for line in asan.splitlines() if line.startswith("cxxflags = "))
    for flag in ("-fsanitize=address", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-march=x86-64-v4"):
        assert flag in flags.split()
    assert flags.split().index("-O1") > flags.split().index("-O3")
    assert "-DPYVIDEO_STD_THREADS" not in asan
    linked = next(line for line in asan.splitlines() if line.startswith("ldflags = ")).split()
    assert "-fsanitize=address" in linked and "-fsanitize=undefined" in linked and "-march=x86-64-v4" not in linked
    assert "testing.planted.cpp.o" in next(line for line in asan.splitlines() if ": link " in line)
    assert "-DPYVIDEO_STD_THREADS" in builder.sanitizer_flags("thread")


@pytest.mark.parametrize("names", ["", "memory", "address,thread", "thread,undefined"])
def test_sanitizers_that_do_not_exist_or_go_together_are_refused(builder, names):
    with pytest.raises(builder.BuildError, match="address, undefined"):
        builder.sanitizer_flags(names)


def test_the_runtime_of_a_sanitizer_is_that_of_the_compiler_or_said_to_be_missing(builder, monkeypatch, tmp_path):
    def compiler(version, *libraries):
        """A compiler that knows these libraries."""
        path = tmp_path / "cxx"
        cases = "".join(f"-print-file-name={name}) echo {tmp_path / name};; " for name in libraries)
        path.write_text(
            f'#!/bin/sh\ncase "$1" in --version) echo "{version}";; {cases}*) echo "${{1#-print-file-name=}}";; esac\n'
        )
        path.chmod(0o755)
        for name in libraries:
            (tmp_path / name).write_bytes(b"\x7fELF")
        monkeypatch.setenv("CXX", str(path))

    compiler("g++ (Debian 12.2.0) 12.2.0", "libasan.so", "libtsan.so")
    assert [path.name for path in builder.sanitizer_runtime("address,undefined")] == ["libasan.so"]
    # Without the C++ library before it, ASan's runtime does not know how to throw in Python.
    compiler("g++ (GCC) 15.1.0", "libtsan.so", "libstdc++.so.6")
    (tmp_path / "libtsan.so").write_text(f"/* GNU ld script */ INPUT ( {tmp_path}/libtsan.so.2.0.0 )\n")
    assert [path.name for path in builder.sanitizer_runtime("thread")] == ["libtsan.so.2.0.0", "libstdc++.so.6"]
    with pytest.raises(builder.BuildError, match="has no libubsan.so"):
        builder.sanitizer_runtime("undefined")
    monkeypatch.setattr(builder.platform, "machine", lambda: "x86_64")
    compiler("Debian clang version 16.0.6", "libclang_rt.asan-x86_64.so", "libclang_rt.ubsan_standalone.so")
    assert builder.sanitizer_runtime("address,undefined")[0].name == "libclang_rt.asan-x86_64.so"
    assert builder.sanitizer_runtime("undefined")[0].name == "libclang_rt.ubsan_standalone.so"
    with pytest.raises(builder.BuildError, match="has no libclang_rt.tsan-x86_64.so or libclang_rt.tsan.so"):
        builder.sanitizer_runtime("thread")
