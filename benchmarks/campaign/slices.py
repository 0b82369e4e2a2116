"""What a campaign consists of: each slice's name, cost, and what its result depends on.

A slice is measured again when what it depends on has changed: its parameters, the card, torch and triton, the sources
behind the op, and the op's tuned launch configurations. A commit that touches none of these (a result file, a page of
the documentation) makes nothing stale.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyvideo_kernels import verdicts
from pyvideo_kernels.configs import tuned
from pyvideo_kernels.error_types import ValueOptionError
from pyvideo_kernels.schemas import OPS

from ..registry import ENTRIES

ROOT = Path(__file__).resolve().parents[2]
RUNS = "pyvideo_kernels.benchmarks.campaign.runs"

# The most valuable first: where a video model spends its time. What is not named follows in the registry's order.
_FIRST = (
    "spacetime_attention",
    "causal_conv3d",
    "rms_norm_silu",
    "qk_norm_rope",
    "gate_residual_norm_modulate",
    "layer_norm_modulate",
)
# Keeps and shows results: no number depends on it.
_SHOWS = ("results", "compare", "numbers", "report", "ops.table", "e2e.console", "e2e.statements")


@dataclass(frozen=True)
class Slice:
    """One piece of a campaign, run in a process of its own.

    Args:
        name: stem of its result file.
        group: slices of one group may share a process as long as each of them ends well; see ``alone``.
        run: ``"module:function"``; called in the worker with a ``worker.Job``.
        seconds: what it takes on an H100, about.
        least: it is not started with less than this left: ``seconds``, but for one that goes on where it stopped.
        parameters: what is measured.
        files: sources that the result depends on, beside those of ``ops``.
        ops: ops whose sources it depends on.
        tuned: it depends on their tuned launch configurations too.
        needs: modules without which it is skipped, aloud.
        alone: it gets a fresh process whatever ran before (timings of whole models, peak memory).
    """

    name: str
    group: str
    run: str
    seconds: float
    parameters: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    ops: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    tuned: bool = True
    alone: bool = False
    least: float | None = None

    @property
    def limit(self) -> float:
        """Seconds after which it is stopped: it hangs, or the estimate is worthless.

        What is stopped has no result, and a small slice whose kernels nobody has compiled yet takes several times its
        estimate.
        """
        return max(_LEAST_LIMIT, 3 * self.seconds)

    def missing(self) -> list[str]:
        """Modules that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def key(self, where: Mapping[str, Any]) -> str:
        """Digest of everything the result depends on; ``where`` names the card and the compiler."""
        out = hashlib.sha256(json.dumps([self.name, self.run, self.parameters, where], sort_keys=True).encode())
        for path in sorted({*self.files, *(path for op in self.ops for path in sources(op))}):
            out.update(f"{path.name} {_content(path)}".encode())
        if self.tuned and (gpu := where.get("gpu")):
            for row in _tuned_rows(tuned.FOLDER / f"{slug(gpu)}.json"):
                if _forward(tuned.row_op(row)) in self.ops:
                    out.update(json.dumps([row["family"], row["key"], row["config"]], sort_keys=True).encode())
        return out.hexdigest()[:16]


def _home(op: str) -> str:
    """The name that an op's files bear."""
    return op if (ROOT / "pyvideo_kernels" / "ops" / f"{op}.py").is_file() else op.rstrip("_")


