"""The compiled CPU kernels with inputs, outputs and workspaces beside pages that are not there.

An access through a mask is invisible to AddressSanitizer, and one past a tensor usually finds memory all the same. Here
a child process places every tensor so that it ends, or begins, where a page is missing: a kernel that goes too far ends
the child. The allocations of outputs and workspaces go through the dispatcher, and are counted on the way.
"""

import ctypes
import itertools
import mmap
import os
import signal
import threading
import time

import pytest
import torch

from pyvideo_kernels import _native

if not _native.available():
    pytest.skip(f"no compiled extension: {_native.why_not()}", allow_module_level=True)
if not hasattr(os, "fork"):
    pytest.skip("needs os.fork", allow_module_level=True)

from tests.build.native_calls import DTYPES, NAMES, calls, changed, flat, large, same

PAGE = mmap.PAGESIZE
PROT_NONE = 0
# Name, whether the path for AVX-512 may be taken, and the cache's size: 0 for results that are written past it.
PATHS = (("avx512", True, -1), ("avx512, past the cache", True, 0), ("any CPU", False, -1))
# A step of the sampler takes what the model and the sampler leave, contiguous; anything else is copied first.
COPYING = ("guidance_step", "unipc_step")


class Fenced:
    """Memory for tensors, each between two pages that may not be touched."""

    def __init__(self, at_end):
        self.at_end = at_end
        self.mappings = []
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect
        self.protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def empty(self, shape, stride, dtype):
        """An unwritten tensor that ends where a page is missing, or begins there; filled with 0xff, NaN as a float."""
        span = extent(shape, stride)
        size = max(span * dtype.itemsize, 1)
        pages = -(-size // PAGE)
        mapping = mmap.mmap(-1, (pages + 2) * PAGE)
        self.mappings.append(mapping)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        for fence in (start, start + (pages + 1) * PAGE):
            assert self.protect(fence, PAGE, PROT_NONE) == 0, os.strerror(ctypes.get_errno())
        at = start + (pages + 1) * PAGE - size if self.at_end else start + PAGE
        ctypes.memset(start + PAGE, 0xFF, pages * PAGE)
        if span == 0:
            return torch.empty_strided(shape, stride, dtype=dtype)
        flat = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=dtype)
        return flat.as_strided(shape, stride)

    def put(self, t):
        """A copy of ``t``, its strides kept."""
        return moved(t, self.empty(t.shape, t.stride(), t.dtype))


def extent(shape, stride):
    """Elements from the first to the last of a tensor, both included."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride))


def moved(source, target):
    """``target``, of the same strides, with the bytes of ``source``; torch's own copy goes past the end of some."""
    size = extent(source.shape, source.stride()) * source.element_size()
    ctypes.memmove(target.data_ptr(), source.data_ptr(), size)
    return target


def ordinary(t):
    return moved(t, torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))


def contiguous_strides(shape):
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(n, 1))
    return strides[: len(shape)]


class Allocations:
    """While entered, what the dispatcher allocates on the CPU comes from ``fenced``, and is counted."""

    def __init__(self, fenced):
        self.fenced, self.made, self.on = fenced, [], False
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("new_empty", self.new_empty, "CPU", allow_override=True)
        self.library.impl("empty.memory_format", self.empty, "CPU", allow_override=True)

    def new_empty(self, like, size, *, dtype=None, layout=None, device=None, pin_memory=None):
        return self.empty(size, dtype=dtype or like.dtype)

    def empty(self, size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        size = list(size)
        if not self.on:
            return torch.empty_strided(size, contiguous_strides(size), dtype=dtype)
        self.made.append((size, dtype))
        return self.fenced.empty(size, contiguous_strides(size), dtype)

    def __enter__(self):
        self.made.clear()
        self.on = True
        return self

    def __exit__(self, *_):
        self.on = False


def in_child(work, seconds=60):
    """Runs ``work(say)`` in a forked child: how it ended, and the last line that it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            torch.set_num_threads(1)  # torch's OpenMP runtime does not survive a fork
            work(lambda text: os.write(write, f"{text}\n".encode()))
            status = 0
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    os.close(write)
    said = bytearray()
    reader = threading.Thread(target=lambda: said.extend(open(read, "rb").read()))
    reader.start()
    until = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    reader.join()
    code = os.waitstatus_to_exitcode(ended[1])
    return code, (said.decode().strip().splitlines() or [""])[-1]


def check(found, at_end):
    """Every call on every path, fenced: equal to the ordinary one, and allocating the outputs and one workspace."""
    extension, _ = _native._load()

    def work(say):
        fenced = Fenced(at_end)
        allocations = Allocations(fenced)
        for (path, allowed, cache), call in itertools.product(PATHS, found):
            extension.allow_avx512(allowed)
            extension.assume_cache_bytes(cache)
            expected = call()
            args = tuple(changed(arg, fenced.put) for arg in call.args)
            label = f"{call.label}, {path}"
            say(label)
            with allocations:
                got = call(args)
            assert same([ordinary(t) for t in got], expected), f"{label}: not the values of an ordinary call"
            most = (0 if call.in_place else len(got)) + 1
            if call.name in COPYING:
                most += sum(not t.is_contiguous() for t in flat(args))
            made = allocations.made
            assert len(made) <= most, f"{label} allocates {len(made)} tensors, over {most}: {made}"

    code, last = in_child(work)
    assert code == 0, f"{'ended by ' + signal.Signals(-code).name if code < 0 else 'failed'} at: {last}"


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_touched_beside_a_tensor(name, dtype, at_end):
    check([call for call in (large(name, dtype), *calls(name, dtype)) if call is not None], at_end)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
def test_the_fence_ends_a_child_that_goes_too_far(at_end):
    def reads(say):
        t = Fenced(at_end).empty([3, 5], [5, 1], torch.bfloat16)
        say("inside")
        step = t.numel() * t.element_size() if at_end else -1
        ctypes.string_at(t.data_ptr() + step, 1)
        say("outside")

    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer would report this access, as it should")
    code, last = in_child(reads)
    assert (code, last) == (-signal.SIGSEGV, "inside")


def test_allocations_of_a_kernel_are_seen():
    x = torch.randn(3, 40)

    def work(say):
        allocations = Allocations(Fenced(True))
        with allocations:
            out = _native.rms_norm(x, None, 1e-6)
        say(f"{allocations.made} {out.data_ptr() % PAGE == PAGE - 480}")

    assert in_child(work) == (0, "[([3, 40], torch.float32)] True")
