"""The compiled CPU kernels called from several threads at once, from autograd, in inference mode, and after a fork.

Results are those of a call alone, bit for bit. These tests run under ThreadSanitizer too (tests/build/sanitize.py).
"""

import os
import threading
import time

import pytest
import torch

from pyvideo_kernels import _native

if not _native.available():
    pytest.skip(f"no compiled extension: {_native.why_not()}", allow_module_level=True)

from tests.build.native_calls import DTYPES, NAMES, calls, large, same

CALLERS, TIMES = 4, 3


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def at_once(*work):
    """Runs every function in a thread of its own, all released together; raises what one of them raised."""
    gate, errors = threading.Barrier(len(work)), []

    def run(function):
        try:
            gate.wait(timeout=60)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a call did not return"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_calls_at_once_with_inputs_and_threads_of_their_own(name, dtype):
    alone = [(call, call()) for call in (large(name, dtype), *calls(name, dtype)) if call is not None]

    def caller(number):
        def work():
            # A number of torch's threads that is this caller's: it is kept by thread.
            torch.set_num_threads(1 + number % 3)
            for turn in range(TIMES):
                for i in range(len(alone)):
                    # Callers start at different calls, and meet at the same ones.
                    call, expected = alone[(i + number * turn) % len(alone)]
                    assert same(call(call.copies()), expected), call.label

        return work

    at_once(*map(caller, range(CALLERS)))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_")])
def test_calls_at_once_with_the_same_inputs(name):
    for dtype in DTYPES:
        call = large(name, dtype) or calls(name, dtype)[0]
        expected = call()

        def work(call=call, expected=expected):
            for _ in range(TIMES):
                assert same(call(), expected), call.label

        at_once(*[work] * CALLERS)


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_and_no_grad_give_the_same(name):
    for call in calls(name, torch.float32):
        expected = call()
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert same(call(), expected), call.label


def test_backward_calls_kernels_in_the_threads_of_autograd():
    calls_of = {name: (call := calls(name, torch.float32)[0], call()) for name in NAMES}
    used = set()

    class Through(torch.autograd.Function):
        """Its backward calls the kernels, then a backward inside: past some depth autograd goes on in other threads."""

        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            used.add(threading.get_ident())
            if ctx.depth in (0, 70):
                for call, expected in calls_of.values():
                    assert same(call(), expected), call.label
            if ctx.depth:
                with torch.enable_grad():
                    inner = torch.ones(1, requires_grad=True)
                    Through.apply(inner, ctx.depth - 1).backward()
            return grad, None

    Through.apply(torch.ones(1, requires_grad=True), 70).backward()
    assert len(used) > 1, "autograd stayed in one thread"
    at_once(*[lambda: Through.apply(torch.ones(1, requires_grad=True), 0).backward()] * 3)


def test_a_forked_child_calls_kernels_with_one_thread():
    # What torch itself promises after its threads were used: its OpenMP runtime does not survive a fork, so a child
    # asks for one thread first, as torch's DataLoader does in its workers.
    found = [
        (call, call()) for name in NAMES for call in (large(name, torch.float32), *calls(name, torch.float32)) if call
    ]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            status = 0 if all(same(call(), expected) for call, expected in found) else 2
        finally:
            os._exit(status)
    until = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.05)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended[0] == child, "the child hangs"
    assert os.waitstatus_to_exitcode(ended[1]) == 0
