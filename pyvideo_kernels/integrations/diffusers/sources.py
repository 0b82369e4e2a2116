"""Refuses diffusers code that this package was not written against.

The forwards we replace are private and change between releases, so each replaced class is recognised by the hash of
its source text, not by a version number.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ...errors import ModelError

# "module:name" -> {first 16 hex digits of the sha256 of the source text: release it was read in}.
Sources = Mapping[str, Mapping[str, str]]


def digest(place: str) -> str:
    """Hash of the source of ``"module:name"``."""
    module, _, name = place.partition(":")
    return _hash(getattr(importlib.import_module(module), name))


@functools.cache
def _hash(code: Any) -> str:
    return hashlib.sha256(_source(code).encode()).hexdigest()[:16]


def _source(code: Any) -> str:
    """What ``inspect.getsource`` returns, which parses the whole file for every class it is asked for."""
    code = inspect.unwrap(code)
    module = sys.modules[code.__module__]
    lines, spans = _index(module)
    if code.__qualname__ not in spans:
        return inspect.getsource(code)
    start, stop = spans[code.__qualname__]
    return "".join(lines[start:stop])


@functools.cache
def _index(module: ModuleType) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The lines of a module's file, and where each of its top-level classes and functions begins and ends."""
    text = inspect.getsource(module)
    spans = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            spans[node.name] = first - 1, node.end_lineno or first
    return text.splitlines(keepends=True), spans


def check(sources: Sources) -> None:
    """Raise ModelError unless every listed class or function has a known source."""
    for place, known in sources.items():
        name = place.partition(":")[2]
        supported = ", ".join(sorted(set(known.values())))
        installed = importlib.metadata.version("diffusers")
        remedy = f"supported: diffusers {supported} (pip install diffusers=={supported.split(', ')[-1]})"
        try:
            found = digest(place)
        except (ImportError, AttributeError, OSError, TypeError) as error:
            raise ModelError(f"diffusers {installed}: cannot read the source of {name} ({error}); {remedy}") from error
        if found not in known:
            raise ModelError(
                f"diffusers {installed}: the source of {name} (sha256 {found}) is not one that accelerate() knows, "
                f"so nothing was changed; {remedy}"
            )
