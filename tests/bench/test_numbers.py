"""Result files say where they come from, and docs/numbers.md is what they give."""

from pyvideo_kernels.benchmarks import numbers, results


def test_numbers_page_is_what_the_results_give():
    assert numbers.PAGE.read_text() == numbers.render()


def test_results_without_a_machine_are_refused():
    gpu = {"device": "cuda", "arch": "sm_90", "torch": "2", "python": "3", "pyvideo_kernels": "0", "revision": "abc"}
    assert results.missing_provenance(gpu) == ["date", "gpu", "driver", "triton", "clock_sm"]
