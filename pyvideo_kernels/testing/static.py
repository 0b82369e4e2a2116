"""Ahead-of-time checks of the Triton kernels: what the compiler made of each launch, without a GPU.

A case calls an op's Triton implementation on meta tensors at real model shapes. A stand-in driver reports the
architecture asked for and every launch compiles instead of running, through Triton's own specialisation: the
kernel examined is the one the launcher would run, with its divisibility and constants. Registers, spills, shared
memory, matrix instructions, TMA loads and 16-byte loads are read from the machine code and held to a committed
table, ``tests/static/<op>.json``.

    python -m pyvideo_kernels.testing.static                    # check every op
    python -m pyvideo_kernels.testing.static --update rms_norm  # rewrite that op's table
    python -m pyvideo_kernels.testing.static --show rms_norm --arch sm_90

The tuned configurations of ``pyvideo_kernels/configs/<gpu>.json`` are held to the same rules, at the shapes they were
tuned at, whenever every op is checked.

Spec files are ``tests/static/spec_<op>.py`` with ``CASES: list[Case]``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..configs import forced_arch, has_tma, shared_memory_limit, tuned
from ..errors import ValueOptionError

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@dataclass(frozen=True)
class Case:
    """One launch to compile.

    Args:
        name: what the shape is, e.g. ``"wan-1.3b-480p"``.
        call: runs the Triton implementation on ``meta`` tensors.
        matrix: matrix instructions must be there (wgmma/mma/tcgen05, MFMA).
        tma: TMA loads must be there on sm_90 and later.
        archs: architectures it is meant for; None: all.
        allow_spill: architecture -> why spills are accepted there.
        older_triton: architecture -> what goes wrong there before Triton 3.7, which is not examined then.
    """

    name: str
    call: Callable[[], Any]
    matrix: bool = False
    tma: bool = False
    archs: tuple[str, ...] | None = None
    allow_spill: dict[str, str] = field(default_factory=dict)
    older_triton: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What the compiler made of one kernel."""

    kernel: str
    num_warps: int
    registers: int
    spills: int  # local-memory instructions (NVIDIA) or spilled registers (AMD)
    stack: int  # bytes a thread
    shared: int  # bytes a block
    matrix: dict[str, int]  # matrix instructions by mnemonic
    tma_loads: int
    vector_loads: int  # 16-byte global loads


