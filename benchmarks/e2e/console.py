"""What ``bench e2e`` shows while it runs and at the end, on stderr: lines everywhere, a table where rich is."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from ..report import tables


class Console:
    """Lines for the events of ``e2e.run``."""

    def __init__(self, rounds: int, stream: Any = None) -> None:
        self.rounds = rounds
        self.stream = stream or sys.stderr
        self.done: Counter[str] = Counter()

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def show(self, name: str, facts: dict[str, Any]) -> str:
        """Show an event; returns what is going on now, for the message of an interruption."""
        if name == "load":
            self.say(f"{facts['model']} in {facts['dtype']} on {facts['device']}")
            return "loading"
        if name == "note":
            self.say(facts["text"])
            return "loading"
        if name == "loaded":
            settings = facts["settings"]
            text = settings["text_seconds"]
            told = f"; the prompt took {tables.number(text)} s and is not timed again" if text is not None else ""
            self.say(f"{tables.clip(settings)}, {settings['tokens']} tokens{told}")
            return "the first clips"
        variant, entry = facts["variant"], facts["entry"]
        if name == "failed":
            self.say(f"{variant}: {facts['error']}")
            return "the first clips" if not self.done else "the rounds"
        if name == "warm":
            self.say(f"{variant}: first clip {tables.number(entry.first)} s{_quality(entry.facts['quality'])}")
            for note in entry.facts["notes"]:
                self.say(f"{variant}: {note}")
            return "the first clips"
        if name == "round":
            self.done[variant] += 1
            clip = entry.clips[-1]
            took = f"denoise {tables.number(clip.denoise)} s"
            took += "" if clip.decode is None else f", decode {tables.number(clip.decode)} s"
            self.say(f"{variant}: clip {self.done[variant]} of {self.rounds}, {took}")
            return "the rounds"
        return "the breakdown"

    def table(self, result: dict[str, Any]) -> None:
        """The result."""
        try:
            from rich.console import Console as Rich

            width = None if self.stream.isatty() else 160
            Rich(file=self.stream, width=width).print(tables.rich_table(result))
        except ImportError:
            self.say(tables.markdown(result))
        for sentence in result["statements"]:
            self.say(sentence)


def _quality(quality: dict[str, Any]) -> str:
    psnr = quality.get("psnr", {}).get("min")
    return "" if psnr is None else f", at least {psnr:.1f} dB to eager's video"
