"""A test file of an op, run by pytest in this process, as rows: what was tested, and how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def test_rows(path: Path, op: str, *, on_card: bool) -> list[dict[str, Any]]:
    """Run one test file.

    Args:
        on_card: the tests marked ``gpu``; else one that runs anywhere.
    Returns:
        Rows ``{"op", "test", "impl", "dtype", "outcome": "passed"|"failed"|"skipped"|"not run", "seconds",
        "message"}``.
    Raises:
        RuntimeError: the file could not be collected.
    """
    import pytest

    plugin = Rows(op, on_card)
    arguments = [str(path), "-q", "-p", "no:cacheprovider", *(["-m", "gpu"] if on_card else [])]
    code = pytest.main(arguments, plugins=[plugin])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest {path.name}: {pytest.ExitCode(code).name.lower()}")
    return list(plugin.rows.values())