def meta(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor with a shape and strides and no storage."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


class _Driver:
    """Stands where Triton looks for a GPU, and reports the architecture under test."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        if arch.startswith("sm_"):
            self.target = GPUTarget("cuda", int(arch[3:]), 32)
        else:
            self.target = GPUTarget("hip", arch, 64)

    def get_current_device(self) -> str:
        return self.arch  # keys Triton's per-device cache: one binder per architecture

    def get_current_stream(self, _device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return divmod(int(self.arch[3:]), 10) if self.arch.startswith("sm_") else (0, 0)


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list[Any]]:
    """Within: every Triton launch compiles for ``arch`` and does not run; yields the compiled kernels."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    before = driver._active
    driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    JITFunction.run = compile_only  # type: ignore[method-assign,assignment]
    try:
        with forced_arch(arch):
            yield compiled
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active = before


_MATRIX = re.compile(r"\b(HGMMA|QGMMA|IGMMA|UTC[A-Z]*MMA|HMMA|IMMA|QMMA|OMMA|v_mfma)")
_TMA = re.compile(r"\bUTMALDG\b")
_VECTOR = re.compile(
    r"\bLDG\.E(?:\.\w+)*\.128\b|\bLDGSTS\.E(?:\.\w+)*\.128\b|\b(?:global|buffer)_load_(?:dwordx4|b128)"
)
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")


def read(kernel: Any, arch: str) -> Reading:
    """Read one compiled kernel."""
    if arch.startswith("sm_"):
        text, registers, stack = _read_cubin(kernel.asm["cubin"])
        spills = len(_LOCAL.findall(text))
    else:
        text = kernel.asm["amdgcn"]
        number = functools.partial(_metadata_number, text)
        registers, stack = number(".vgpr_count"), number(".private_segment_fixed_size")
        spills = number(".vgpr_spill_count") + number(".sgpr_spill_count")
    matrix: dict[str, int] = {}
    for name in _MATRIX.findall(text):
        matrix[name] = matrix.get(name, 0) + 1
    return Reading(
        kernel=kernel.metadata.name,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        spills=spills,
        stack=stack,
        shared=kernel.metadata.shared,
        matrix=matrix,
        tma_loads=len(_TMA.findall(text)),
        vector_loads=len(_VECTOR.findall(text)),
    )


def _metadata_number(text: str, key: str) -> int:
    found = re.search(re.escape(key) + r":?\s+(\d+)", text)
    return int(found.group(1)) if found else 0


def _read_cubin(cubin: bytes) -> tuple[str, int, int]:
    """SASS text, registers a thread and stack bytes, from the tools that Triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        sass = _output(tools / "cuobjdump", "-sass", file.name)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    return sass, registers, stack


def _output(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def judge(case: Case, arch: str, readings: list[Reading]) -> list[str]:
    """What is wrong with a case on an architecture, whatever the table says."""
    problems = []
    if not readings:
        problems.append("no kernel was launched")
    for r in readings:
        if (r.spills or r.stack) and arch not in case.allow_spill:
            problems.append(f"{r.kernel}: {r.spills} spills, {r.stack} bytes of stack")
        if r.shared > shared_memory_limit(arch):
            problems.append(f"{r.kernel}: {r.shared} bytes of shared memory, the limit is {shared_memory_limit(arch)}")
    if case.matrix and not any(r.matrix for r in readings):
        problems.append("no matrix instructions")
    if case.matrix and arch == "sm_90" and not any("HGMMA" in r.matrix for r in readings):
        problems.append("no wgmma (HGMMA)")
    if case.tma and has_tma(arch) and not any(r.tma_loads for r in readings):
        problems.append("no TMA loads (UTMALDG)")
    return problems


def compare(old: list[dict[str, Any]], new: list[Reading]) -> list[str]:
    """How a reading is worse than the committed one (same Triton version)."""
    if [o["kernel"] for o in old] != [n.kernel for n in new]:
        return [f"kernels are {[n.kernel for n in new]}, the table has {[o['kernel'] for o in old]}"]
    problems = []
    for o, n in zip(old, new, strict=True):
        for key in ("registers", "spills", "stack", "shared"):
            if getattr(n, key) > o[key]:
                problems.append(f"{n.kernel}: {key} {getattr(n, key)}, the table has {o[key]}")
        for key in ("tma_loads", "vector_loads"):
            if getattr(n, key) < o[key]:
                problems.append(f"{n.kernel}: {key} {getattr(n, key)}, the table has {o[key]}")
        if set(n.matrix) != set(o["matrix"]):
            problems.append(f"{n.kernel}: matrix instructions {n.matrix}, the table has {o['matrix']}")
    return problems


def load_cases(folder: Path, op: str) -> list[Case]:
    path = folder / f"spec_{op}.py"
    spec = importlib.util.spec_from_file_location(f"spec_{op}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.CASES)


def examine(folder: Path, op: str, archs: Sequence[str]) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Compile every case of ``op``; returns readings by ``case/arch`` and what is wrong in itself."""
    import triton

    older = tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)
    table: dict[str, list[dict[str, Any]]] = {}
    problems = []
    for case in load_cases(folder, op):
        for arch in archs:
            if case.archs is not None and arch not in case.archs:
                continue
            if older and arch in case.older_triton:
                continue
            key = f"{case.name}/{arch}"
            try:
                with compiling_for(arch) as compiled:
                    case.call()
                readings = [read(kernel, arch) for kernel in compiled]
            except Exception as error:
                problems.append(f"{op} {key}: {type(error).__name__}: {str(error)[:500]}")
                continue
            table[key] = [asdict(r) for r in readings]
            problems += [f"{op} {key}: {text}" for text in judge(case, arch, readings)]
    return table, problems


