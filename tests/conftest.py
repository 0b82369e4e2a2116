"""Shared fixtures. Triton is interpreted here; the ahead-of-time checks run it compiled, in their own process."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process a core: threads on top of that would only wait for each other. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read by Triton when it is imported: must be set before any test imports a kernel. On a GPU it stays off.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is installed
def pytest_xdist_auto_num_workers(config):
    """What ``-n auto`` means: a process a core; one where there is a GPU, whose memory and timing are not shared."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(request):
    """Fill torch.empty with NaN, so that an element no kernel wrote is seen."""
    if "ops" not in request.path.parts:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` selects
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if "ops" in item.path.parts and hasattr(item, "function") and _names_the_device(item.function.__code__):
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, none is present")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _names_the_device(code):
    """Whether a test, or a function inside it, reads ``helpers.DEVICE``: with a card there, it runs on the card."""
    inner = (const for const in code.co_consts if isinstance(const, type(code)))
    return "DEVICE" in code.co_names or any(map(_names_the_device, inner))
