"""A copy of the package with another build of the extension, and the tests that reach compiled kernels run in it."""

import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
# A run that hangs ends, and says so.
LIMIT = 900


@dataclasses.dataclass
class Outcome:
    """What a run came to: its last lines, and why it failed (empty where it did not)."""

    summary: str
    failure: str = ""
    output: str = ""


def make(folder, extension):
    """``folder`` as a checkout of this one's Python code, whose extension is the file ``extension``."""
    shutil.rmtree(folder, ignore_errors=True)
    generated = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "results", "*.safetensors")
    for name in ("pyvideo_kernels", "kernels", "csrc", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=generated)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(extension, folder / "pyvideo_kernels" / EXTENSION)


def python(folder, *arguments, prefix=(), environment=None):
    """Runs Python in the copy, where ``import pyvideo_kernels`` finds the copy."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHONPATH"))}
    # Idle threads sleep: other runs want the core.
    own |= {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"} | (environment or {})
    try:
        return subprocess.run(
            [*prefix, sys.executable, *arguments], cwd=folder, env=own, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", timeout=LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return subprocess.CompletedProcess(error.cmd, 124, f"{text}\nnot finished after {LIMIT} s\n")


def level(folder, **how):
    """The instruction set that the copy's extension takes this CPU for, and Python's output where it does not load."""
    code = "import torch, pyvideo_kernels._C as c; print(c.__file__, c.build_info()['cpu'], sep='\\n')"
    done = python(folder, "-c", code, **how)
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) < 2 or Path(lines[-2]).resolve().parents[1] != folder.resolve():
        return "", done.stdout
    return lines[-1], ""


def run_tests(folder, *arguments, **how):
    """The tests of the compiled CPU kernels, in the copy; ``arguments`` are pytest's."""
    # What a sanitizer writes to stderr as it ends the process must not be pytest's to lose.
    plugins = (
        "--capture=sys",
        "--durations=20",
        "--durations-min=0.5",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "-p",
        "tests.build.native_copy",
    )
    done = python(folder, "-m", "pytest", "-v", *plugins, *arguments, "tests/build", "tests/ops", **how)
    lines = done.stdout.strip().splitlines() or ["no output"]
    summary = lines[-1].strip("= ")
    if done.returncode:
        return Outcome(summary, f"the tests failed (exit status {done.returncode})", done.stdout)
    return Outcome(summary, "", done.stdout)


# A plugin of pytest from here on.

# Left out where every kernel is slowed: torch traces and compiles in these, and the kernels get nothing new to do.
_TRACING = ("fullgraph", "compile", "contract", "opcheck")


def reaches_kernels(path, name, parameters):
    """Whether a test is of the compiled CPU kernels: by its file's name, or because its implementation is "cpu"."""
    if any(word in name for word in _TRACING):
        return False
    if path.name.startswith("test_native") or path.stem.endswith("_cpu"):
        return True
    if path.parent.name != "ops":
        return False
    # An implementation has a device beside it, which is "cpu" for Triton's interpreter too.
    return parameters["impl"] == "cpu" if "impl" in parameters else "cpu" in parameters.values()


def pytest_collection_modifyitems(config, items):
    keep, leave = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        (keep if reaches_kernels(item.path, item.name, parameters) else leave).append(item)
    config.hook.pytest_deselected(items=leave)
    items[:] = keep
