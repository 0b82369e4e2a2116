"""The harness measures what it says."""

import statistics
import time

import pytest
import torch

from pyvideo_kernels.benchmarks.timing import Timing, interleaved

CPU = torch.device("cpu")


def test_a_known_duration_is_measured_within_ten_percent():
    """Against what each call took by its own clock: a busy machine wakes a sleeper late."""
    spent = {"short": [], "long": []}

    def nap(name, seconds):
        start = time.perf_counter()
        time.sleep(seconds)
        spent[name].append(time.perf_counter() - start)

    variants = {"short": lambda: nap("short", 0.02), "long": lambda: nap("long", 0.04)}
    for name, timing in interleaved(variants, device=CPU, rounds=5).items():
        assert timing.rounds == 5 and len(spent[name]) == 7  # two calls before: to warm, and to choose the repeats
        assert timing.median == pytest.approx(statistics.median(spent[name][2:]), rel=0.1)


def test_timing_of_is_robust_to_one_outlier():
    assert Timing.of([1.0, 1.0, 1.0, 1.0, 9.0]).median == 1.0
