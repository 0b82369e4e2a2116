"""A process that runs slices one after the other, and what its parent sees of it.

The parent writes one JSON line a slice to the worker's standard input and reads one JSON line back from a pipe of
their own; what the slice prints goes to a log, whose tail is kept when it fails. A worker that dies, hangs or reports
a failure is replaced: after an illegal memory access nothing of a CUDA process can be trusted.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL = 3000
"""Characters of a failed slice's output that are kept."""
RUNNING = ".running"
"""Folder beside the results in which a slice writes its own; it moves up when the slice has ended well."""
DRY = "dry"
"""Key of a result that was walked on tiny shapes; no table takes one."""


@dataclass(frozen=True)
class Job:
    """One slice to run.

    Args:
        out: its result file, while it runs.
        device: ``"cuda"`` or ``"cpu"``.
        dry: tiny shapes, and the result says so.
        parameters: what the plan says.
        seconds: after so many it is stopped.
    """

    out: Path
    device: str
    dry: bool
    parameters: Mapping[str, Any]
    seconds: float

    def result(self, kind: str, rows: Iterable[Mapping[str, Any]] = (), **more: Any) -> dict[str, Any]:
        """A result of this machine."""
        import torch

        from pyvideo_kernels.benchmarks import results

        where = results.provenance(torch.device(self.device))
        head = {"schema": results.SCHEMA, "kind": kind, "provenance": where, "settings": dict(self.parameters)}
        return {**head, "ceilings": {}, **more, "rows": list(rows)}

    def write(self, result: dict[str, Any]) -> None:
        """The result file; marked where it is dry."""
        from pyvideo_kernels.benchmarks import results

        results.write(self.out, {DRY: True, **result} if self.dry else result)


@dataclass(frozen=True)
class Outcome:
    """One line on what was found, how many rows of it are wrong, and whether another turn has more to find."""

    summary: str
    red: int = 0
    unfinished: bool = False


@dataclass(frozen=True)
class Answer:
    """How a slice ended.

    Args:
        status: ``"done"``; ``"left"``: it stopped by itself and goes on another time; ``"failed"``; ``"stopped"``: its
            time was up.
        summary: one line: what was found, or why it failed.
        red: how many of its rows are wrong.
        tail: the end of its output, for one that failed.
    """

    status: str
    summary: str
    red: int = 0
    tail: str = ""


class Process:
    """A worker for slices of one group.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        environment: added to this process's environment.
    """

    def __init__(self, device: str, environment: Mapping[str, str] | None = None) -> None:
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        receive, send = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "benchmarks.campaign.worker", str(send), device],
                cwd=ROOT,
                env=os.environ | dict(environment or {}),
                stdin=subprocess.PIPE,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                pass_fds=(send,),
                start_new_session=True,  # its children (compilers, pytest) end with it
                text=True,
            )
        finally:
            os.close(send)
        self.answers = receive
        self.usable = True

    def run(self, request: Mapping[str, Any], seconds: float) -> Answer:
        """One slice; returns when it is over or ``seconds`` are. After a failure the worker is gone."""
        start = os.fstat(self.log.fileno()).st_size
        line: bytes | None = b""
        try:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died; the pipe that it answers on says so too
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            line = self._read(time.monotonic() + seconds)
        except BaseException:
            self.close()
            raise
        if line is None:
            self.close()
            return Answer("stopped", f"stopped after {seconds:.0f} s", tail=self._tail(start))
        if not line.endswith(b"\n"):
            code = self._wait()
            self.close()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Answer("failed", f"the process died ({how})", tail=self._tail(start))
        answer = json.loads(line)
        if answer["status"] == "failed":
            answer["tail"] = self._tail(start)
            self.close()
        return Answer(**answer)

    def _read(self, until: float) -> bytes | None:
        """The worker's line; without its newline if the worker ended; None when the time is up."""
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.answers], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            read = os.read(self.answers, 65536)
            if not read:
                break
            line += read
        return line

    def _wait(self) -> int:
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it closed the pipe and lives on
            return 0

    def _tail(self, start: int) -> str:
        size = os.fstat(self.log.fileno()).st_size
        data = os.pread(self.log.fileno(), TAIL, max(start, size - TAIL))
        # It is kept in a file that is committed: where this checkout lies is nobody's business.
        return data.decode(errors="replace").strip().replace(f"{ROOT}{os.sep}", "")

    def close(self) -> None:
        """End the worker and whatever it has started."""
        if not self.usable:
            return
        self.usable = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a kernel that hangs can hold its process for a while
            self.process.wait(timeout=20)
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        os.close(self.answers)


# The worker's side -----------------------------------------------------------------------------------------------


def serve(send: int, device: str) -> None:
    """Run what standard input asks for until it ends. Torch is imported by the slices that need it."""
    for line in sys.stdin:
        request = json.loads(line)
        module, _, function = request.pop("run").partition(":")
        try:
            final = Path(request.pop("out"))
            # What fails at the end must not leave a result that looks like one.
            job = Job(final.parent / RUNNING / final.name, device, **request)
            job.out.parent.mkdir(parents=True, exist_ok=True)
            job.out.unlink(missing_ok=True)
            outcome = getattr(importlib.import_module(module), function)(job)
            if device == "cuda":
                import torch

                torch.cuda.synchronize()  # an error of a kernel that was only launched is this slice's own
                torch.cuda.empty_cache()
            if job.out.exists():
                os.replace(job.out, final)
            status = "left" if outcome.unfinished else "done"
            answer = {"status": status, "summary": outcome.summary, "red": outcome.red}
        except BaseException as error:
            traceback.print_exc()
            text = " ".join(str(error).split()).replace(f"{ROOT}{os.sep}", "")
            answer = {"status": "failed", "summary": f"{type(error).__name__}: {text}"[:300]}
        sys.stdout.flush()
        os.write(send, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    # By its installed name: the slices import this module too, and must find the same classes.
    from pyvideo_kernels.benchmarks.campaign import worker

    os.set_inheritable(int(sys.argv[1]), False)  # a child of ours must not keep the parent waiting
    worker.serve(int(sys.argv[1]), sys.argv[2])
