"""Builds csrc/ into one extension module with ninja.

    python csrc/build_native.py --output DIR [--build-dir DIR] [--cuda-archs "80;90a;100a;120a"]
    python csrc/build_native.py --output DIR --build-dir DIR --sanitize address,undefined|thread [--march x86-64-v4]

setup.py calls ``build``. CPU code is always built; CUDA code only for the architectures that ``cuda_plan`` decides
on, so that a machine without a card never waits for nvcc. Tensors and registration go through torch's stable ABI, so
one binary serves every torch from 2.11 on, CPU builds included, and no GPU is needed to build it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parent
# The oldest torch whose stable ABI we use; TORCH_TARGET_VERSION hides everything newer.
TORCH_TARGET = "0x020b000000000000"
# Architectures with features that only the "a" target exposes (wgmma, tcgen05, ...).
SPECIFIC = {"90": "90a", "100": "100a", "103": "103a", "120": "120a"}

# -O1 keeps the build short and the lines of a report true. PYVIDEO_SANITIZED: one version of every kernel (isa.h).
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-DPYVIDEO_SANITIZED"]
SANITIZERS = {
    "address": ["-fsanitize=address"],
    # Types of other libraries' objects cannot be looked up in them: they hide their type information.
    "undefined": ["-fsanitize=undefined", "-fno-sanitize=vptr"],
    "thread": ["-fsanitize=thread", "-DPYVIDEO_STD_THREADS"],
}


class BuildError(Exception):
    """The extension cannot be built here; the message says why in one line."""


@dataclass
class BuildInfo:
    """What was built and why not more; written to ``pyvideo_kernels/_build_info.json``."""

    native: bool = False
    why_not: str = ""
    compiler: str = ""
    torch: str = ""
    python: str = platform.python_version()
    cuda_archs: list[str] = field(default_factory=list)
    cuda_why_not: str = ""
    nvcc: str = ""

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "_build_info.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def find_compiler() -> list[str]:
    """``$CXX``, else the first of g++, c++, clang++ on the path."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise BuildError(f"no C++ compiler: CXX={os.environ['CXX']} is not on the path")
        return command
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler: none of g++, c++, clang++ is on the path (install g++, or set CXX)")


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def _cuda_root(nvcc: str) -> Path:
    """Toolkit folder of an nvcc that may be a link or a wrapper: ask it where it is."""
    try:
        done = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return Path(nvcc).resolve().parents[1]
    for line in done.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip())
    return Path(nvcc).resolve().parents[1]


def _present_cards() -> list[str]:
    """Architectures of the cards in this machine, e.g. ``["90a"]``; does not load a driver."""
    caps = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    archs = sorted({cap.replace(".", "") for cap in caps if cap.replace(".", "").isdigit()}, key=int)
    return [SPECIFIC.get(arch, arch) for arch in archs]


def cuda_plan(requested: str | None = None) -> tuple[list[str], str]:
    """Architectures to compile for, and why there are none.

    ``requested`` (or ``$PYVIDEO_CUDA_ARCHS``) is a list such as ``"80;90a"``, or ``"none"``; without it, the cards
    that are present.
    """
    requested = requested if requested is not None else os.environ.get("PYVIDEO_CUDA_ARCHS")
    if requested is not None:
        archs = [part for part in requested.replace(",", ";").replace(" ", ";").split(";") if part]
        if not archs or archs == ["none"]:
            return [], "switched off by PYVIDEO_CUDA_ARCHS"
        for arch in archs:
            if not arch.rstrip("af").isdigit():
                raise BuildError(f'PYVIDEO_CUDA_ARCHS wants e.g. "80;90a;100a;120a"; got {requested!r}')
        if find_nvcc() is None:
            raise BuildError(f"CUDA architectures {requested} were asked for and nvcc is not on the path")
        return archs, ""
    archs = _present_cards()
    if not archs:
        return [], "no NVIDIA card in this machine (make cuda builds for the supported architectures anyway)"
    if find_nvcc() is None:
        return [], "an NVIDIA card is present and nvcc is not on the path (install the CUDA toolkit, then make cuda)"
    return archs, ""


