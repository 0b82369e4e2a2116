"""The harness measures what it says, in the order it says; the CUDA half of it on a stand-in for ``torch.cuda``."""

import contextlib
import statistics
import time
from types import SimpleNamespace

import pytest
import torch

from pyvideo_kernels.benchmarks import backends, timing
from pyvideo_kernels.benchmarks.backends import CpuBackend, CudaBackend, last_level_cache
from pyvideo_kernels.benchmarks.timing import Rotation, Timing, Variant, interleaved

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


class FakeClock:
    """Time passes only when work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


class FakeBackend:
    """A device with graphs that writes down what is asked of it."""

    graphs = True

    def __init__(self, clock=None, cache=1 << 20, free=1 << 30):
        self.clock, self.log, self.cache, self.free = clock or FakeClock(), [], cache, free

    def cache_bytes(self):
        return self.cache

    def free_bytes(self):
        return self.free

    def warm(self, work):
        self.log.append("warm")
        work()

    def seconds(self, work):
        self.log.append("time")
        start = self.clock()
        work()
        return self.clock() - start

    def capture(self, work):
        self.log.append("capture")
        mark = len(self.log)
        kept = work()
        recorded = [entry for entry in self.log[mark:] if isinstance(entry, tuple)]
        del self.log[mark:]
        assert len({id(item) for item in kept}) == len(kept)  # no two outputs share memory

        def replay():
            self.log.append("replay")
            for _name, _at, seconds in recorded:
                self.clock.work(seconds)

        return replay

    def variant(self, name, seconds):
        def call(at):
            self.log.append((name, at, seconds))
            self.clock.work(seconds)
            return torch.empty(1)

        return call


# What is measured -----------------------------------------------------------------------------------------------------


def test_known_bytes_at_a_known_bandwidth_are_measured():
    clock, bandwidth = FakeClock(), 2e12

    def move(tensors):
        clock.work(sum(t.numel() * t.element_size() for t in tensors) / bandwidth)

    sets = [(torch.empty(1 << 16), torch.empty(1 << 14, dtype=torch.bfloat16)) for _ in range(5)]
    moved = (4 << 16) + (2 << 14)
    found = interleaved({"move": move}, sets, backend=CpuBackend(clock))["move"]
    assert moved / found.median == pytest.approx(bandwidth, rel=0.01) and found.spread == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("graph", [True, False])
def test_known_seconds_are_measured_with_and_without_a_graph(graph):
    backend = FakeBackend()
    each = timing.GRAPH_BELOW * (0.3 if graph else 3)
    found = interleaved({"a": backend.variant("a", each), "b": backend.variant("b", 2 * each)}, [0, 1, 2],
                        backend=backend)  # fmt: skip
    assert found["a"].median == pytest.approx(each, rel=0.01) and found["a"].graph is graph
    assert found["b"].median == pytest.approx(2 * each, rel=0.01)


def test_a_known_duration_is_measured_within_ten_percent():
    """Against what each call took by its own clock: a busy machine wakes a sleeper late."""
    spent = {"short": [], "long": []}

    def nap(name, seconds):
        start = time.perf_counter()
        time.sleep(seconds)
        spent[name].append(time.perf_counter() - start)

    variants = {"short": lambda: nap("short", 0.03), "long": lambda: nap("long", 0.06)}
    for name, found in interleaved(variants, device=CPU, rounds=5).items():
        assert found.rounds == 5 and len(spent[name]) == 7  # two calls before: to warm, and to choose the repeats
        assert found.median == pytest.approx(statistics.median(spent[name][2:]), rel=0.1)


def test_short_calls_are_repeated():
    clock, calls = FakeClock(), []

    def call():
        calls.append(1)
        clock.work(1e-3)

    found = interleaved({"a": call}, backend=CpuBackend(clock), rounds=3, min_seconds=0.02)["a"]
    assert len(calls) == 1 + 1 + 20 + 3 * 20 and found.median == pytest.approx(1e-3)


def test_a_rate_is_what_was_moved_by_the_clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: clock.work(source.numel() * 4 * 2 / 3e9))
    assert timing.copy_bandwidth(CPU, 1 << 12, CpuBackend(clock)) == pytest.approx(3e9, rel=0.01)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: clock.work(2 * len(a) ** 3 / 5e9))
    backend = CpuBackend(clock)
    backend.cache_bytes = lambda: 1 << 16
    assert timing.gemm_rate(CPU, torch.float32, 64, backend) == pytest.approx(5e9, rel=0.01)


def test_timing_of_is_robust_to_one_outlier():
    assert Timing.of([1.0, 1.0, 1.0, 1.0, 9.0]).median == 1.0
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).spread == 2.0


# In which order -------------------------------------------------------------------------------------------------------


def test_variants_take_turns_and_change_places():
    backend = FakeBackend()
    each = 2 * timing.GRAPH_BELOW
    variants = {name: backend.variant(name, each) for name in "abc"}
    interleaved(variants, [0], backend=backend, rounds=4)
    timed = [backend.log[i + 1][0] for i, entry in enumerate(backend.log) if entry == "time"]
    # Each is prepared by itself, timed twice; then come the rounds, of which the first does not count.
    assert "".join(timed) == "aabbcc" + "cba" + "abccbaabccba"


def test_a_slow_round_before_the_first_does_not_count():
    """On a device with graphs: the capture of one contender empties the allocator's cache for the next."""
    backend, emptied = FakeBackend(), [False]
    capture = backend.capture

    def empties(work):
        emptied[0] = True
        return capture(work)

    def allocates(_):
        backend.clock.work(2e-3 + 10 * emptied[0])
        emptied[0] = False

    backend.capture = empties
    variants = {"events": allocates, "graph": backend.variant("graph", 1e-4)}
    found = interleaved(variants, [0, 1], backend=backend, rounds=3)
    assert found["events"].median == pytest.approx(2e-3) and found["events"].spread == pytest.approx(0, abs=1e-9)