def check(folder: Path, op: str, archs: Sequence[str], update: bool = False) -> list[str]:
    """Examine ``op`` and hold it to its table (or rewrite the table); returns the problems."""
    import triton

    readings, problems = examine(folder, op, archs)
    path = folder / f"{op}.json"
    committed = json.loads(path.read_text()) if path.exists() else {"triton": None, "readings": {}}
    if update:
        kept = {k: v for k, v in committed["readings"].items() if k.rpartition("/")[2] not in archs}
        text = json.dumps({"triton": triton.__version__, "readings": kept | readings}, indent=1, sort_keys=True)
        # One kernel a line keeps the table readable and its diffs small.
        text = re.sub(
            r"\{\s+(\"kernel\".*?)\s+\}(?=,?\s+[\{\]])", lambda m: "{" + " ".join(m[1].split()) + "}", text, flags=re.S
        )
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        os.replace(temporary, path)
        return problems
    if triton.__version__ != committed["triton"]:
        return problems  # another compiler's registers are its own; spills and instructions were judged above
    for key, rows in readings.items():
        if key not in committed["readings"]:
            problems.append(f"{op} {key}: not in {path.name}; run --update {op}")
        else:
            new = [Reading(**row) for row in rows]
            problems += [f"{op} {key}: {text}" for text in compare(committed["readings"][key], new)]
    stale = {k for k in committed["readings"] if k.rpartition("/")[2] in archs} - set(readings)
    problems += [f"{op} {key}: in {path.name} but no case makes it" for key in sorted(stale)]
    return problems


def check_tuned(path: Path) -> list[str]:
    """Compile the tuned configurations of one table at the shapes they were tuned at; returns the problems.

    A row may say in ``allow_spill`` why its spills are accepted. Rows of other kernels and tables of another Triton
    choose nothing here: they are held to be legal, and are not compiled.
    """
    from pyvideo_kernels.benchmarks.tune.launches import Job, Launch, compile_job

    problems = []
    try:
        found = tuned.read(path)
    except ValueOptionError as error:
        return [str(error)]
    arch = found["provenance"]["arch"]
    for row in found["rows"]:
        label = f"{path.name}: {row['family']} {row['key']}"
        if not row["tuned"] or not tuned.current(row):
            continue
        try:
            config = tuned.row_config(row, arch)
        except ValueOptionError as error:
            problems.append(f"{label}: {error}")
            continue
        if found["provenance"]["triton"] != tuned.triton_version():
            continue
        for shape in (each["shape"] for each in row["measured"]):
            launch = Launch(tuned.row_op(row), shape, row["dtype"])
            compiled = compile_job(Job(launch, arch, row["family"], tuple(sorted(row["key"].items())), config))
            if compiled.error is not None:
                problems.append(f"{label} at {shape}: {compiled.error}")
            case = Case(shape, lambda: None, allow_spill={arch: row["allow_spill"]} if row.get("allow_spill") else {})
            problems += [f"{label} at {shape}: {text}" for text in judge(case, arch, list(compiled.readings))
                         if compiled.readings]  # fmt: skip
    return problems


def all_ops(folder: Path) -> list[str]:
    return sorted(path.stem.removeprefix("spec_") for path in folder.glob("spec_*.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints one line a problem and returns 1 if there is any."""
    parser = argparse.ArgumentParser(
        prog="python -m pyvideo_kernels.testing.static", description=__doc__.splitlines()[0]
    )
    parser.add_argument("ops", nargs="*", help="ops to examine (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("tests/static"))
    parser.add_argument("--tables", type=Path, default=tuned.FOLDER, help="folder of the cards' tuned configurations")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--update", action="store_true", help="rewrite the committed tables")
    parser.add_argument("--show", action="store_true", help="print the readings")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    ops, archs = options.ops or all_ops(options.folder), tuple(options.arch or ARCHS)
    if unknown := sorted(set(ops) - set(all_ops(options.folder))):
        parser.error(f"no spec for {', '.join(unknown)} in {options.folder}")
    if options.show:
        for op in ops:
            table, _ = examine(options.folder, op, archs)
            for key, rows in table.items():
                for row in rows:
                    print(f"{op} {key}: {row}")
        return 0
    problems: list[str] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, min(options.jobs, len(ops))), mp_context=context) as pool:
        for found in pool.map(functools.partial(_check, options.folder, archs, options.update), ops):
            problems += found
    tables = [] if options.ops else sorted(options.tables.glob("*.json"))
    for path in tables:
        problems += check_tuned(path)
    print("\n".join(problems) or f"{len(ops)} ops and {len(tables)} tuned tables hold on {', '.join(archs)}")
    return 1 if problems else 0


def _check(folder: Path, archs: Sequence[str], update: bool, op: str) -> list[str]:
    return check(folder, op, archs, update)


if __name__ == "__main__":
    sys.exit(main())
