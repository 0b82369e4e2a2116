"""A decoder's layers, and the seconds that each takes: marks before and after, in a decode of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..e2e.clips import Clock


def layers_of(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The decoder's convolutions, residual blocks, attentions and resamplers, in the order in which they are defined.

    Lists of blocks and the blocks that hold such lists are opened; what is left is a layer.
    """

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, nn.ModuleList) or any(isinstance(part, nn.ModuleList) for part in child.children()):
                yield from walk(path, child)
            elif any(True for _ in child.parameters()):
                yield path, child

    yield from walk("", decoder)


class LayerTimes:
    """Times the layers of ``vae`` for as long as it is open; a layer inside another is part of it.

    Norms that stand by themselves are left out of a decoder whose forwards call them with another's arguments: what is
    in no layer is in ``rest``.
    """

    def __init__(self, vae: Any, clock: Clock) -> None:
        self.clock = clock
        self.marks: dict[str, list[tuple[Any, Any]]] = {}
        self._hooks: list[Any] = []
        parts = [("post_quant_conv", getattr(vae, "post_quant_conv", None)), *layers_of(vae.decoder)]
        self.parts = {path: part for path, part in parts if part is not None}

    def __enter__(self) -> LayerTimes:
        for path, part in self.parts.items():
            began: list[Any] = []

            def before(module: Any, args: Any, kwargs: Any, began: list[Any] = began) -> None:
                began.append(self.clock.mark())

            def after(
                module: Any, args: Any, kwargs: Any, out: Any, path: str = path, began: list[Any] = began
            ) -> None:
                self.marks.setdefault(path, []).append((began.pop(), self.clock.mark()))

            self._hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(part.register_forward_hook(after, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def rows(self, total: float) -> list[dict[str, Any]]:
        """Name, calls and seconds of each layer, and of what is in none; the clock must have been synchronised."""
        out: list[dict[str, Any]] = [
            {"layer": path, "calls": len(marks), "seconds": sum(self.clock.seconds(*pair) for pair in marks)}
            for path, marks in ((path, self.marks.get(path, [])) for path in self.parts)
            if marks
        ]
        inside = sum(row["seconds"] for row in out)
        return [*out, {"layer": "rest", "calls": 1, "seconds": max(total - inside, 0.0)}]
