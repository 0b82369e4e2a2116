"""How things are timed: variants interleaved, inputs random and rotated past the cache, medians and spread.

CPU: wall clock, the variants take turns inside each round, so that a slow spell of the machine hits all of them.
GPU: Triton's ``do_bench`` (events, L2 cleared before each call), the variants again in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: the median of the rounds and the half-width of their middle half."""

    median: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        if len(seconds) < 3:
            return cls(statistics.median(seconds), (max(seconds) - min(seconds)) / 2, len(seconds))
        low, middle, high = statistics.quantiles(seconds, n=4)
        return cls(middle, (high - low) / 2, len(seconds))


def interleaved(
    variants: Mapping[str, Callable[[], Any]], *, device: torch.device, rounds: int = 7, min_seconds: float = 0.02
) -> dict[str, Timing]:
    """Time each variant ``rounds`` times in turns; short ones are repeated to ``min_seconds`` a round."""
    if device.type == "cuda":
        return _interleaved_cuda(variants, rounds)
    repeats = {}
    for name, call in variants.items():
        call()  # warm: compilation, page faults, thread pools
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(min_seconds / max(time.perf_counter() - start, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: Timing.of(values) for name, values in seconds.items()}


def _interleaved_cuda(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    from triton.testing import do_bench

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            seconds[name].append(do_bench(call, warmup=10, rep=50, return_mode="median") / 1e3)
    return {name: Timing.of(values) for name, values in seconds.items()}


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second of a large copy on this device, read plus written: the ceiling of memory-bound ops."""
    size = size or (1 << 31 if device.type == "cuda" else 1 << 27)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device=device)["copy"]
    return 2 * source.numel() * 4 / timing.median


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large square product on this device: the ceiling of compute-bound ops."""
    size = size or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = interleaved({"gemm": lambda: a @ b}, device=device)["gemm"]
    return 2 * size**3 / timing.median
