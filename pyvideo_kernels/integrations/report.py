"""What accelerate() did: a table, a dict, and counts of what really ran."""

from __future__ import annotations

import collections
import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import dispatch
from ..attention_choice import ranges
from ..ops import attention_libraries
from .swap import Plan, Settings, Swap, fallbacks, seen

if TYPE_CHECKING:
    from .upfront import Checked


class Report:
    """What runs now in an accelerated target, what was left and why, and which implementations really ran.

    ``str(report)`` and ``rich.print(report)`` show the table; ``to_dict()`` is the same as data. ``calls()`` and
    ``fallbacks()`` count since accelerate() returned; ``calls()`` counts for the whole process, so other users of the
    ops appear in it too, and replays of a CUDA graph in neither.
    """

    def __init__(self, target: str, plan: Plan, settings: Settings, checked: Iterable[Checked] = ()) -> None:
        self.target = target
        self._plan = plan
        self._settings = settings
        self._before = dispatch.calls()
        self._first = [row for row in checked if row.op == attention_libraries.OP and row.trusted]

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for runs through our ops."""
        return not self._plan.left

    def calls(self) -> dict[str, dict[str, int]]:
        """op -> implementation -> how often it ran since accelerate(), in this process."""
        out: dict[str, dict[str, int]] = {}
        for (op, impl), count in sorted(dispatch.calls().items()):
            new = count - self._before.get((op, impl), 0)
            if new > 0:
                out.setdefault(op, {})[impl] = new
        return out

    def attention_kernels(self) -> list[str]:
        """The libraries behind the dense attention in ``calls()``: ``cuDNN 9.15.1, ... (bfloat16, head_dim 128, ...)``.

        Before the first call: what is going to serve it on this card, ours included.
        """
        ran = self.calls().get(attention_libraries.OP, {})
        if ran:
            return attention_libraries.served(tuple(ran))
        choice = self._settings.attention
        if choice is None or not (
            choice.base.dense or choice.dense_steps or any(x.dense for x in choice.layers.values())
        ):
            return []
        planned = (attention_libraries.planned(row.impl, row.device, row.dtype, row.head_dim) for row in self._first)
        return list(dict.fromkeys(planned))

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """op -> reason -> how often a call went to the stock code instead, in this target."""
        return fallbacks(self._settings)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data, one entry a module."""
        modules: dict[str, dict[str, Any]] = {}

        def entry(path: str) -> dict[str, Any]:
            return modules.setdefault(path, {"runs": [], "left": {}})

        for swap in self._plan.swaps:
            attention, notes = self._attention(swap), {"note": swap.note} if swap.note else {}
            entry(swap.path).update({"runs": list(swap.ops)} | notes | ({"attention": attention} if attention else {}))
        for left in self._plan.left:
            entry(left.path)["left"][left.op] = left.reason
        return {
            "target": self.target,
            "ops": sorted(self._settings.ops),
            "attention": None if self._settings.attention is None else self._settings.attention.to_dict(),
            "impl": self._settings.impl,
            "complete": self.complete,
            "modules": modules,
            "kept": dict(self._plan.kept),
            "calls": self.calls(),
            "attention_kernels": self.attention_kernels(),
            "fallbacks": self.fallbacks(),
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """``(modules, state, what)`` with the modules of all blocks on one line; what the table shows."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for swap in self._plan.swaps:
            what = "; ".join(part for part in (", ".join(swap.ops), self._attention(swap), swap.note) if part)
            groups.setdefault((_pattern(swap.path), "runs", what), []).append(swap.path)
        for left in self._plan.left:
            groups.setdefault((_pattern(left.path), "left", f"{left.op}: {left.reason}"), []).append(left.path)
        alike = collections.Counter(pattern for pattern, _, _ in groups)
        out = [
            (_label(pattern if alike[pattern] == 1 else _of_blocks(pattern, paths), paths), state, what)
            for (pattern, state, what), paths in groups.items()
        ]
        return out + [(path, "stock", reason) for path, reason in self._plan.kept]

    def _attention(self, swap: Swap) -> str:
        """What an attention module runs, in tokens once it was called; empty for other modules."""
        choice = self._settings.attention
        if choice is None or swap.attention is None or swap.attention.op not in swap.ops:
            return ""
        return choice.note(swap.attention, seen(self._settings))

    def _counts(self) -> list[str]:
        lines = []
        for op, impls in self.calls().items():
            lines.append(f"{op}: " + ", ".join(f"{impl} {count}" for impl, count in impls.items()))
        lines += [f"{attention_libraries.OP}, dense: {kernel}" for kernel in self.attention_kernels()]
        for op, reasons in self.fallbacks().items():
            lines.append(f"{op}: fell back " + ", ".join(f"{count} x {reason}" for reason, count in reasons.items()))
        return lines

    @property
    def _title(self) -> str:
        swapped, left = len(self._plan.swaps), len(self._plan.left)
        return f"{self.target}: {swapped} modules swapped, {left} left, impl {self._settings.impl}"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(title=self._title, title_justify="left")
        table.add_column("module", overflow="fold")
        table.add_column("state")
        table.add_column("what runs, or why not", overflow="fold")
        style = {"runs": "green", "left": "yellow", "stock": "dim"}
        for module, state, what in self.rows():
            table.add_row(module, f"[{style[state]}]{state}[/]", what)
        return Group(table, *self._counts())

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return self.plain()
        out = io.StringIO()
        Console(file=out, width=120, color_system=None).print(self)
        return out.getvalue().rstrip()

    def plain(self) -> str:
        """The table without rich."""
        rows = self.rows()
        width = max((len(module) for module, _, _ in rows), default=0)
        lines = [self._title, *(f"  {module:<{width}}  {state:<5}  {what}" for module, state, what in rows)]
        return "\n".join(lines + ["  " + line for line in self._counts()])

    def __repr__(self) -> str:
        return f"<Report {self._title}>"


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _of_blocks(pattern: str, paths: list[str]) -> str:
    """The pattern with the numbers of its blocks, where other blocks do something else."""
    numbers = {int(match[1]) for path in paths if (match := re.search(r"\.(\d+)(?=\.|$)", path))}
    return pattern.replace(".*", f".{ranges(numbers)}", 1) if numbers else pattern


def _label(pattern: str, paths: list[str]) -> str:
    return f"{pattern} ({len(paths)})" if len(paths) > 1 else paths[0] or "(the model)"
