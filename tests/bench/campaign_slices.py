"""Slices for the campaign's tests: each does one thing to its process. Without torch they start at once."""

import json
import os
import signal
import sys
import time

from pyvideo_kernels.benchmarks.campaign.worker import Outcome


def good(job):
    print("hello from a good slice")
    job.out.write_text(json.dumps({"pid": os.getpid()}))
    return Outcome("fine", job.parameters.get("red", 0))


def raises(job):
    raise RuntimeError(f"CUDA error: an illegal memory access was encountered in {__file__}")


def exits(job):
    print("the last words", flush=True)
    os._exit(3)


def killed(job):
    os.kill(os.getpid(), signal.SIGKILL)


def quits(job):
    sys.exit("not a crash, not a result")


def hangs(job):
    print("waiting for a kernel that never ends", flush=True)
    time.sleep(600)


def goes_on(job):
    """Needs three turns."""
    turns = job.out.parents[1] / "turns"
    turn = 1 + int(turns.read_text() if turns.exists() else 0)
    turns.write_text(str(turn))
    job.out.write_text("{}")
    return Outcome(f"turn {turn}", unfinished=turn < 3)


def writes_and_fails(job):
    """As a kernel's error that is noticed when all is done."""
    good(job)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