def _torch_paths() -> tuple[Path, str]:
    """Folder and version of torch, without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed in the environment that builds (pip install --no-build-isolation)")
    root = Path(spec.origin).parent
    scope: dict[str, object] = {}
    exec((root / "version.py").read_text(), scope)
    version = str(scope["__version__"])
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 11):
        raise BuildError(f"torch >= 2.11 is needed to build; this is {version}")
    return root, version


def _pybind11_include(torch_root: Path) -> str:
    try:
        import pybind11

        return str(pybind11.get_include())
    except ImportError:
        return str(torch_root / "include")


def _ninja() -> list[str]:
    if path := shutil.which("ninja"):
        return [path]
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    raise BuildError("ninja is not installed in the environment that builds (pip install ninja)")


def _quote(value: str | Path) -> str:
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def sanitizer_flags(sanitize: str, march: str = "") -> list[str]:
    """Compiler flags of a build under ``"address,undefined"`` or ``"thread"``, at one level of the instruction set."""
    names = [name for name in sanitize.split(",") if name]
    if not names or not set(names) <= SANITIZERS.keys() or ("thread" in names and len(names) > 1):
        raise BuildError(f"--sanitize takes address, undefined, both with a comma, or thread; got {sanitize!r}")
    return [*SANITIZED, *(flag for name in names for flag in SANITIZERS[name]), *([f"-march={march}"] if march else [])]


def sanitizer_runtime(sanitize: str) -> list[Path]:
    """The libraries that Python must be started with (LD_PRELOAD) before it loads a build under ``sanitize``."""
    compiler = find_compiler()
    first = sanitize.split(",")[0]
    if _is_clang(compiler):
        # Named after the machine, or in a folder that is; UBSan's is a part of ASan's.
        kind = "ubsan_standalone" if first == "undefined" else first[0] + "san"
        names = [f"libclang_rt.{kind}-{platform.machine()}.so", f"libclang_rt.{kind}.so"]
    else:
        names = [f"lib{'ub' if first == 'undefined' else first[0]}san.so"]
    runtime = next((path for name in names if (path := _library(compiler, name))), None)
    if runtime is None:
        raise BuildError(
            f"{shlex.join(compiler)} has no {' or '.join(names)} (Debian: libgcc-*-dev, libclang-rt-*-dev)"
        )
    # The runtime looks for the library's throw when Python starts, which alone has no C++ in it.
    standard = _library(compiler, "libstdc++.so.6")
    return [runtime, standard] if standard else [runtime]


def _library(compiler: list[str], name: str) -> Path | None:
    """A shared library of the compiler's."""
    # A compiler that does not find it prints the name it was asked for.
    path = Path(_output(*compiler, f"-print-file-name={name}") or name)
    if not path.is_absolute() or not path.is_file():
        return None
    head = path.read_bytes()[:4096]
    if head[:4] != b"\x7fELF":  # a linker script, as Fedora's: INPUT ( /usr/lib64/libasan.so.8.0.0 )
        found = re.search(rb"(/\S+\.so\S*)", head)
        return Path(found[1].decode()) if found else None
    return path.resolve()


def _is_clang(compiler: list[str]) -> bool:
    return "clang" in _output(*compiler, "--version").lower()


def _ninja_file(
    target: Path,
    info: BuildInfo,
    compiler: list[str],
    torch_root: Path,
    nvcc: str | None,
    sanitizer: Sequence[str] = (),
) -> str:
    """The text of build.ninja: one rule for C++, one for CUDA, one link."""
    include = [
        f"-I{CSRC}",
        f"-isystem {shlex.quote(str(torch_root / 'include'))}",
        f"-isystem {shlex.quote(_pybind11_include(torch_root))}",
        f"-isystem {shlex.quote(sysconfig.get_path('include'))}",
    ]
    if (torch_root / "include" / "torch" / "csrc" / "api" / "include").is_dir():
        include.append(f"-isystem {shlex.quote(str(torch_root / 'include' / 'torch' / 'csrc' / 'api' / 'include'))}")
    defines = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f"-DPYVIDEO_TORCH_VERSION='\"{info.torch}\"'",
        f"-DPYVIDEO_CUDA_ARCHS='\"{';'.join(info.cuda_archs)}\"'",
    ]
    common = [*include, *defines]
    # Registrations record __FILE__: keep the builder's folders out of a wheel.
    prefix_map = f"-ffile-prefix-map={shlex.quote(str(CSRC.parent))}=."
    cxx = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno",
           "-fno-trapping-math", prefix_map, "-Wall", "-Wextra", "-Wno-unused-parameter", "-g0"]  # fmt: skip
    link = ["-shared", "-Wl,--as-needed", f"-L{shlex.quote(str(torch_root / 'lib'))}", "-ltorch_cpu", "-Wl,-O1"]
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {shlex.join(compiler)}",
        f"common = {' '.join(common).replace('$', '$$')}",
        f"cxxflags = {' '.join([*cxx, *sanitizer])}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxxflags $common -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
    ]
    sources = [CSRC / "module.cpp", *sorted(CSRC.glob("*/*_cpu.cpp"))]
    if sanitizer:
        sources.append(CSRC / "testing" / "planted.cpp")
        link += [flag for flag in sanitizer if flag.startswith("-fsanitize=")]
        link += ["-shared-libsan"] if _is_clang(compiler) else []
    if info.cuda_archs:
        assert nvcc is not None
        root = _cuda_root(nvcc)
        gencode = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in info.cuda_archs]
        nvccflags = ["-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC",
                     f"-Xcompiler={prefix_map}", "-Xcompiler=-fvisibility=hidden", "--threads=2", "-Xptxas=-v",
                     f"-ccbin={shlex.quote(compiler[0])}", *gencode]  # fmt: skip
        lines += [
            f"nvcc = {shlex.quote(nvcc)}",
            f"nvccflags = {' '.join(nvccflags)}",
            "rule nvcc",
            "  command = $nvcc -MD -MF $out.d $nvccflags $common -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
        ]
        sources += sorted(CSRC.glob("*/*.cu"))
        for sub in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
            if (root / sub / "libcudart_static.a").is_file():
                link += [f"-L{shlex.quote(str(root / sub))}"]
                break
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    objects = []
    for source in sources:
        obj = source.relative_to(CSRC).as_posix().replace("/", ".") + ".o"
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {obj}: {rule} {_quote(source)}")
        if sanitizer and source.name == "module.cpp":
            # Holds no kernel, and pybind11 takes the compiler longest.
            lines.append(f"  cxxflags = {' '.join(cxx)} -O0")
        objects.append(obj)
    lines += [
        f"ldflags = {' '.join(link).replace('$', '$$')}",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
        "  description = link $out",
        f"build {_quote(target)}: link {' '.join(objects)}",
        f"default {_quote(target)}",
    ]
    return "\n".join(lines) + "\n"


