"""What a registered shape launches: the Triton call of an op at real sizes, what it asks of the configurations, and
what the compiler makes of it, with tensors on a device or on none (meta).

`Compiler` compiles such launches in worker processes, for an architecture that need not be here. Triton's disk cache
keeps what it made, so that the process that runs them finds them compiled.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyvideo_kernels import dispatch
from pyvideo_kernels.configs import forced_arch, forced_config, shared_memory_limit
from pyvideo_kernels.configs.tuned import Asked, Key, recording
from pyvideo_kernels.errors import UnsupportedError, ValueOptionError
from pyvideo_kernels.schemas import NAMESPACE, OPS
from pyvideo_kernels.testing import static
from pyvideo_kernels.testing.compare import move, samples

from ..registry import ENTRIES, weight_of

_SAMPLE, _HEAD_DIM = "sample ", " of head_dim "
META = torch.device("meta")


@dataclass(frozen=True)
class Launch:
    """One call of an op's Triton implementation.

    Args:
        op: name in ``schemas.OPS``, backward ops too.
        shape: a GPU shape of the registry, or ``"sample N"`` of the oracle's own, ``"sample N of head_dim D"``.
        dtype: ``"bfloat16"``, …
    """

    op: str
    shape: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"

    def args(self, device: torch.device) -> tuple[Any, ...]:
        """Random arguments in schema order, without ``impl``."""
        dtype, op = getattr(torch, self.dtype), OPS[self.op]
        if self.shape.startswith(_SAMPLE):
            index, _, head_dim = self.shape.removeprefix(_SAMPLE).partition(_HEAD_DIM)
            found = list(samples(op, dtype, head_dim=int(head_dim) if head_dim else None))[int(index)]
            return tuple(move(value, device) for value in op.bind(**found))
        entry = ENTRIES[self.op.removesuffix("_backward")]
        if self.shape not in entry.gpu:
            raise ValueOptionError(f"{self.op}: no registered shape {self.shape!r}; there are {', '.join(entry.gpu)}")
        inputs = entry.inputs(**entry.gpu[self.shape], dtype=dtype, device=device)
        with torch.no_grad(), _Capture(entry.op) as captured:
            entry.ours(**inputs)
        args: tuple[Any, ...] = captured.args
        return args if entry.op == self.op else _with_gradients(entry.op, args)

    def run(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Launch; the outputs as a tuple."""
        out = dispatch.load(OPS[self.op], "triton")(*args)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    def weight(self) -> float:
        """How much work it is, for choosing the smallest of several: bytes, or FLOPs for the products."""
        if self.shape.startswith(_SAMPLE):
            return 0.0
        entry = ENTRIES[self.op.removesuffix("_backward")]
        return entry.flops(**entry.gpu[self.shape]) or float(weight_of(self.args(META)))


class _Capture(TorchDispatchMode):
    """Takes down the arguments of one op, and answers with its fake: nothing is computed."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.args: tuple[Any, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name == f"{NAMESPACE}::{self.op}":
            self.args = tuple(args[:-1])
            return OPS[self.op].fake(*args)
        return func(*args, **(kwargs or {}))


def _with_gradients(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the backward: random gradients of what the forward returns, every gradient wanted."""
    op = OPS[name]
    named = dict(zip(op.arguments, args, strict=False))
    if "return_lse" in named:
        named["return_lse"] = True  # what a backward stands on, as the public function asks for where one follows
    args = tuple(named.values())
    needs = [named[argument] is not None for argument in op.differentiable]
    first = next(arg for arg in args if isinstance(arg, Tensor))
    # A backward that is given the forward's outputs needs the real ones: of random ones it would make infinities.
    forward = dispatch.load(op, "triton") if op.saves_outputs and first.device != META else op.fake
    found = forward(*args) if forward is not op.fake else op.fake(*args, "triton")
    outputs = list(found) if isinstance(found, (tuple, list)) else [found]
    grads = [torch.randn(out.shape, device=out.device).to(out.dtype) for out in outputs]
    if op.saves_outputs:
        # Those beside the first are statistics, which no loss looks at.
        return [grads[0], *[None] * (len(grads) - 1)], outputs, *args, needs
    return grads, *args, needs


def samples_of(op: str, dtype: torch.dtype, head_dim: int | None = None) -> list[Launch]:
    """The oracle's own samples of an op, as launches; ``head_dim`` as for `samples`."""
    name = str(dtype).removeprefix("torch.")
    of = f"{_HEAD_DIM}{head_dim}" if head_dim is not None else ""
    return [
        Launch(op, f"{_SAMPLE}{index}{of}", name) for index, _ in enumerate(samples(OPS[op], dtype, head_dim=head_dim))
    ]


