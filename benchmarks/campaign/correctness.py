"""What of an op is right on this card: its canaries, and its test file run by pytest in this process, as rows."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyvideo_kernels import verdicts
from pyvideo_kernels.schemas import OPS

TESTS = Path(__file__).resolve().parents[2] / "tests" / "ops"
# Test files beyond an op's own.
_MORE = {
    "unipc_step": ("test_schedule.py",),
    "block_sparse_attention": ("test_video_sparse_attention.py",),
}
# After one of these nothing that this process runs on the card means anything.
_FATAL = ("illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert",
          "CUDA error: an illegal instruction", "uncorrectable")  # fmt: skip


class Rows:
    """A pytest plugin: a row a test, and an end to the session where the card's state is lost.

    Args:
        op: the op under test.
        on_card: the tests marked ``gpu``; else a few that run anywhere, to walk the same path.
    """

    def __init__(self, op: str, on_card: bool) -> None:
        self.op, self.on_card = op, on_card
        self.rows: dict[str, dict[str, Any]] = {}
        self.lost: str | None = None

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        if not self.on_card:
            chosen = [item for item in items if self._anywhere(item)][:1]
            config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
            items[:] = chosen

    @staticmethod
    def _anywhere(item: Any) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return "impl" in params and "dtype" in params and params["impl"] != "cuda" and "gpu" not in item.keywords

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            row = {"op": self.op, "test": item.nodeid.rpartition("::")[2]}
            row |= {name: str(params[name]).removeprefix("torch.") for name in ("impl", "dtype") if name in params}
            self.rows[item.nodeid] = row | {"outcome": "not run", "seconds": 0.0}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        print(nodeid, flush=True)  # if this one takes the process down, its name is the last line

    def pytest_runtest_logreport(self, report: Any) -> None:
        row = self.rows[report.nodeid]
        row["seconds"] = round(row["seconds"] + report.duration, 3)
        if report.when == "call" or report.outcome != "passed":
            row["outcome"] = "failed" if report.failed else report.outcome
            if not report.passed:
                row["message"] = message(report)
                if report.failed and any(text in str(report.longrepr) for text in _FATAL):
                    self.lost = row["test"]

    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        if self.lost is None:
            return None
        self.rows[item.nodeid]["message"] = f"the card's state was lost in {self.lost}"
        return True


def message(report: Any) -> str:
    """Why a test failed or was skipped, in a line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")[:300]
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())[:300]


def compile_ahead(op: str, device: torch.device, seconds: float = 90.0, workers: int | None = None) -> int:
    """Have every sample of an op compiled by all cores, into Triton's disk cache; how many launches were.

    The canaries and the tests launch some hundred variants of an attention. Compiled one by one as they are launched,
    they take minutes of the card's time. What does not compile here says so where it is launched.

    Args:
        seconds: after so many the rest is left to the launches.
        workers: processes that compile; None: one a core but one.
    """
    from pyvideo_kernels import dispatch, verify

    from ..tune.launches import Job, samples_of, shared_compiler

    arch = dispatch.arch_of(device)
    jobs = [
        Job(launch, arch)
        for name in names_of(op)
        if "triton" in OPS[name].impls
        for dtype in verify.DTYPES
        for head_dim in ((*dispatch.HEAD_DIMS, None) if OPS[name].heads is not None else (None,))
        for launch in samples_of(name, dtype, head_dim)
    ]
    compiler = shared_compiler((os.cpu_count() or 2) - 1 if workers is None else workers)
    return len(compiler.compile(jobs, time.monotonic() + seconds))


def names_of(op: str) -> list[str]:
    """An op, its in-place twin and their backwards."""
    return [name for name in OPS if name.removesuffix("_backward").rstrip("_") == op]


def canary_rows(op: str, device: torch.device) -> list[dict[str, Any]]:
    """`verify.canaries` of an op, its twin and their backwards; off a card, of what runs there in a moment."""
    from pyvideo_kernels import dispatch, verify

    names = names_of(op)
    if device.type == "cuda":
        compile_ahead(op, device)
        return [row.as_dict() for row in verify.canaries(device, ops=names)]
    heads = dispatch.HEAD_DIMS[:1]
    return [
        verify.canary(
            OPS[name], impl, device, torch.float32, heads[0] if OPS[name].heads is not None else None
        ).as_dict()
        for name in names
        for impl in OPS[name].impls
        if impl not in ("reference", "triton", "cuda")
    ]


def shown(canary: dict[str, Any]) -> dict[str, Any]:
    """A canary in the form of a test's row."""
    outcome = {True: "passed", False: "failed", None: "skipped"}[canary["ok"]]
    row = {name: canary[name] for name in ("op", "impl", "dtype", "head_dim") if canary[name] is not None}
    return row | {"test": "canary", "outcome": outcome} | ({"message": canary["error"]} if canary["error"] else {})


def judged(canaries: Sequence[dict[str, Any]], tests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The canaries for `verdicts.commit`: one is right only if no test of its implementation and dtype is red.

    A red test that does not say what it tested speaks against all of them.
    """
    red = [(row.get("impl"), row.get("dtype")) for row in tests if row["outcome"] in ("failed", "not run")]

    def against(row: dict[str, Any]) -> bool:
        return any(impl in (None, row["impl"]) and dtype in (None, row["dtype"]) for impl, dtype in red)

    checked = (row for row in canaries if row["ok"] is not None and verdicts.needs_check(row["impl"]))
    return [{**row, "ok": row["ok"] and not against(row)} for row in checked]


def test_rows(op: str, *, on_card: bool) -> list[dict[str, Any]]:
    """Run an op's test files.

    Args:
        on_card: the tests marked ``gpu``; else one that runs anywhere.
    Returns:
        Rows ``{"op", "test", "impl", "dtype", "outcome": "passed"|"failed"|"skipped"|"not run", "seconds",
        "message"}``.
    Raises:
        RuntimeError: the files could not be collected.
    """
    import pytest

    plugin = Rows(op, on_card)
    names = dict.fromkeys((f"test_{op}.py", f"test_{op.rstrip('_')}.py"))
    files = [str(TESTS / name) for name in (*names, *_MORE.get(op, ())) if (TESTS / name).is_file()]
    if not files:  # its tests are among another op's
        return []
    code = pytest.main([*files, "-q", "-p", "no:cacheprovider", *(["-m", "gpu"] if on_card else [])], plugins=[plugin])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest {', '.join(files)}: {pytest.ExitCode(code).name.lower()}")
    return list(plugin.rows.values())
