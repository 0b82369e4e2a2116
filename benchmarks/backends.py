"""What a device gives the harness: a clock, its cache, its free memory and, on a GPU, graphs.

The harness (`timing`) decides what is called when; a backend only carries it out. Tests put in a backend of their own
and read off the order.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

_UNKNOWN_CACHE = 64 << 20


class Backend(Protocol):
    """A device, as far as timing is concerned."""

    graphs: bool
    """Whether `capture` is worth trying."""

    def cache_bytes(self) -> int:
        """Size of the last cache before memory."""
        ...

    def free_bytes(self) -> int:
        """Memory that a measurement may fill with inputs and outputs."""
        ...

    def warm(self, work: Callable[[], Any]) -> None:
        """Run ``work`` untimed and wait for it."""
        ...

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long the device took for ``work``, from its start to its end."""
        ...

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """``work`` recorded as a graph; the value replays it. Raises where ``work`` cannot be recorded."""
        ...


class CpuBackend:
    """Wall time.

    Args:
        clock: seconds since whenever; tests bring one that they move by hand.
    """

    graphs = False

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def cache_bytes(self) -> int:
        return last_level_cache()

    def free_bytes(self) -> int:
        # A machine in use has less than all of it to spare, and a swapping one measures its disk.
        return min(_available_memory() // 4, 4 << 30)

    def warm(self, work: Callable[[], Any]) -> None:
        work()

    def seconds(self, work: Callable[[], Any]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        raise NotImplementedError("a CPU has no graphs")


class CudaBackend:
    """CUDA events and graphs (HIP's under ROCm).

    Args:
        device: a CUDA device.
        cuda: ``torch.cuda``; tests bring one that records what is done with it.
    """

    graphs = True

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.broken: list[Any] = []
        # Warm-up and capture share one side stream, so that what a library keeps per stream (workspaces, handles)
        # exists before the capture begins.
        with cuda.device(device):
            self.stream = cuda.Stream(device)

    def cache_bytes(self) -> int:
        return int(getattr(self.cuda.get_device_properties(self.device), "L2_cache_size", 0)) or _UNKNOWN_CACHE

    def free_bytes(self) -> int:
        self.cuda.empty_cache()  # what earlier rows left to the allocator is free for this one
        free, _total = self.cuda.mem_get_info(self.device)
        return int(free) // 2

    def warm(self, work: Callable[[], Any]) -> None:
        with self.cuda.device(self.device):
            current = self.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with self.cuda.stream(self.stream):
                work()
            current.wait_stream(self.stream)
            self.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        with self.cuda.device(self.device):
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self.cuda.synchronize(self.device)
            start.record()
            work()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        with self.cuda.device(self.device):
            before = self.cuda.current_stream(self.device)
            graph, pool = self.cuda.CUDAGraph(), self.cuda.graph_pool_handle()
            try:
                with self.cuda.graph(graph, pool=pool, stream=self.stream):
                    # What the calls return stays alive until all are recorded: freed earlier, one output's memory
                    # would serve the next, which then is written to a warm cache.
                    kept = work()
            except Exception as error:
                self._clean_up(graph, pool, before)
                # The end of a broken capture raises too, and hides what broke it.
                raise (error.__context__ if isinstance(error.__context__, Exception) else error) from None
            del kept  # the graph's own pool holds the memory
            return graph.replay  # type: ignore[no-any-return]

    def _clean_up(self, graph: Any, pool: Any, before: Any) -> None:
        """After a broken capture, whose end raises before it has undone its beginning."""
        self.cuda.set_stream(before)
        # The allocator would go on asking this graph, at every capture to come, whether an allocation is its own.
        self.broken.append(graph)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
        self.cuda.synchronize(self.device)


def backend_for(device: torch.device) -> Backend:
    """The backend of a device."""
    if device.type != "cuda":
        return CpuBackend()
    return CudaBackend(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))


def last_level_cache(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the CPU's last cache: as Linux tells, else the C library, else a guess that is large enough."""
    sizes = []
    for index in root.glob("index*"):
        try:
            if (index / "type").read_text().strip() != "Instruction":
                sizes.append((int((index / "level").read_text()), _bytes((index / "size").read_text())))
        except (OSError, ValueError):
            continue
    if sizes:
        return max(sizes)[1]
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        try:
            if (size := os.sysconf(name)) > 0:
                return size
        except (AttributeError, OSError, ValueError):
            continue
    return _UNKNOWN_CACHE


def _bytes(text: str) -> int:
    """``32768K`` as a number."""
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
    return int(text[:-1]) * unit if unit else int(text)


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 8 << 30