def launches_of(op: str, device: torch.device, dtype: torch.dtype) -> list[Launch]:
    """What is tuned of an op: every registered GPU shape, forward and backward; on a CPU the oracle's first sample."""
    name = str(dtype).removeprefix("torch.")
    if op not in ENTRIES:
        raise ValueOptionError(f"tune: `op` must be one of {', '.join(ENTRIES)}; got {op!r}")
    # What an in-place op asks for, its out-of-place twin asks for too.
    ops = [] if ENTRIES[op].in_place else [each for each in (op, f"{op}_backward") if each in OPS]
    ops = [each for each in ops if "triton" in OPS[each].impls]
    if device.type != "cuda":
        return [Launch(each, f"{_SAMPLE}0", name) for each in ops]
    return [Launch(each, shape, name) for each in ops for shape in ENTRIES[op].gpu]


def asked(launch: Launch, arch: str) -> list[Asked]:
    """What a launch asks of the configurations on ``arch``, and what the rules answer; nothing is compiled or run."""
    with forced_arch(arch), recording() as found, _nothing_launched():
        launch.run(launch.args(META))
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def _nothing_launched() -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    before = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]
    for kind, _ in before:
        kind.run = lambda self, *args, **kwargs: None  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for kind, run in before:
            kind.run = run  # type: ignore[method-assign]


# Compiling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A launch to compile, with one configuration in place; without a ``family`` as rules have it."""

    launch: Launch
    arch: str
    family: str = ""
    key: Key = ()
    config: Any = None


@dataclass(frozen=True)
class Compiled:
    """What came of a job: readings of its kernels, or why there are none."""

    readings: tuple[static.Reading, ...] = ()
    error: str | None = None

    def misfit(self, arch: str) -> str | None:
        """Why it is not worth running, in one word a reason; None: it fits."""
        if self.error is not None:
            return "refused" if self.error.startswith(UnsupportedError.__name__) else "compiler"
        if any(r.shared > shared_memory_limit(arch) for r in self.readings):
            return "shared memory"
        return "spills" if any(r.spills or r.stack for r in self.readings) else None


def compile_job(job: Job) -> Compiled:
    """Compile in this process, which must not be one where Triton interprets."""
    try:
        forced = forced_config(job.family, job.config, **dict(job.key)) if job.family else contextlib.nullcontext()
        with static.compiling_for(job.arch) as kernels, forced:
            job.launch.run(job.launch.args(META))
        return Compiled(tuple(static.read(kernel, job.arch) for kernel in kernels))
    except Exception as error:
        return Compiled(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}")


def _start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    # A context on the card for each of sixteen compilers would be gigabytes.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


class Compiler:
    """Worker processes that compile jobs; a configuration that takes the compiler down takes no other with it."""

    def __init__(self, workers: int) -> None:
        self.workers = max(1, workers)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._futures: dict[Job, concurrent.futures.Future[Compiled]] = {}

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the processes; what was not begun is dropped."""
        self._futures.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def rest(self) -> None:
        """Forget what nobody has asked for; processes that are still at it are left, and others start when needed."""
        if all(future.done() for future in self._futures.values()):
            self._futures.clear()
        else:
            self.stop()

    def _start(self, workers: int) -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def ahead(self, jobs: Sequence[Job]) -> None:
        """Begin with jobs that will be asked for: they compile while the device is timed."""
        self._pool = self._pool or self._start(self.workers)
        # A pool that has broken says so where results are asked for.
        with contextlib.suppress(BrokenProcessPool):
            for job in jobs:
                if job not in self._futures:
                    self._futures[job] = self._pool.submit(compile_job, job)

    def compile(self, jobs: Sequence[Job], until: float | None = None) -> dict[Job, Compiled]:
        """What came of each job; jobs that ``until`` (a `time.monotonic`) leaves no time for are missing."""
        self.ahead(jobs)
        futures = {self._futures.pop(job): job for job in dict.fromkeys(jobs) if job in self._futures}
        out: dict[Job, Compiled] = {}
        broken = len(futures) < len(set(jobs))
        left = None if until is None else max(0.0, until - time.monotonic())
        with contextlib.suppress(concurrent.futures.TimeoutError):
            for future in concurrent.futures.as_completed(futures, left):
                try:
                    out[futures[future]] = future.result()
                except BrokenProcessPool:
                    broken = True
        for future in futures:
            future.cancel()
        if broken:
            # Some compiler died and its pool with it. Each of these jobs gets a process of its own to die in.
            self.stop()
            for job in (job for job in jobs if job not in out):
                if until is not None and time.monotonic() > until:
                    break
                with self._start(1) as alone:
                    try:
                        out[job] = alone.submit(compile_job, job).result()
                    except BrokenProcessPool:
                        out[job] = Compiled(error="the compiler crashed")
        return out


@functools.cache
def shared_compiler(workers: int) -> Compiler:
    """One for all that this process tunes and checks: its workers take longer to start than a small op to compile."""
    return Compiler(workers)
