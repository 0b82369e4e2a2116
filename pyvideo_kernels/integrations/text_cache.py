"""What a model computes from its prompt alone, kept for the steps of one film.

The prompt's embeddings are the same in every denoising step, and so are the text projection and each block's keys and
values of the cross-attention. Only the loop that owns the embeddings knows that they do not change, so nothing is kept
unless a loop says so:

    with text_cache(prompt, negative):
        for t in timesteps:
            ...

Inside, a swapped forward that asks ``once`` for something made of these very tensors, or of what was made of them,
gets what it made in the first step: the same numbers, for nothing is rounded anew. It is kept by module, so two experts
have their own, and made again where a weight was changed, moved or replaced. At the end of the block everything goes,
also after an error or Ctrl-C. Where a hook or somebody else's layer takes part, and inside compiled graphs, nothing is
kept: they may do something else in each step.

Pipelines pad a prompt of a few words to 512 rows, all zeros, and the models attend to them. Rows that are equal have
equal keys and values, and softmax counts them alike: n of them are one with log(n) added to its scores. So on a CPU,
where attention takes such a mask at no cost, the cross-attention is computed on as many rows as there are words. That
is the same sum of fewer terms, with a smaller error.
"""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .packing import managed, watched
from .swap import mark_of

_T = TypeVar("_T")
_ROWS = 16
# Of this thread: another one may sample another film with the same model.
_active: contextvars.ContextVar[TextCache | None] = contextvars.ContextVar("pyvideo_text_cache", default=None)


class TextCache:
    """What was made of tensors that do not change. The tensors are held, so that no other gets their ``id``."""

    def __init__(self, *constants: Tensor | None) -> None:
        self._constants: dict[int, Tensor] = {}
        # (module, kind, inputs) by identity -> the module, its weights when it was made, what was made.
        self._made: dict[tuple[int, ...], tuple[Any, tuple[Any, ...], Any]] = {}
        self._given = tuple(tensor for tensor in constants if tensor is not None)
        self._words: dict[int, int] = {}
        self.clear()

    def clear(self) -> None:
        """Forget what was made; the given tensors stay constants."""
        self._made.clear()
        self._words.clear()
        self._constants = {id(tensor): tensor for tensor in self._given}

    def words(self, text: Tensor) -> int:
        """How many rows of a constant ``[B, S, D]`` come before those that all equal the last one."""
        known = self._words.get(id(text))
        if known is None:
            differ = (text != text[:, -1:]).any(-1).any(0).nonzero()
            known = self._words[id(text)] = int(differ.max()) + 1 if len(differ) else 0
        return known

    @property
    def bytes(self) -> int:
        """What is kept beside the given tensors."""
        given = {id(tensor) for tensor in self._given}
        return sum(x.numel() * x.element_size() for key, x in self._constants.items() if key not in given)

    def once(
        self, module: nn.Module, inputs: Sequence[Tensor], layers: Sequence[Any], make: Callable[[], _T], kind: int
    ) -> _T:
        """See the function of this name."""
        if torch.is_grad_enabled():
            return make()
        constants = self._constants
        for tensor in inputs:
            if id(tensor) not in constants:
                return make()
        weights = _weights(layers)
        if weights is None:
            return make()
        key = (id(module), kind, *(id(tensor) for tensor in inputs))
        present = self._made.get(key)
        if present is not None and present[1] == weights:
            kept: _T = present[2]
            return kept
        made = make()
        parts: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
        constants.update((id(part), part) for part in parts if isinstance(part, Tensor))
        self._made[key] = module, weights, made
        return made


def once(
    module: nn.Module, inputs: Sequence[Tensor], layers: Sequence[Any], make: Callable[[], _T], *, kind: int = 0
) -> _T:
    """``make()``; where a `text_cache` is open and all ``inputs`` are constants of it, what it made the first time.

    Args:
        module: whose forward asks; it makes one thing of a ``kind`` of the same inputs.
        inputs: all tensors that ``make`` reads beside weights.
        layers: the modules that ``make`` calls. All below them must be as torch, diffusers or this package has it.
        make: gives a tensor or a tuple of tensors and None, and does nothing else.
    """
    cache = _current()
    return make() if cache is None else cache.once(module, inputs, layers, make, kind)


def _current() -> TextCache | None:
    return None if torch.compiler.is_compiling() else _active.get()


def by_rows(made: Tensor, source: Tensor) -> Tensor:
    """``made``, whose rows were made of the last rows of ``source`` one by one: equal rows stayed equal."""
    cache = _current()
    if cache is None or source.device.type != "cpu":
        return made  # rows are counted where `shortened` asks for it
    if id(source) in cache._constants and id(made) in cache._constants:
        cache._words[id(made)] = made.shape[1] - source.shape[1] + cache.words(source)
    return made


def shortened(text: Tensor, start: int = 0) -> tuple[int, Tensor | None]:
    """How many rows of ``text[:, start:]`` stand for all of them, and what to add to their scores; all, None: each one.

    The padding among the rows that are kept counts for all of it, each row of it for as many others. The mask is fp32
    also where the attention is in bf16: log(n) in bf16 would be n within a percent.
    """
    total = text.shape[1] - start
    cache = _current()
    if cache is None or start < 0 or text.device.type != "cpu" or id(text) not in cache._constants:
        return total, None
    words = max(cache.words(text) - start, 0)
    # Attention on whole vectors is faster than on fewer rows.
    kept = -(-(words + 1) // _ROWS) * _ROWS
    if kept >= total:
        return total, None
    mask = torch.zeros(1, 1, 1, kept, dtype=torch.promote_types(text.dtype, torch.float32))
    mask[..., words:] = math.log((total - words) / (kept - words))
    return kept, mask


@contextmanager
def text_cache(*constants: Tensor | None) -> Iterator[TextCache]:
    """While this is open, models keep what they make of ``constants``, which must not change meanwhile."""
    cache = TextCache(*constants)
    token = _active.set(cache)
    try:
        yield cache
    finally:
        _active.reset(token)
        cache._given = ()
        cache.clear()


def _weights(layers: Sequence[nn.Module]) -> tuple[Any, ...] | None:
    """What tells the weights below ``layers`` from other or changed ones; None where a layer may change its mind."""
    out: list[Any] = []
    for root in layers:
        for layer in root.modules() if root._modules else (root,):
            kind: Any = type(layer)
            if not _stock(kind) or managed(layer) or watched(layer):
                return None
            if "forward" in layer.__dict__ and mark_of(layer) is None:
                return None  # somebody's own
            if layer.training and isinstance(layer, nn.Dropout):
                return None
            for weight in layer._parameters.values():
                if weight is None:
                    continue
                if type(weight) is not nn.Parameter:
                    return None
                out.append((weight.data_ptr(), None if weight.is_inference() else weight._version))
    return tuple(out)


@functools.cache
def _stock(kind: Any) -> bool:
    """Whether a layer is one of torch's or of diffusers' models, whose forward is a function of inputs and weights."""
    return kind.__module__.startswith(("torch.nn.modules.", "diffusers.models."))