def test_sets_rotate_through_warm_up_and_rounds():
    backend = FakeBackend()
    interleaved({"a": backend.variant("a", 2 * timing.GRAPH_BELOW)}, [0, 1, 2], backend=backend, rounds=3)
    used = [entry[1] for entry in backend.log if isinstance(entry, tuple)]
    assert used == [i % 3 for i in range(len(used))] and len(used) > 30


def test_outputs_live_for_a_pass_and_no_longer():
    alive, most = set(), []

    class Output:
        def __init__(self):
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    clock = FakeClock()

    def call(_):
        clock.work(1e-3)
        return Output()

    interleaved({"a": call, "b": call}, list(range(4)), backend=CpuBackend(clock), rounds=3)
    # The new output is made while the old one of its set still stands, so it cannot have its memory.
    assert max(most) == 4 + 1 and not alive


def test_a_graph_is_warmed_captured_over_all_sets_and_replayed():
    backend = FakeBackend()
    found = interleaved({"a": backend.variant("a", 1e-4)}, [0, 1, 2, 3], backend=backend, rounds=3)["a"]
    log = backend.log
    at = log.index("capture")
    assert log[0] == "warm" and ("a", 0, 1e-4) == log[1]
    before = [entry for entry in log[:at] if isinstance(entry, tuple)]
    assert {entry[1] for entry in before} == {0, 1, 2, 3} and log[:at].count("warm") == 2
    # Afterwards the function is never called again: replays alone, once to warm, once to count, then the rounds.
    assert not [entry for entry in log[at:] if isinstance(entry, tuple)]
    assert log[at : at + 5] == ["capture", "warm", "replay", "time", "replay"]
    assert log[at + 5 :] == (["time"] + ["replay"] * 50) * (1 + 3)
    assert found.graph and found.median == pytest.approx(1e-4)


def test_the_recorded_pass_begins_with_the_first_set():
    """Wherever the estimate left off: a replay is one whole pass."""
    backend, seen = FakeBackend(), []
    capture = backend.capture

    def spy(work):
        seen.append([entry for entry in backend.log if isinstance(entry, tuple)][-1][1])
        start = len(backend.log)

        def recorded():
            kept = work()
            seen.append([entry[1] for entry in backend.log[start:] if isinstance(entry, tuple)])
            return kept

        return capture(recorded)

    backend.capture = spy
    interleaved({"a": backend.variant("a", 3e-4)}, [0, 1, 2, 3], backend=backend)
    assert seen[1] == [0, 1, 2, 3]


