"""Whether the kernels of this package are right on this machine: canaries, and the calls a model really makes.

``pyvideo verify`` does both for a model and compares a clip besides. Without a model:

    python -m pyvideo_kernels.verify [--device cuda] [--json FILE] [--commit]

runs the canary of every op, implementation, dtype and head_dim; ``--commit`` merges what passed on a GPU into the
record that ships with the package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, verdicts
from .errors import UnsupportedError
from .recording import Call, tensors
from .schemas import OPS, Op
from .testing import conditions
from .testing.compare import Mismatch, check_call, check_op, move, product_modes, samples

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Beyond this many scores a float64 attention takes minutes and its rows are sampled.
_MAX_SCORES = 1 << 31
_ROWS = 256
_NOT_FINITE = "its arguments hold NaN or infinity, from something before it"


@dataclass(frozen=True)
class Row:
    """One check and what came of it.

    Args:
        check: ``canary`` (the op's sample inputs) or ``call`` (real arguments of a model).
        what: which inputs.
        ok: None: the implementation refuses this, which is no fault.
        error: why not, or why it was not checked.
        calls: how often the model made the call.
    """

    op: str
    impl: str
    dtype: str
    head_dim: int | None
    check: str
    what: str
    ok: bool | None
    error: str = ""
    calls: int = 0
    digest: str = ""

    @property
    def failed(self) -> bool:
        return self.ok is False

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _row(op: Op, impl: str, dtype: torch.dtype, head_dim: int | None, check: str, what: str, **rest: Any) -> Row:
    digest = verdicts.digest(op, impl) if verdicts.needs_check(impl) else ""
    name = str(dtype).removeprefix("torch.")
    return Row(op.name, impl, name, head_dim, check, what, digest=digest, **rest)


def _judge(work: Callable[[], object]) -> tuple[bool | None, str]:
    """``(ok, error)`` of a check."""
    try:
        work()
    except Mismatch as error:
        return False, str(error)
    except UnsupportedError as error:
        return None, str(error)
    except Exception as error:  # a kernel that does not compile or launch is as wrong as one that gives zeros
        return False, f"{type(error).__name__}: {error}"
    return True, ""


# Canaries -------------------------------------------------------------------------------------------------------


def canary(op: Op, impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> Row:
    """The op's samples through one implementation, whatever is known of it; a GPU's verdict is remembered."""
    # Ours must serve every sample. A library's attention has not every option: what it serves must be right.
    partial = not verdicts.needs_check(impl) or impl in verdicts.LIBRARIES
    ok, error = _judge(lambda: check_op(op, impl, device, dtype, partial=partial, head_dim=head_dim))
    if ok is not None and verdicts.needs_check(impl) and device.type == "cuda":
        remember(op, impl, device, dtype, head_dim, ok)
    count = len(list(samples(op, dtype, head_dim=head_dim))) if ok else 0
    return _row(op, impl, dtype, head_dim, "canary", f"{count} samples" if ok else "samples", ok=ok, error=error)


def remember(op: Op, impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None, verdict: bool) -> None:
    """Tell dispatch, in this process and, for what ``auto`` checks, in the next ones."""
    verdicts.remember(verdicts.key_of(op, impl, dispatch.arch_of(device), dtype, head_dim), verdict)
    dispatch.settle(op, impl, device, dtype, head_dim, verdict)


def canaries(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = DTYPES,
    head_dims: Sequence[int] = dispatch.HEAD_DIMS,
    ops: Iterable[str] | None = None,
) -> Iterator[Row]:
    """The canary of every op and of each implementation that runs on ``device`` but the oracle, one row after another.

    Args:
        ops: names; None: all, backwards included.
    """
    for name in OPS if ops is None else ops:
        op = OPS[name]
        for impl in op.impls:
            if impl == "reference" or not _runs_on(op, impl, device):
                continue
            for dtype in dtypes:
                for head_dim in head_dims if op.heads is not None else (None,):
                    yield canary(op, impl, device, dtype, head_dim)


def _runs_on(op: Op, impl: str, device: torch.device) -> bool:
    if impl == "triton" and device.type == "cpu":
        return False  # interpreted: says nothing of what a GPU would compute
    try:
        dispatch.check_runs_on(op, impl, device)
        dispatch.load(op, impl)
    except (UnsupportedError, ValueError):
        return False
    return True


# Real calls -----------------------------------------------------------------------------------------------------


def verify_calls(calls: Sequence[Call], advance: Callable[[], None] = lambda: None) -> list[Row]:
    """Canary and real arguments of each recorded kind of call, through what ``auto`` would run.

    Every implementation that stands before the bound one in ``auto``'s order is judged too: one that is wrong is a
    failure, one that refuses the call is said.

    Args:
        calls: of `dispatch.recording`.
        advance: called after each.
    """
    known: dict[tuple[str, str, torch.device, torch.dtype, int | None], Row] = {}
    rows: list[Row] = []
    for call in calls:
        op = call.op
        for impl in dispatch.order(op, call.device, call.dtype, call.head_dim, call.args):
            of = (op.name, impl, call.device, call.dtype, call.head_dim)
            if impl != "reference" and of not in known:
                known[of] = canary(op, impl, call.device, call.dtype, call.head_dim)
                rows.append(known[of])
            if of in known and known[of].failed:
                continue
            row = verify_call(call, impl)
            rows.append(row)
            if row.failed and verdicts.needs_check(impl) and call.device.type == "cuda":
                remember(op, impl, call.device, call.dtype, call.head_dim, False)
            if row.ok is not None or row.error == _NOT_FINITE:
                break
        advance()
    return rows


def verify_call(call: Call, impl: str) -> Row:
    """One recorded call through one implementation, by the rule, against the float64 oracle."""
    about = (call.op, impl, call.dtype, call.head_dim, "call", call.text)
    if call.args is None:
        error = "its arguments did not fit in the recorder's memory; verify with a smaller model"
        return _row(*about, ok=False, error=error, calls=call.count)
    if impl == "reference":
        return _row(*about, ok=True, error="eager PyTorch", calls=call.count)
    if not all(bool(torch.isfinite(x).all()) for x in tensors(call.args) if x.is_floating_point()):
        return _row(*about, ok=None, error=_NOT_FINITE, calls=call.count)
    ok, error = _judge(lambda: _check(call, impl))
    return _row(*about, ok=ok, error=error, calls=call.count)


def _check(call: Call, impl: str) -> None:
    op = call.op
    assert call.args is not None
    options: dict[str, Any] = {"any_order": True}
    label = op.name
    if rows := _sampled_rows(op, call.args):
        at = torch.tensor(rows)
        label += f" ({len(rows)} of the query rows)"
        options |= {
            "call": lambda *args: _take(dispatch.load(op, impl)(*args), at.to(call.device)),
            "oracle": lambda *args: attention_rows(*args, rows=at.to(args[0].device)),
        }
    # As the user has set the switch: this is the product that the model makes.
    modes = product_modes(op, impl, call.device, call.dtype)
    mode = "tf32" if "tf32" in modes and conditions.tf32_convolutions() else "ieee"
    try:
        check_call(op, impl, move(call.args, call.device), label, mode=mode, **options)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        args = move(call.args, call.device)
        check_call(op, impl, args, label, mode=mode, oracle_device=torch.device("cpu"), **options)


def _sampled_rows(op: Op, args: tuple[Any, ...]) -> list[int]:
    """Query rows on which a very long dense attention is judged, first and last among them; empty: on all."""
    if op.name != "spacetime_attention":
        return []
    bound = dict(zip(op.arguments[:-1], args, strict=True))
    b, s, heads, _ = bound["q"].shape
    dense = bound["window"] is None and not bound["causal_time"]
    if not dense or b * heads * s * s <= _MAX_SCORES:
        return []
    return sorted({round(i * (s - 1) / (_ROWS - 1)) for i in range(_ROWS)})


def _take(result: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = result
    return out[:, rows], lse[..., rows] if lse.numel() else lse


def attention_rows(
    q: Tensor, k: Tensor, v: Tensor, grid: Any, window: Any, stride: Any, causal_time: bool, text_len: int,
    text_side: str, kv_lens: Tensor | None, scale: float, return_lse: bool, precision: str, *, rows: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle's dense attention for some query rows, a head at a time."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, s, heads, head_dim = q.shape
    out = q.new_empty((b, len(rows), heads, head_dim))
    lse = q.new_empty((b, heads, len(rows)) if return_lse else (0,), dtype=dtype)
    at = torch.arange(s, device=q.device) - (0 if text_side == "prefix" else s - text_len)
    for batch in range(b):
        hidden = None if kv_lens is None else (at >= kv_lens[batch].clamp(min=0)) & (at < text_len)
        for head in range(heads):
            group = head // (heads // k.shape[2])
            scores = q[batch, rows, head].to(dtype) @ k[batch, :, group].to(dtype).T * scale
            if hidden is not None:
                scores = scores.masked_fill(hidden, -math.inf)
            out[batch, :, head] = (torch.softmax(scores, -1) @ v[batch, :, group].to(dtype)).to(q.dtype)
            if return_lse:
                lse[batch, head] = torch.logsumexp(scores, -1)
    return out, lse


# python -m pyvideo_kernels.verify -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if no canary failed."""
    import argparse
    from pathlib import Path

    from .benchmarks import results

    parser = argparse.ArgumentParser(prog="python -m pyvideo_kernels.verify", description="Check every op's kernels.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", action="append", choices=list(OPS), help="leave out: all; may be repeated")
    parser.add_argument("--head-dim", action="append", type=int, help="of the attention ops; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a result file")
    parser.add_argument("--commit", action="store_true", help=f"merge what passed into {verdicts.VERIFIED.name}")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N; got {options.device!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"--device {options.device}: torch finds no GPU; use --device cpu")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    elif options.commit:
        parser.error(f"--commit: {verdicts.VERIFIED.name} is about GPUs; this is {device}")
    rows = []
    for row in canaries(device, head_dims=options.head_dim or dispatch.HEAD_DIMS, ops=options.op):
        state = {True: "ok", False: "FAILED", None: "refused"}[row.ok]
        name = verdicts.name_of(row.op, row.impl, row.dtype, row.head_dim)
        print(f"{state:<8}{name}{': ' + row.error if row.error else ''}", flush=True)
        rows.append(row)
    failed = [row for row in rows if row.failed]
    print(f"{len(rows)} checks on {device}, {len(failed)} failed")
    where = results.provenance(device)
    found = [row.as_dict() for row in rows]
    if options.json is not None:
        settings = {"device": str(device)}
        results.write(options.json, {
            "schema": results.SCHEMA, "kind": "correctness", "provenance": where, "settings": settings,
            "ceilings": {}, "rows": found,
        })  # fmt: skip
    if options.commit:
        count = verdicts.commit(verdicts.VERIFIED, [row for row in found if row["ok"] is not None], where)
        print(f"{verdicts.VERIFIED}: {count} entries for {where['arch']}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
