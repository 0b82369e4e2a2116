"""What an external kernel is to the benchmarks, and how an installed one is found and named."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyvideo_kernels.dispatch import arch_of
from pyvideo_kernels.known_bad import numbers

Inputs = dict[str, Any]


def _as_they_are(inputs: Inputs) -> Inputs:
    return inputs


def _takes_all(inputs: Inputs) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation of one of our ops.

    Args:
        name: as it appears in tables and after ``--baseline``.
        version: of the package that it comes from; None: not installed.
        why_not: why it cannot run on this device and dtype, with the remedy; None: it can.
        call: inputs -> what our op returns for them, same shape and layout; None where ``why_not`` says why.
        prepare: inputs -> inputs; what a user does once at set-up (packing a weight, building a mask, compiling). Not
            timed. ``call`` takes its result; plain inputs work too, more slowly.
        refuses: inputs -> why this peer does not serve them (head_dim, window, memory); None: it does. Ask once a
            shape, before ``call``, which does not ask again.
        note: what a reader of the table must know (8-bit products, a version nobody has read).
    """

    name: str
    version: str | None
    why_not: str | None
    call: Callable[[Inputs], Any] | None
    prepare: Callable[[Inputs], Inputs] = _as_they_are
    refuses: Callable[[Inputs], str | None] = _takes_all
    note: str | None = None


def skipped(name: str, version: str | None, why_not: str) -> Peer:
    return Peer(name, version, why_not, None)


@dataclass(frozen=True)
class Found:
    """A package on this machine: its version, the function an adapter calls, or why there is none."""

    version: str | None
    function: Callable[..., Any] | None
    why_not: str | None


@dataclass(frozen=True)
class Package:
    """An external package, by the function that is called.

    Args:
        name: of the peer.
        distribution: name on the package index.
        modules: where the function may be, first choice first.
        attribute: the function.
        install: how a user gets it.
        read: first and last version whose interface this adapter was written against. Another one is tried, and the
            peer's note says so.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    attribute: str
    install: str
    read: tuple[str, str]

    def find(self) -> Found:
        return _find(self)

    def missing(self) -> str:
        return f"not installed: {self.install}"

    def note(self) -> str | None:
        """Says that the installed version is none that the adapter was written against."""
        version = self.find().version
        if version is None or order(self.read[0]) <= order(version) <= order(self.read[1]):
            return None
        return f"the adapter was written for {self.distribution} {self.read[0]} to {self.read[1]}"


_WORDS = {"dev": -4, "a": -3, "alpha": -3, "b": -2, "beta": -2, "c": -1, "rc": -1}


def order(version: str) -> tuple[Any, ...]:
    """What versions are compared by: ``4.0.0b9`` < ``4.0.0b27`` < ``4.0.0`` = ``4.0.0+cu130``."""
    public = version.partition("+")[0]
    word = re.search(rf"\d[._-]?({'|'.join(sorted(_WORDS, key=len, reverse=True))})[._-]?(\d*)$", public)
    return (numbers(public), *((_WORDS[word[1]], int(word[2] or 0)) if word else (0, 0)))


def installed(distribution: str) -> str | None:
    """Version of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


@functools.cache
def _find(package: Package) -> Found:
    version = installed(package.distribution)
    missing = Found(None, None, package.missing())
    modules = [name for name in package.modules if _importable(name)]
    if version is None and not modules:
        return missing
    problems = []
    for name in modules or package.modules:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some greet; stdout is for results
                module = importlib.import_module(name)
        except Exception as error:  # a build for another torch or CUDA fails in many ways
            problems.append(f"{name} cannot be imported ({type(error).__name__}: {error})")
            continue
        function = getattr(module, package.attribute, None)
        if function is not None:
            return Found(version or getattr(module, "__version__", "unknown"), function, None)
        problems.append(f"{name} has no {package.attribute}")
    if version is None:
        return missing  # a namespace that another distribution fills
    return Found(version, None, f"{package.distribution} {version}: {'; '.join(problems)}")


# What a device or dtype rules out ---------------------------------------------------------------------------------


def needs_nvidia(device: torch.device, lowest: int = 80, only: tuple[int, ...] = ()) -> str | None:
    """Why ``device`` is no NVIDIA GPU of compute capability ``lowest`` (90 is 9.0) or one of ``only``."""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.version.hip:
        return "needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    capability = major * 10 + minor
    if only and capability not in only:
        return f"needs {' or '.join(f'sm_{n}' for n in only)}; this is {arch_of(device)}"
    if capability < lowest:
        return f"needs sm_{lowest} or later; this is {arch_of(device)}"
    return None


def needs_dtype(dtype: torch.dtype, *dtypes: torch.dtype) -> str | None:
    """Why ``dtype`` is none of ``dtypes``."""
    if dtype in dtypes:
        return None
    names = [str(one).removeprefix("torch.") for one in (*dtypes, dtype)]
    return f"takes {' and '.join(names[:-1])}; this is {names[-1]}"


HALF = (torch.bfloat16, torch.float16)