def test_a_call_that_cannot_be_recorded_is_timed_by_events_and_says_so():
    backend = FakeBackend()

    def capture(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")

    backend.capture = capture
    found = interleaved({"a": backend.variant("a", 1e-4)}, [0, 1], backend=backend, rounds=3)["a"]
    assert found.graph is False and found.median == pytest.approx(1e-4)
    assert found.why_no_graph == "RuntimeError: operation not permitted when stream is capturing"


def test_a_long_call_is_not_recorded():
    backend = FakeBackend()
    found = interleaved({"a": backend.variant("a", 1.5e-3)}, [0], backend=backend, rounds=3)["a"]
    assert "capture" not in backend.log and not found.graph and found.why_no_graph is None


def test_a_variant_with_its_own_sets():
    backend = FakeBackend()
    call = backend.variant("a", 2e-3)
    interleaved({"a": Variant(call, ["x", "y"]), "b": backend.variant("b", 2e-3)}, [0], backend=backend, rounds=3)
    assert {entry[1] for entry in backend.log if entry[0] == "a"} == {"x", "y"}
    assert {entry[1] for entry in backend.log if entry[0] == "b"} == {0}


def test_failures_are_handed_over_or_raised():
    backend, calls = FakeBackend(), []

    def at_once(_):
        raise ValueError("at once")

    def later(_):
        backend.clock.work(2e-3)
        calls.append(1)
        if len(calls) > 25:
            raise ValueError("later")

    variants = {"at once": at_once, "good": backend.variant("good", 2e-3), "later": later}
    failures = {}
    found = interleaved(variants, [0], backend=backend, failures=failures)
    assert list(found) == ["good"] and found["good"].rounds == 7
    assert {name: str(error) for name, error in failures.items()} == {"at once": "at once", "later": "later"}
    with pytest.raises(ValueError, match="at once"):
        interleaved(variants, [0], backend=backend)


def test_ctrl_c_is_no_failure():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleaved({"a": stop}, device=CPU, failures={})


# How many sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "outputs", "free", "variants", "sets", "capped"),
    [
        (3 << 20, 0, 1 << 40, 1, 34, None),  # 34 * 3 MiB > 100 MiB
        (3 << 20, 1 << 20, 1 << 40, 1, 26, None),
        (50 << 20, 0, 1 << 40, 1, 3, None),  # two would be twice the cache, and must exceed it
        (200 << 20, 0, 1 << 40, 1, 1, None),
        (3 << 20, 0, 30 << 20, 1, 10, "the memory at hand"),
        (3 << 20, 1 << 20, 70 << 20, 4, 10, "the memory at hand"),
        (200 << 20, 0, 1 << 20, 1, 1, None),
        (1 << 10, 0, 1 << 40, 1, 256, "at most 256 sets"),
    ],
)
def test_sets_outgrow_twice_the_cache(inputs, outputs, free, variants, sets, capped):
    found = Rotation.past_cache(inputs, outputs, FakeBackend(cache=50 << 20, free=free), variants)
    assert found.sets == sets
    assert (found.capped is None) if capped is None else (capped in found.capped and "50 MiB" in found.capped)


def test_the_last_cache_is_read_from_the_system(tmp_path):
    for index, (kind, level, size) in enumerate(
        [("Data", 1, "32K"), ("Instruction", 1, "64K"), ("Unified", 3, "24M"), ("Unified", 2, "1024K")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert last_level_cache(tmp_path) == 24 << 20
    assert last_level_cache(tmp_path / "nowhere") >= 1 << 15  # the C library's word, or a guess


# CudaBackend ----------------------------------------------------------------------------------------------------------


class FakeCuda:
    """What `CudaBackend` uses of ``torch.cuda``; a millisecond passes per piece of work."""

    def __init__(self, broken=None):
        self.log, self.now, self.current, self.broken = [], 0.0, "main", broken
        cuda = self

        class Stream:
            def __init__(self, device):
                self.device = device

            def wait_stream(self, other):
                cuda.log.append(f"side waits for {other.name}")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now
                cuda.log.append("record")

            def synchronize(self):
                cuda.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at

        class CUDAGraph:
            def replay(self):
                cuda.log.append("replay")

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    def device(self, device):
        assert device == GPU
        return contextlib.nullcontext()

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=50 << 20)

    def mem_get_info(self, device):
        assert self.log[-1] == "empty_cache"
        return 40 << 30, 80 << 30

    def empty_cache(self):
        self.log.append("empty_cache")

    def current_stream(self, device):
        name = self.current
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for side"))

    def set_stream(self, stream):
        self.current = stream.name
        self.log.append(f"current {stream.name}")

    def synchronize(self, device):
        self.log.append("synchronize")

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append("on side")
        yield
        self.log.append("off side")

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        assert isinstance(stream, self.Stream) and pool == (1, 2)
        self.log.append("begin")
        self.current = "side"
        try:
            yield
        finally:
            if self.broken:
                raise RuntimeError(self.broken)  # the end of a broken capture; the stream stays
            self.current = "main"
            self.log.append("end")

    def graph_pool_handle(self):
        return 1, 2

    def work(self):
        self.log.append("work")
        self.now += 1.0  # milliseconds, as events count
        return [torch.empty(1)]


def test_cuda_times_between_events_in_seconds():
    cuda = FakeCuda()
    assert CudaBackend(GPU, cuda).seconds(lambda: (cuda.work(), cuda.work())) == pytest.approx(2e-3)
    assert cuda.log == ["synchronize", "record", "work", "work", "record", "wait"]


def test_cuda_warms_up_on_the_stream_that_captures():
    cuda = FakeCuda()
    backend = CudaBackend(GPU, cuda)
    backend.warm(cuda.work)
    assert cuda.log == ["side waits for main", "on side", "work", "off side", "main waits for side", "synchronize"]
    cuda.log.clear()
    replay = backend.capture(cuda.work)
    assert cuda.log == ["begin", "work", "end"] and cuda.current == "main"
    replay()
    assert cuda.log[-1] == "replay"


def test_a_broken_capture_gives_the_stream_back_and_its_own_reason(monkeypatch):
    cuda = FakeCuda(broken="capture was invalidated")

    def synchronises():
        raise ValueError("a value was read on the host")

    ended = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: ended.append(args), raising=False)
    backend = CudaBackend(GPU, cuda)
    with pytest.raises(ValueError, match="read on the host"):
        backend.capture(synchronises)
    assert cuda.current == "main" and cuda.log[-2:] == ["current main", "synchronize"]
    assert ended == [(0, (1, 2))] and len(backend.broken) == 1
    # One that breaks without a Python error: the end's own.
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaBackend(GPU, FakeCuda(broken="capture was invalidated")).capture(lambda: [])


