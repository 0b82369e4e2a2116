"""One row of `pyvideo bench ops`: is it right, and then, how fast is everyone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvideo_kernels import dispatch
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import Mismatch, check_op

from ..backends import backend_for
from ..registry import Entry, moved_bytes, weight_of
from ..timing import TF32, Rotation, Timing, Variant, dtype_name, interleaved
from . import agreement, baselines

Row = dict[str, Any]


class _Refused(Exception):
    """An external kernel does not serve these inputs."""


# Our side of a row --------------------------------------------------------------------------------------------------


def fresh(entry: Entry, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs that the op may write over: copies for an in-place op (strides kept), else the same."""
    if not entry.in_place:
        return inputs
    return {name: _copy(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def run_ours(entry: Entry, inputs: dict[str, Any], impl: str = "auto") -> tuple[str, Any]:
    """Call the op once: which implementation ran, and what it returned."""
    before = dispatch.calls()
    output = entry.ours(**inputs, impl=impl)
    after = dispatch.calls()
    ran = [name for (op, name), n in after.items() if op == entry.op and n > before.get((op, name), 0)]
    return (ran[0] if ran else "?"), output


def bound_impl(entry: Entry, inputs: dict[str, Any], impl: str = "auto") -> str:
    """Which implementation ``impl`` binds for these inputs."""
    return run_ours(entry, fresh(entry, inputs), impl)[0]


def tolerance(entry: Entry, sizes: dict[str, Any], dtype: torch.dtype, device: torch.device, output: Any) -> float:
    """`agreement.unit` of an entry: fp32 counts as TF32 where cuDNN may round it so."""
    results_count = max(sum(t.numel() for t in agreement.tensors(output)), 1)
    terms = max(entry.flops(**sizes) / (2 * results_count), 4096)
    tf32 = entry.convolves and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return agreement.unit(dtype, terms, tf32)


def reason(error: BaseException) -> str:
    """``Type: first line``, for a row."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Runner:
    """Measures rows of one device and dtype.

    Args:
        device, dtype: where and in what.
        impl: implementation of ours; ``auto``: what a call would bind.
        names: baselines; None: all.
        rounds: timings a median is taken over.
        tops: `timing.ceilings` of the device.
        say: takes a line for people (a baseline that is skipped, once).
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        tops: dict[str, Any],
        *,
        impl: str = "auto",
        names: Sequence[str] | None = None,
        rounds: int = 7,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.device, self.dtype, self.tops = device, dtype, tops
        self.impl, self.names, self.rounds, self.say = impl, names, rounds, say
        self.backend = backend_for(device)
        self._checked: set[tuple[str, str]] = set()
        self._said: set[str] = set()

    def row(self, entry: Entry, shape: str, sizes: dict[str, Any]) -> Row:
        """One row: the checks, then everyone timed in turns."""
        row: Row = {"op": entry.op, "shape": shape, "dtype": dtype_name(self.dtype), "impl": self.impl}
        torch.manual_seed(0)
        try:
            with torch.inference_mode():
                return self._row(row, entry, sizes)
        except (Mismatch, agreement.Disagreement) as error:
            return {**row, "error": str(error)}
        except Exception as error:
            return {**row, "error": reason(error)}

    def _row(self, row: Row, entry: Entry, sizes: dict[str, Any]) -> Row:
        inputs = entry.inputs(**sizes, dtype=self.dtype, device=self.device)
        row["impl"], ours = run_ours(entry, fresh(entry, inputs), self.impl)
        self._check_samples(entry, row["impl"])
        outcome: dict[str, dict[str, Any]] = {}
        competitors, error = self._check_at_size(entry, sizes, inputs, ours, outcome)
        moved = entry.bytes(**sizes, dtype=self.dtype) if entry.bytes else moved_bytes(inputs, ours, entry.returns)
        inputs_weight, outputs_weight = weight_of(inputs), weight_of(ours)
        del ours
        rotation = Rotation.past_cache(inputs_weight, outputs_weight, self.backend, 1 + len(competitors))
        sets = [inputs]
        for _ in range(rotation.sets - 1):
            sets.append(entry.inputs(**sizes, dtype=self.dtype, device=self.device))
        variants = {
            "ours": Variant(lambda given: entry.ours(**given, impl=self.impl), [fresh(entry, given) for given in sets])
        }
        failures: dict[str, Exception] = {}
        for name, one in competitors.items():
            try:
                variants[name] = Variant(one.call, [one.prepare(given) for given in sets])
            except Exception as problem:
                failures[name] = problem
        timings = interleaved(variants, backend=self.backend, rounds=self.rounds, failures=failures)
        if "ours" in failures:
            raise failures["ours"]
        timing = timings.pop("ours")
        outcome |= {name: {"error": reason(failure)} for name, failure in failures.items()}
        for name, other in timings.items():
            outcome[name] |= {**_times(other), "ratio": other.median / timing.median}
        row |= {**_times(timing), "rounds": timing.rounds}
        row |= self._rate(entry, sizes, moved, timing.median)
        row |= {"sets": rotation.sets} | ({"capped": rotation.capped} if rotation.capped else {}) | error
        return {**row, "baselines": outcome}

    def _check_samples(self, entry: Entry, impl: str) -> None:
        if (entry.op, impl) not in self._checked:
            check_op(OPS[entry.op], impl, self.device, self.dtype, partial=True)
            self._checked.add((entry.op, impl))

    def _check_at_size(
        self, entry: Entry, sizes: dict[str, Any], inputs: dict[str, Any], ours: Any, outcome: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, baselines.Baseline], Row]:
        """Hold ours against eager, and everyone else against eager too; who is right is returned, ready to be timed.

        ``outcome`` has an entry for every baseline, with the reason for those that are not timed.
        """
        competitors: dict[str, baselines.Baseline] = {}
        wanted = self.names
        one = baselines.eager(entry)
        try:
            expected = one.call(one.prepare(inputs))
        except Exception as problem:  # no memory for it, say: the samples' verdict stands, and the row says so
            expected = None
            facts: Row = {"unchecked_at_size": f"eager: {reason(problem)}"}
            if wanted is None or "eager" in wanted:
                outcome["eager"] = {"error": reason(problem)}
        else:
            allowed = tolerance(entry, sizes, self.dtype, self.device, expected)
            facts = {"relative_error": agreement.check_at_size(ours, expected, allowed)}
            if wanted is None or "eager" in wanted:
                competitors["eager"], outcome["eager"] = one, {}
        if wanted is None or "compile" in wanted:
            self._admit("compile", lambda: baselines.compiled(entry, inputs), expected, competitors, outcome)
        for name, peer in baselines.peers(entry.op, self.device, self.dtype).items():
            if wanted is not None and name not in wanted:
                continue
            if peer.why_not:
                outcome[name] = {"skipped": peer.why_not}
                if name not in self._said:
                    self._said.add(name)
                    self.say(f"skipped: {name}: {peer.why_not}")
                continue

            def first(peer: baselines.Peer = peer) -> tuple[baselines.Baseline, Any]:
                if why := peer.refuses(inputs):
                    raise _Refused(why)
                candidate = baselines.external(peer)
                return candidate, candidate.call(candidate.prepare(inputs))

            self._admit(name, first, expected, competitors, outcome)
        return competitors, facts

    def _admit(
        self,
        name: str,
        first: Callable[[], tuple[baselines.Baseline, Any]],
        expected: Any,
        competitors: dict[str, baselines.Baseline],
        outcome: dict[str, dict[str, Any]],
    ) -> None:
        """Let a baseline into the race if its first call succeeds and is not wrong."""
        try:
            candidate, output = first()
            error = {} if expected is None else {"relative_error": agreement.check_peer(output, expected)}
        except _Refused as why:
            outcome[name] = {"skipped": str(why)}
        except agreement.Disagreement as problem:
            outcome[name] = {"error": f"wrong: {problem}"}
        except Exception as problem:
            outcome[name] = {"error": reason(problem)}
        else:
            competitors[name], outcome[name] = candidate, {**candidate.facts, **error}

    def _rate(self, entry: Entry, sizes: dict[str, Any], moved: int, seconds: float) -> Row:
        """The rate that is nearer to its ceiling: what a perfect kernel here would be bound by."""
        flops = entry.flops(**sizes)
        gemm = self.tops["gemm"]
        if entry.convolves and self.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
            gemm = self.tops.get("gemms", {}).get(TF32, gemm)
        compute_bound = flops / gemm > moved / self.tops["copy"]
        work, ceiling, unit = (flops, gemm, "FLOP/s") if compute_bound else (moved, self.tops["copy"], "B/s")
        rate = work / seconds
        return {"bytes": moved, "flops": flops, "rate": rate, "unit": unit, "share_of_ceiling": rate / ceiling}


def _times(timing: Timing) -> Row:
    row: Row = {"seconds": timing.median, "spread": timing.spread, "graph": timing.graph}
    return row | ({"why_no_graph": timing.why_no_graph} if timing.why_no_graph else {})
