"""From what a user wrote for ``attention=`` to an ``AttentionChoice``: every key and number checked. Torch-free.

As text, for the command line and the benchmarks' variants:

    none | dense | int8 | fp8 | KEY=VALUE,...        e.g. window=0.5x0.5x0.5,dense_steps=4,dense_layers=2

============  ==================================================  ===================================================
key           as text                                             in a mapping
============  ==================================================  ===================================================
window        9x15x26 tokens, 0.5x1.0x1.0 of the axes (with a     three numbers, or one row of three a head
              point), rows for heads joined by /
stride        1x2x2: queries that share a window                  three integers
top_k         32 tiles, or 0.2 of them                            a number
share         0.9 of the attention mass                           a number
tile          4x4x4 tokens (the default)                          three integers
precision     int8, fp8, native                                   a name
dense_layers  2: the first two blocks; 0+1+29, 0-3+29: those      a number, or a collection of indices
dense_steps   4: the first four steps; 0.1 of them                a number
layers                                                            {index, range or "20-29": what those blocks run}
============  ==================================================  ===================================================
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from typing import Any, NoReturn

from .attention_choice import DENSE, AttentionChoice, LayerAttention, Size, Triple
from .error_types import ValueOptionError, did_you_mean

PRECISIONS = ("int8", "fp8")
NAMES = ("none", "dense", *PRECISIONS)
_KINDS = ("window", "top_k", "share")
_LAYER_KEYS = ("window", "stride", "top_k", "share", "tile", "precision")
_EXCEPTIONS = ("dense_layers", "dense_steps", "layers")
KEYS = (*_LAYER_KEYS, *_EXCEPTIONS)
# A share is held as a fraction, exactly up to here.
_DENOMINATOR = 10**6


def choose(value: Any, where: str = "`attention`") -> AttentionChoice | None:
    """The choice that ``value`` spells: None, a name, text, a mapping, or a choice.

    Raises:
        ValueOptionError: names the key, what it takes and what came, after ``where``.
    """
    if value is None or isinstance(value, AttentionChoice):
        return value
    if isinstance(value, str):
        value = _read(value.strip(), where)
        if value is None:
            return None
    if not isinstance(value, Mapping):
        _bad(where, _forms(), value)
    return _choice(value, where)


def _forms() -> str:
    keys = ", ".join(key for key in KEYS if key != "layers")
    return f"one of dense, {', '.join(PRECISIONS)}, none, or KEY=VALUE,... with {keys}"


def _bad(where: str, expected: str, got: object) -> NoReturn:
    raise ValueOptionError(f"{where} must be {expected}; got {got!r}")


# Text -----------------------------------------------------------------------------------------------------------


def _read(text: str, where: str) -> dict[str, Any] | None:
    """Text as a mapping; None for "none"."""
    if text == "none":
        return None
    out: dict[str, Any] = {}
    for number, part in enumerate(text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and number == 0 and key in NAMES[1:]:
            out["precision"] = key if key in PRECISIONS else "native"
            continue
        if not equals and number == 0:
            raise ValueOptionError(f"{where} must be {_forms()}; got {text!r}{did_you_mean(key, (*NAMES, *KEYS))}")
        if key not in KEYS or key == "layers":
            raise _unknown(where, key, text)
        if key in out:
            raise ValueOptionError(f"{where}: `{key}` is given twice in {text!r}")
        out[key] = _VALUES[key](value, f"{where}: `{key}`")
    return out


def _unknown(where: str, key: str, given: object) -> ValueOptionError:
    known = [name for name in KEYS if name != "layers"] if isinstance(given, str) else KEYS
    return ValueOptionError(
        f"{where}: there is no key {key!r}{did_you_mean(str(key), known)}; there are {', '.join(known)}; got {given!r}"
    )


def _text_number(text: str, where: str) -> int | float:
    if re.fullmatch(r"\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        _bad(where, "a number: tokens, tiles or steps, or with a point a share of them", text)


def _text_sizes(text: str, where: str) -> list[Any]:
    return [_text_number(part.strip(), where) for part in re.split("[x×]", text)]


def _text_rows(text: str, where: str) -> list[Any]:
    rows = [_text_sizes(row, where) for row in text.split("/")]
    return rows if len(rows) > 1 else rows[0]


def _text_layers(text: str, where: str) -> int | list[int]:
    return int(text) if re.fullmatch(r"\d+", text) else _text_indices(text, where)


def _text_indices(text: str, where: str) -> list[int]:
    out: list[int] = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            _bad(where, "a number of blocks, or indices as in 0+1+29 or 0-3+29", text)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            _bad(where, "ranges that go up, as in 0-3", text)
        out += range(first, last + 1)
    return out


_VALUES: dict[str, Any] = {
    "window": _text_rows,
    "stride": _text_sizes,
    "tile": _text_sizes,
    "top_k": _text_number,
    "share": _text_number,
    "precision": lambda text, where: text,
    "dense_layers": _text_layers,
    "dense_steps": _text_number,
}


# Mappings -------------------------------------------------------------------------------------------------------


def _choice(given: Mapping[Any, Any], where: str) -> AttentionChoice:
    for key in given:
        if key not in KEYS:
            raise _unknown(where, key, dict(given))
    own = {key: given[key] for key in given if key in _LAYER_KEYS}
    if not own and "layers" not in given:
        _bad(where, "something to make an exception from: give window, top_k, share or precision", dict(given))
    base = _layer(own, where) if own else DENSE
    layers = _dense_layers(given.get("dense_layers", 0), f"{where}: `dense_layers`")
    overrides = given.get("layers", {})
    if not isinstance(overrides, Mapping):
        _bad(f"{where}: `layers`", "a mapping from block indices to what they run", overrides)
    for key, value in overrides.items():
        at = f"{where}: `layers` {key!r}"
        layer = _single(value, at)
        for index in _indices(key, at):
            if index in layers:
                raise ValueOptionError(f"{where}: block {index} is named twice in `layers` and `dense_layers`")
            layers[index] = layer
    steps = _size(given.get("dense_steps", 0), f"{where}: `dense_steps`", "steps", least=0)
    if base.dense and "layers" not in given and (layers or steps != 0):
        raise ValueOptionError(f"{where}: dense attention needs no dense_layers and dense_steps; got {dict(given)!r}")
    return AttentionChoice(base, layers, steps)


def _single(value: Any, where: str) -> LayerAttention:
    """What some layers run: no exceptions of their own."""
    chosen = choose(value, where)
    if chosen is None or chosen.layers or chosen.dense_steps != 0:
        _bad(where, "what these blocks run, without dense_layers, dense_steps and layers", value)
    return chosen.base


def _layer(given: Mapping[str, Any], where: str) -> LayerAttention:
    kinds = [key for key in _KINDS if given.get(key) is not None]
    if len(kinds) > 1:
        raise ValueOptionError(f"{where}: `{kinds[0]}` and `{kinds[1]}` exclude each other; got both")
    for key, needs in (("stride", ("window",)), ("tile", ("top_k", "share"))):
        if given.get(key) is not None and not set(needs) & set(kinds):
            raise ValueOptionError(f"{where}: `{key}` goes with {' or '.join(needs)}; got {dict(given)!r}")
    precision = given.get("precision") or "native"
    if precision not in ("native", *PRECISIONS):
        hint = did_you_mean(str(precision), PRECISIONS)
        raise ValueOptionError(f"{where}: `precision` must be native, {', '.join(PRECISIONS)}; got {precision!r}{hint}")
    if precision != "native" and kinds and kinds != ["window"]:
        raise ValueOptionError(f"{where}: `precision` {precision} goes with window or alone; got {dict(given)!r}")
    window = _window(given["window"], f"{where}: `window`") if "window" in kinds else ()
    stride = _triple(given.get("stride") or (1, 1, 1), f"{where}: `stride`")
    for row in window:
        if any(isinstance(size, int) and s > size for s, size in zip(stride, row, strict=True)):
            _bad(f"{where}: `stride`", f"at most the window {row} along each axis", stride)
    share = None
    if "share" in kinds:
        share = _number(given["share"], f"{where}: `share`", "a share of the attention mass, above 0 and at most 1")
        if not 0 < share <= 1:
            _bad(f"{where}: `share`", "a share of the attention mass, above 0 and at most 1", share)
        share = float(share)
    return LayerAttention(
        window=window,
        stride=stride,
        top_k=_size(given["top_k"], f"{where}: `top_k`", "tiles") if "top_k" in kinds else None,
        share=share,
        tile=_tile(given.get("tile") or (4, 4, 4), f"{where}: `tile`"),
        precision=precision,
    )


def _window(value: Any, where: str) -> tuple[tuple[Size, Size, Size], ...]:
    rows = _items(value)
    if not rows:
        _bad(where, "(time, height, width), or one such row a head", value)
    if _is_number(rows[0]):
        rows = [rows]
    out = []
    for row in rows:
        sizes = _items(row)
        if len(sizes) != 3:
            _bad(where, "three sizes (time, height, width), or one such row a head", value)
        t, h, w = (_size(size, where, "tokens") for size in sizes)
        out.append((t, h, w))
    return tuple(out)


def _triple(value: Any, where: str) -> Triple:
    items = _items(value)
    if len(items) != 3 or any(not _is_number(n) or n != int(n) or n < 1 for n in items):
        _bad(where, "three integers (time, height, width) of at least 1", value)
    t, h, w = (int(n) for n in items)
    return t, h, w


def _tile(value: Any, where: str) -> Triple:
    tile = _triple(value, where)
    if tile[0] * tile[1] * tile[2] not in (64, 128):
        _bad(where, "64 or 128 tokens in all", tile)
    return tile


def _size(value: Any, where: str, unit: str, least: int = 1) -> Size:
    """An integer is a count; a float is a share, in (0, 1]."""
    expected = f"{unit}, an integer of at least {least}, or a share of them, a float above 0 and at most 1"
    number = _number(value, where, expected)
    if isinstance(number, int):
        if number < least:
            _bad(where, expected, value)
        return number
    if not 0 < number <= 1:
        _bad(where, expected, value)
    share = Fraction(number).limit_denominator(_DENOMINATOR)
    return (share.numerator, share.denominator) if share else (1, _DENOMINATOR)


def _number(value: Any, where: str, expected: str) -> int | float:
    if not _is_number(value):
        _bad(where, expected, value)
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _items(value: Any) -> list[Any]:
    """The items of a sequence, array or tensor; none of a string or a number."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) else []


def _dense_layers(value: Any, where: str) -> dict[int, LayerAttention]:
    expected = "a number of blocks, or a collection of their indices"
    if isinstance(value, str):
        value = _text_layers(value, where)
    if isinstance(value, Collection) and not isinstance(value, Mapping):
        indices = list(value)
    elif _is_number(value) and isinstance(value, numbers.Integral) and int(value) >= 0:
        indices = list(range(int(value)))
    else:
        _bad(where, expected, value)
    return dict.fromkeys(_checked(indices, where, expected, value), DENSE)


def _indices(key: Any, where: str) -> list[int]:
    """The blocks that a key of ``layers`` names."""
    if isinstance(key, str):
        key = _text_indices(key, where)
    items = [key] if isinstance(key, numbers.Integral) else _items(key)
    return _checked(items, where, "an index, a range, a tuple of indices, or text as in '20-29'", key)


def _checked(indices: list[Any], where: str, expected: str, given: Any) -> list[int]:
    for index in indices:
        if not isinstance(index, numbers.Integral) or isinstance(index, bool) or index < 0:
            _bad(where, expected, given)
    return [int(index) for index in indices]