def test_cuda_knows_its_cache_and_memory():
    backend = CudaBackend(GPU, FakeCuda())
    assert backend.cache_bytes() == 50 << 20 and backend.free_bytes() == 20 << 30
    backend.cuda.get_device_properties = lambda device: SimpleNamespace()
    assert backend.cache_bytes() == backends._UNKNOWN_CACHE


def test_the_harness_runs_on_the_cuda_backend():
    cuda = FakeCuda()
    found = interleaved({"a": lambda _: cuda.work()}, [0, 1], backend=CudaBackend(GPU, cuda), rounds=3)["a"]
    assert found.median == pytest.approx(1e-3) and not found.graph


# Ceilings -------------------------------------------------------------------------------------------------------------


def test_ceilings_name_tf32(monkeypatch):
    """fp32 products are measured without TF32, and with it under its own name; the setting is given back."""
    seen = []

    def rate(device, dtype):
        seen.append((dtype, torch.get_float32_matmul_precision()))
        return float(len(seen))

    monkeypatch.setattr(timing, "gemm_rate", rate)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 7.0)
    before = torch.get_float32_matmul_precision()
    tops = timing.ceilings(GPU, torch.float16)
    assert torch.get_float32_matmul_precision() == before
    assert seen == [(torch.float16, "highest"), (torch.bfloat16, "highest"), (torch.float32, "highest"),
                    (torch.float32, "high")]  # fmt: skip
    assert tops == {
        "copy": 7.0, "gemm": 1.0, "gemms": {"float16": 1.0, "bfloat16": 2.0, "float32": 3.0, timing.TF32: 4.0},
    }  # fmt: skip
    assert list(timing.ceilings(CPU, torch.bfloat16)["gemms"]) == ["bfloat16"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_on_this_card_is_the_same_by_graph_and_by_events(monkeypatch):
    backend = CudaBackend(GPU)
    rotation = Rotation.past_cache(16 << 20, 16 << 20, backend)
    sets = [torch.randn(4 << 20, device=GPU) for _ in range(rotation.sets)]
    by_graph = interleaved({"copy": torch.Tensor.clone}, sets, backend=backend)["copy"]
    monkeypatch.setattr(timing, "GRAPH_BELOW", 0.0)
    by_events = interleaved({"copy": torch.Tensor.clone}, sets, backend=backend)["copy"]
    assert by_graph.graph and not by_events.graph
    assert by_graph.median <= by_events.median * 1.1

    def synchronises(x):
        return x.sum().item()

    refused = interleaved({"sum": synchronises}, sets, backend=backend)["sum"]
    assert not refused.graph
    again = interleaved({"copy": torch.Tensor.clone}, sets, backend=backend)["copy"]  # a broken capture left no trace
    assert again.median == pytest.approx(by_events.median, rel=0.1)
