"""Refuses diffusers code that this package was not written against.

The forwards we replace are private and change between releases, so each replaced class is recognised by the hash of
its source text, not by a version number.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
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
    # Finding a class in its file parses the file: some 30 ms each.
    return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:16]


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