def build(
    target: Path,
    build_dir: Path,
    cuda_archs: str | None = None,
    *,
    sanitize: str = "",
    march: str = "",
    verbose: bool = False,
) -> BuildInfo:
    """Builds ``target`` (the ``_C*.so``). Never raises for a machine that cannot: ``why_not`` says so in one line.

    With ``sanitize``, a build for the tests: needs a ``build_dir`` of its own, and ``sanitizer_runtime`` to load.
    """
    info = BuildInfo()
    try:
        if sys.platform != "linux":
            raise BuildError(f"the extension is built on Linux only; this is {sys.platform}")
        torch_root, info.torch = _torch_paths()
        compiler = find_compiler()
        sanitizer = sanitizer_flags(sanitize, march) if sanitize else []
        version = _output(*compiler, "--version").splitlines()
        if not version:
            raise BuildError(f"the C++ compiler {compiler[0]} does not run")
        info.compiler = version[0]
        info.cuda_archs, info.cuda_why_not = cuda_plan(cuda_archs)
        nvcc = find_nvcc() if info.cuda_archs else None
        info.nvcc = _output(nvcc, "--version").splitlines()[-1] if nvcc else ""
        ninja = _ninja()
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = _ninja_file(target.resolve(), info, compiler, torch_root, nvcc, sanitizer)
        path = build_dir / "build.ninja"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        done = subprocess.run([*ninja, "-C", str(build_dir), *jobs, *(["-v"] if verbose else [])],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)  # fmt: skip
        (build_dir / "build.log").write_text(done.stdout)
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
            raise BuildError(f"compilation failed: {(errors or ['see the build output'])[0].strip()}")
        info.native = True
    except BuildError as error:
        info.native, info.why_not, info.cuda_archs = False, str(error), []
        # A stale binary from an earlier build must not pass for this one.
        target.unlink(missing_ok=True)
    return info


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the native extension of pyvideo_kernels.")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives _C*.so and _build_info.json")
    parser.add_argument("--build-dir", type=Path, default=Path("build/native"))
    parser.add_argument("--cuda-archs", help='for example "80;90a;100a;120a", or none')
    parser.add_argument("--sanitize", default="", help="a build for the tests: address,undefined or thread")
    parser.add_argument("--march", default="", help="with --sanitize: the instruction set, e.g. x86-64-v4")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    target = args.output / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    archs = "none" if args.sanitize else args.cuda_archs
    info = build(target, args.build_dir, archs, sanitize=args.sanitize, march=args.march, verbose=args.verbose)
    info.save(args.output)
    print(
        f"built {target} (CUDA: {';'.join(info.cuda_archs) or 'no'})" if info.native else f"not built: {info.why_not}"
    )
    return 0 if info.native else 1


if __name__ == "__main__":
    sys.exit(main())