def _content(path: Path) -> str:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ""
    return _digest(path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _digest(path: Path, mtime: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _forward(op: str) -> str:
    """The op that a backward or an in-place op goes with; one that is in place alone goes by itself."""
    name = op.removesuffix("_backward")
    return name.rstrip("_") if name.rstrip("_") in OPS else name


def _tuned_rows(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueOptionError):
        return [row for row in tuned.read(path)["rows"] if row["tuned"]]
    return []


@functools.cache
def sources(op: str) -> set[Path]:
    """Files behind every implementation of an op: what it is checked against, its kernels, what they borrow."""
    package = ROOT / "pyvideo_kernels"
    home = _home(op)
    out = {package / "ops" / f"{home}.py", package / "reference" / f"{home}.py", package / "testing" / "compare.py"}
    out |= {path for part in (home, "common") for path in (ROOT / "csrc" / part).rglob("*") if path.is_file()}
    for name in (name for name in OPS if _forward(name) == op):
        if "triton" in OPS[name].impls:
            out.update(verdicts.sources(OPS[name].impls["triton"].partition(":")[0]))
    return out


def families() -> dict[str, list[str]]:
    """Forward op -> its entries of the registry (itself, its in-place twin; maybe none), the most valuable first."""
    forward = dict.fromkeys(_forward(op) for op in OPS)
    ordered = [*(op for op in _FIRST if op in forward), *(op for op in forward if op not in _FIRST)]
    return {name: [op for op in ENTRIES if _forward(op) == name] for name in ordered}


@functools.cache
def measuring(*modules: str) -> tuple[Path, ...]:
    """The files of these modules and of all that they import here, inside functions too, but for what shows results.

    Args:
        modules: dotted names within ``benchmarks``, a package for its ``__init__``.
    """
    found: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        path = _file_of(name)
        if name in found or path is None or any(name == shown or name.startswith(f"{shown}.") for shown in _SHOWS):
            continue
        found[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom):
                todo += _imported(node, package)
    return tuple(found[name] for name in sorted(found))


def _file_of(name: str) -> Path | None:
    base = ROOT.joinpath("benchmarks", *name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _imported(node: ast.ImportFrom, package: str) -> list[str]:
    """Modules of ``benchmarks`` that an import may mean; ``package`` is where it stands."""
    installed = "pyvideo_kernels.benchmarks"
    if node.level:
        parts = package.split(".") if package else []
        base = parts[: len(parts) - node.level + 1]
    elif (node.module or "").partition(f"{installed}.")[0] == "" or node.module == installed:
        base = []
    else:
        return []
    module = (node.module or "").removeprefix(installed).lstrip(".")
    name = ".".join([*base, *([module] if module else [])])
    # Each name may be a module of that package, or something defined in it.
    return [n for n in (name, *(f"{name}.{alias.name}".lstrip(".") for alias in node.names)) if n]


def plan(*, dry: bool = False) -> list[Slice]:
    """Every slice, in the order in which they are wanted.

    Correctness comes first: a wrong kernel's speed is worth nothing. Then the headline, one model end to end; then op
    by op its tuning and its measurement with the tuned configuration; then what is large or rare. Tuning makes the
    op's correctness stale, which is then checked again at the end.

    Args:
        dry: the same slices on tiny shapes.
    """
    ops, tests = families(), ROOT / "tests" / "ops"
    out = [Slice("environment", "environment", f"{RUNS}:environment", 15, files=measuring("timing"))]
    for op in ops:
        out.append(
            Slice(
                f"correctness-{op}", "correctness", f"{RUNS}:correctness", _CORRECTNESS.get(op, 25), {"op": op},
                (tests / f"test_{_home(op)}.py", tests / "helpers.py"), ops=(op,), needs=("pytest",),
            )
        )  # fmt: skip
    out.append(_clip("e2e-wan2.1-1.3b-480p", 430, dry, variants=_VARIANTS, steps=4))
    out.append(_clip("e2e-wan2.1-1.3b-480p-attention", 170, dry, variants=_ATTENTIONS, steps=3, decode=False))
    out.append(_vae("vae-wan2.1-480p", 120, dry, "wan2.1-1.3b", ("eager", "channels_last", "compile", "ours")))
    for op, entries in ops.items():
        if not entries:
            continue
        if "triton" in OPS[op].impls:
            out.append(
                Slice(
                    f"tune-{op}", "tune", f"{RUNS}:tune", _TUNING.get(op, 60), {"ops": entries}, measuring("tune.run"),
                    ops=(op,), tuned=False, least=40,
                )
            )  # fmt: skip
        parameters = {"ops": entries, "dtype": "bf16"}
        out.append(Slice(f"ops-{op}", "ops", f"{RUNS}:ops", _OPS.get(op, 40), parameters, measuring("ops"), ops=(op,)))
    out.append(_clip("e2e-wan2.1-14b-480p", 400, dry, model="wan2.1-14b", variants=("eager", "ours", "compile"),
                     steps=2, decode=False, float32=False))  # fmt: skip
    for name, model, seconds in (
        ("vae-wan2.1-720p", "wan2.1-14b", 90),
        ("vae-wan2.2-704p", "wan2.2-5b", 150),
        ("vae-hunyuanvideo-720p", "hunyuanvideo", 240),
        ("vae-ltx-512p", "ltx", 45),
        ("vae-cogvideox-480p", "cogvideox-5b", 90),
    ):
        out.append(_vae(name, seconds, dry, model, ("eager", "ours")))
    if dry:
        out = [replace(each, seconds=min(each.seconds, _DRY_SECONDS), least=None) for each in out]
    return out


_LEAST_LIMIT = 180.0
# Each variant is a warm clip, three timed ones and two under the profiler; compiling one takes about a minute more.
_VARIANTS = ("eager", "compile", "ours", "compile+ours")
_ATTENTIONS = ("eager", "eager:backend=best", "ours", "ours:attention=dense")
_DRY_SECONDS = 3.0
_TUNING = {"spacetime_attention": 180, "causal_conv3d": 180}
_CORRECTNESS = {"spacetime_attention": 90, "causal_conv3d": 45}
_OPS = {"spacetime_attention": 100, "causal_conv3d": 160}
_CLIP = {"model": "wan2.1-1.3b", "height": 480, "width": 832, "frames": 81, "decode": True, "float32": True}
_DRY_VAE = {"model": "tiny-random-wan", "dtype": "fp32", "height": 32, "width": 32, "frames": 5}
_VAE_OPS = (
    "causal_conv3d", "rms_norm_silu", "group_norm_silu", "pixel_norm_silu", "upsample_conv2d", "vae_attention",
    "decode_head_",
)  # fmt: skip
_DRY_CLIP = {"model": "tiny-random-wan", "height": 32, "width": 32, "frames": 5, "steps": 1}


def _clip(name: str, seconds: float, dry: bool, ops: Iterable[str] = (), **parameters: Any) -> Slice:
    parameters = {**_CLIP, **parameters}
    if dry:
        parameters |= {**_DRY_CLIP, "variants": ("eager", "ours")}
    architecture = ROOT / "benchmarks" / "models" / "architectures" / f"{parameters['model']}.json"
    return Slice(
        name, "e2e", f"{RUNS}:e2e", seconds, parameters, (*measuring("e2e"), architecture),
        ops=tuple(ops or families()), needs=("diffusers", "transformers"), alone=True,
    )  # fmt: skip


def _vae(name: str, seconds: float, dry: bool, model: str, variants: tuple[str, ...]) -> Slice:
    """A VAE's decoder alone, at its model's own clip."""
    parameters: dict[str, Any] = {"model": model, "variants": variants, "dtype": "bf16"}
    if dry:
        parameters |= {**_DRY_VAE, "variants": ("eager", "ours")}
    architecture = ROOT / "benchmarks" / "models" / "architectures" / f"{parameters['model']}.json"
    return Slice(
        name, "vae", f"{RUNS}:vae", seconds, parameters, (*measuring("vae"), architecture), ops=_VAE_OPS,
        needs=("diffusers", "transformers"), alone=not dry,
    )  # fmt: skip


def slug(name: str) -> str:
    """Folder of a card's results."""
    return tuned.slug(name)
