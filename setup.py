"""Builds csrc/ into pyvideo_kernels._C where a compiler is found; installs pure Python, and says so, where not."""

import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
from build_native import build  # noqa: E402

KERNELS = "pyvideo_kernels.kernels"
BENCHMARKS = "pyvideo_kernels.benchmarks"


class BuildNative(build_ext):
    def run(self):
        suffix = Path(self.get_ext_fullpath("pyvideo_kernels._C")).name
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "pyvideo_kernels"
        # Kept apart from build_temp, which pip makes anew each time: ninja then rebuilds only what changed.
        info = build(package / suffix, ROOT / "build" / f"native-{sys.implementation.cache_tag}")
        info.save(package)
        if not info.native:
            print(f"pyvideo-kernels: installed without the native extension: {info.why_not}", file=sys.stderr)


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):
        """kernels/ has no __init__.py (it would shadow Hugging Face's package); the installed package has one."""
        modules = super().find_package_modules(package, package_dir)
        if package == KERNELS:
            modules.append((package, "__init__", "pyvideo_kernels/kernels/__init__.py"))
        return modules


setup(
    # Namespace: a sub-package whose __init__.py was forgotten must not vanish from the wheel only.
    packages=[
        *find_namespace_packages(include=["pyvideo_kernels", "pyvideo_kernels.*"], exclude=["*.__pycache__"]),
        *(f"{BENCHMARKS}.{name}" for name in find_packages("benchmarks")),
        f"{BENCHMARKS}.models.architectures",
    ],
    package_dir={KERNELS: "kernels", BENCHMARKS: "benchmarks"},
    ext_modules=[Extension("pyvideo_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPy},
)
