"""The error classes of ``errors.py``, importable without torch (the command line starts with these)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PyVideoError(Exception):
    """Base of every error this package raises on purpose."""


class ShapeError(PyVideoError, ValueError):
    """An argument has the wrong shape, size or stride."""


class DTypeError(PyVideoError, TypeError):
    """An argument has the wrong dtype or type."""


class DeviceError(PyVideoError, ValueError):
    """Arguments live on different devices, or on one that the implementation does not run on."""


class ValueOptionError(PyVideoError, ValueError):
    """A keyword takes one of a few values and got another."""


class UnsupportedError(PyVideoError, NotImplementedError):
    """The request is valid but this implementation or machine cannot serve it; names the remedy."""


class ModelError(PyVideoError, RuntimeError):
    """A pipeline, model directory or module is not what the integration knows."""


class UsageError(PyVideoError, ValueError):
    """A user's request to the sampler cannot be carried out; one sentence and the remedy."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
