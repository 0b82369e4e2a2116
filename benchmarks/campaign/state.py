"""What a campaign has done so far: ``campaign.json`` beside the results, rewritten after every slice."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyvideo_kernels.error_types import ValueOptionError

from .. import results
from .slices import Slice
from .worker import DRY

FILE = "campaign.json"


class State:
    """Status of each slice by name.

    Args:
        out: folder of the results.
        where: what names the machine in the slices' keys.
        fresh: forget what an earlier campaign has done here.
    Raises:
        ValueOptionError: the folder's state is not one, or is of another kind of run (dry and real do not mix).
    """

    def __init__(self, out: Path, where: Mapping[str, Any], *, dry: bool, fresh: bool) -> None:
        self.path, self.out, self.where, self.dry = out / FILE, out, dict(where), dry
        self.slices: dict[str, dict[str, Any]] = {}
        found = self._read()
        if found is not None and bool(found.get(DRY)) != dry:
            kinds = ("a dry campaign", "a real one")
            raise ValueOptionError(f"{out} holds {kinds[dry]}, this is {kinds[not dry]}; give another --out")
        if found is not None and not fresh:
            self.slices = found["slices"]

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            found = json.loads(self.path.read_text())
            if not isinstance(found["slices"], dict):
                raise TypeError("`slices` is no object")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueOptionError(f"{self.path}: not the state of a campaign ({error}); remove it") from None
        return dict(found)

    def record(self, name: str, *, status: str, key: str = "", seconds: float = 0.0, summary: str = "",
               red: int = 0, tail: str = "") -> None:  # fmt: skip
        """Note how a slice ended, on disk."""
        before = self.slices.get(name, {})
        same = before.get("key") == key
        entry: dict[str, Any] = {
            "status": status,
            "key": key,
            "seconds": round(seconds, 1),
            "summary": summary,
            "attempts": (before.get("attempts", 0) if same else 0) + (status == "failed"),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if red:
            entry["red"] = red
        if tail and status != "done":
            entry["tail"] = tail
        self.slices[name] = entry
        content = {"schema": results.SCHEMA, "kind": "campaign", "where": self.where, "slices": self.slices}
        results.write(self.path, content | ({DRY: True} if self.dry else {}))

    def status(self, each: Slice, *, keep: bool) -> str:
        """``"done"``, ``"stale"`` (measured with other sources), ``"failed"`` (with these) or ``"left"``."""
        entry = self.slices.get(each.name)
        if entry is None or entry["status"] not in ("done", "failed"):
            return "left"
        current = entry["key"] == each.key(self.where)
        if entry["status"] == "failed":
            return "failed" if current else "left"
        if not (self.out / f"{each.name}.json").is_file():
            return "left"
        return "done" if current or keep else "stale"

    def attempts(self, each: Slice) -> int:
        """How often it failed with the present sources."""
        entry = self.slices.get(each.name, {})
        return int(entry.get("attempts", 0)) if entry.get("key") == each.key(self.where) else 0

    def estimate(self, each: Slice) -> float:
        """Seconds it will take: what it took here, else the plan's guess."""
        entry = self.slices.get(each.name, {})
        return float(entry["seconds"]) if entry.get("status") == "done" else each.seconds

    def least(self, each: Slice) -> float:
        """Seconds without which it is not started; more than what was not enough before, if it starts anew."""
        if each.least is not None:
            return each.least
        entry = self.slices.get(each.name, {})
        return max(self.estimate(each), 1.5 * entry["seconds"] if entry.get("status") == "left" else 0.0)

    def table(self, plan: Iterable[Slice], *, keep: bool) -> tuple[list[str], dict[str, int]]:
        """One line a slice, and how many there are of each status."""
        lines, counts = [], dict.fromkeys(("done", "stale", "failed", "left", "skipped", "red"), 0)
        for each in plan:
            entry = self.slices.get(each.name, {})
            status = "skipped" if entry.get("status") == "skipped" else self.status(each, keep=keep)
            counts[status] += 1
            counts["red"] += bool(entry.get("red")) and status in ("done", "stale")
            took = f"{entry['seconds']:.0f} s" if status in ("done", "stale", "failed") else f"~{each.seconds:.0f} s"
            what = entry.get("summary", "")
            mark = "RED " if entry.get("red") and status in ("done", "stale") else ""
            lines.append(f"{status:8}{each.name:44}{took:>8}  {mark}{what}".rstrip())
        return lines, counts
