"""Tuned launch configurations: a family of them asks the present card's table first, then its rule.

A table is ``configs/<gpu>.json``, a result file of kind ``"tuning"`` that ``python -m benchmarks.tune`` writes: its
provenance names the card, the driver and the compiler, each row the family, the exact shape key, the configuration,
its seconds beside the rule's, and a digest of the kernel it was measured with. A row counts on that card alone, under
that Triton, and as long as the kernel is the same; everything else takes the rule.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import functools
import hashlib
import importlib
import importlib.util
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import ValueOptionError
from .neighbours import MAX_TILE_REGISTERS as MAX_TILE_REGISTERS
from .neighbours import around as around
from .neighbours import combinations as combinations
from .neighbours import distance
from .neighbours import require as require
from .neighbours import threads as threads

SCHEMA = 1
FOLDER = Path(__file__).parent
PROVENANCE = ("gpu", "driver", "arch", "torch", "triton", "date")
# Shape key: the keyword arguments of select().
Key = tuple[tuple[str, Any], ...]
C = TypeVar("C")

_FAMILIES: dict[str, Family[Any]] = {}
# Answers already given are kept; a model asks for a few dozen, a search over shapes may ask for any number.
_KNOWN_LIMIT = 4096


@dataclass(frozen=True)
class Forced:
    """A configuration that `forced_config` puts in place of what its family would choose."""

    family: str
    config: Any
    where: Key


@dataclass(frozen=True)
class Asked:
    """One question of a launcher and its answer, as `recording` lists them."""

    family: str
    key: Key
    config: Any

    @property
    def op(self) -> str:
        """The op whose kernel is launched: in the key where ops share a family, else the family's name."""
        return str(dict(self.key).get("op", self.family))


_forced: contextvars.ContextVar[tuple[Forced, ...]] = contextvars.ContextVar("forced_config", default=())
_asked: contextvars.ContextVar[list[Asked] | None] = contextvars.ContextVar("asked", default=None)
_folder: contextvars.ContextVar[Path] = contextvars.ContextVar("tables", default=FOLDER)


class Target(str):
    """An architecture, and the card it was read from (a slug; None: no card, so rules alone)."""

    gpu: str | None

    def __new__(cls, arch: str, gpu: str | None = None) -> Target:
        target = super().__new__(cls, arch)
        target.gpu = gpu
        return target


def slug(name: str) -> str:
    """File name of a device: ``"NVIDIA H100 80GB HBM3"`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Family(Generic[C]):
    """``select`` of a kind of kernel: called with an architecture and a shape key, it answers a configuration.

    Made by `family` from the rule; ``legality`` and ``neighbourhood`` add what tuning needs.
    """

    def __init__(self, name: str, config: type[C], limit: int, rule: Callable[..., C]) -> None:
        self.name, self.config, self.limit, self.rule = name, config, limit, rule
        self._illegal: Callable[..., str | None] = lambda config, arch, **shape: None
        self._nearby: Callable[..., Iterable[C]] = lambda arch, rule, **shape: ()
        self._known: dict[Any, C] = {}
        functools.update_wrapper(self, rule)
        _FAMILIES[name] = self

    def __call__(self, arch: str, **shape: Any) -> C:
        """The forced configuration, the tuned one of this card, or the rule's."""
        forced, asked = _forced.get(), _asked.get()
        if not forced and asked is None:
            at = (arch, getattr(arch, "gpu", None), *shape.items())
            known = self._known.get(at)
            if known is None:
                if len(self._known) >= _KNOWN_LIMIT:
                    self._known.clear()
                known = self._known[at] = self._choose(arch, shape)
            return known
        config = self._choose(arch, shape)
        for entry in forced:
            if entry.family == self.name and all(shape.get(name) == value for name, value in entry.where):
                if problem := self.illegal(entry.config, arch, **shape):
                    raise ValueOptionError(f"forced_config: {entry.config} for {self.name} {shape}: {problem}")
                config = entry.config
        if asked is not None:
            asked.append(Asked(self.name, tuple(sorted(shape.items())), config))
        return config

    def _choose(self, arch: str, shape: dict[str, Any]) -> C:
        gpu = getattr(arch, "gpu", None)
        if gpu is not None:
            config = table(gpu, str(arch)).get((self.name, tuple(sorted(shape.items()))))
            if config is not None:
                return config  # type: ignore[no-any-return]
        return self.rule(arch, **shape)

    def illegal(self, config: Any, arch: str, **shape: Any) -> str | None:
        """Why ``config`` must not be launched at this key; None: it may."""
        if not isinstance(config, self.config):
            return f"is no {self.config.__name__}"
        return self._illegal(config, arch, **shape)

    def legality(self, function: Callable[..., str | None]) -> Callable[..., str | None]:
        """Decorator: what a configuration must hold at a shape key, beyond what its own fields say."""
        self._illegal = function
        return function

    def neighbourhood(self, function: Callable[..., Iterable[C]]) -> Callable[..., list[C]]:
        """Decorator: ``function(arch, rule, **key)`` yields what is worth trying around the rule's answer.

        The decorated ``candidates(arch, **key)`` has the rule first, then the legal ones, nearest first.
        """
        self._nearby = function

        @functools.wraps(function)
        def candidates(arch: str, **shape: Any) -> list[C]:
            return self.candidates(arch, **shape)

        return candidates

    def candidates(self, arch: str, **shape: Any) -> list[C]:
        """Configurations to time at this key: the rule's, then legal ones nearby, ``limit`` in all."""
        rule = self.rule(arch, **shape)
        legal = {c: None for c in self._nearby(arch, rule, **shape) if c != rule}
        ordered = sorted(
            (c for c in legal if self.illegal(c, arch, **shape) is None), key=functools.partial(distance, rule)
        )
        return [rule, *ordered][: self.limit]

    def clear(self) -> None:
        """Forget the answers given: the tables have changed."""
        self._known.clear()


def family(name: str, config: type[C], *, limit: int) -> Callable[[Callable[..., C]], Family[C]]:
    """Decorator of a rule: makes it the `Family` called ``name``, with at most ``limit`` candidates a key."""
    return functools.partial(Family, name, config, limit)


def families() -> Mapping[str, Family[Any]]:
    """Every family, by name."""
    _import_families()
    return _FAMILIES


@functools.cache
def _import_families() -> None:
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


# Forcing and recording -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forced_config(family: str, config: Any, **where: Any) -> Iterator[None]:
    """Launch with ``config`` wherever ``family`` is asked, or only at keys that agree with ``where``.

    In this thread: autograd runs the backward of CUDA tensors in another, so call a backward op itself.

    Args:
        family: name of the family, e.g. ``"spacetime_attention"``, or ``"row"`` with ``op="rms_norm"``.
        config: an instance of the family's dataclass.
    Raises:
        ValueOptionError: at once for an unknown family, or for another's configuration; in the launch for one that
            is illegal at its key.
    """
    known = families()
    if family not in known:
        raise ValueOptionError(f"forced_config: `family` must be one of {', '.join(sorted(known))}; got {family!r}")
    if not isinstance(config, known[family].config):
        raise ValueOptionError(
            f"forced_config: `config` of {family} must be a {known[family].config.__name__}; got {config!r}"
        )
    token = _forced.set((*_forced.get(), Forced(family, config, tuple(where.items()))))
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[list[Asked]]:
    """Within: every question that launchers ask is listed with its answer."""
    asked: list[Asked] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def tables_in(folder: Path) -> Iterator[None]:
    """Look for tables in ``folder``, not among the package's: how a new one is tried before it is committed."""
    token = _folder.set(Path(folder))
    clear()
    try:
        yield
    finally:
        _folder.reset(token)
        clear()


def clear() -> None:
    """Forget tables and answers: a table was written."""
    _load.cache_clear()
    for each in _FAMILIES.values():
        each.clear()


# Tables ----------------------------------------------------------------------------------------------------------


@functools.cache
def digest(op: str) -> str:
    """Digest of the kernel source behind ``op``'s Triton implementation and of what it imports beside it.

    Blank lines and comments do not count; everything else does, as it may change what is compiled.
    """
    from ..schemas import OPS

    module = OPS[op].impls["triton"].partition(":")[0]
    package, pending, seen = module.rpartition(".")[0], [module], set[str]()
    out = hashlib.sha256()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueOptionError(f"configs: the source of {name} is not there")
        source = Path(spec.origin).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                beside = [node.module] if node.module else [alias.name for alias in node.names]
                pending += [f"{package}.{found}" for found in beside]
        for line in source.splitlines():
            if (text := line.rstrip()) and not text.lstrip().startswith("#"):
                out.update(text.encode() + b"\n")
    return out.hexdigest()[:16]


def row_op(row: Mapping[str, Any]) -> str:
    """The op that a table's row is about."""
    return str(row["key"].get("op", row["family"]))


def read(path: Path) -> dict[str, Any]:
    """A table as it is in the file, refused with a sentence if it is not one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueOptionError(f"{path.name}: not a table of tuned configurations ({error})") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or found.get("kind") != "tuning":
        raise ValueOptionError(f"{path.name}: expected a result file of schema {SCHEMA} and kind 'tuning'")
    where, rows = found.get("provenance"), found.get("rows")
    if not isinstance(where, dict) or not isinstance(rows, list):
        raise ValueOptionError(f"{path.name}: expected `provenance` and `rows`")
    if missing := [name for name in PROVENANCE if not where.get(name)]:
        raise ValueOptionError(f"{path.name}: provenance lacks {', '.join(missing)}")
    if slug(str(where["gpu"])) != path.stem:
        raise ValueOptionError(f"{path.name}: was measured on {where['gpu']}, whose table is {slug(where['gpu'])}.json")
    needed = {"family": str, "key": dict, "config": dict, "digest": str, "tuned": bool}
    for index, row in enumerate(rows):
        wrong = [k for k, kind in needed.items() if not isinstance(row, dict) or not isinstance(row.get(k), kind)]
        if wrong:
            raise ValueOptionError(f"{path.name}: row {index} lacks a valid {', '.join(wrong)}")
    return found


def row_config(row: Mapping[str, Any], arch: str) -> Any:
    """The configuration of a row, which must be legal at its key on ``arch``."""
    known = families()
    if row["family"] not in known:
        raise ValueOptionError(f"no family is called {row['family']!r}")
    kind = known[row["family"]]
    try:
        config = kind.config(**row["config"])
        problem = kind.illegal(config, arch, **row["key"])
    except TypeError as error:
        raise ValueOptionError(str(error)) from None
    if problem:
        raise ValueOptionError(problem)
    return config


def current(row: Mapping[str, Any]) -> bool:
    """Whether the row's kernel is the one that would run now."""
    from ..schemas import OPS

    op = OPS.get(row_op(row))
    return op is not None and "triton" in op.impls and row["digest"] == digest(op.name)


def table(gpu: str, arch: str) -> Mapping[tuple[str, Key], Any]:
    """Tuned configurations of a card that hold now, by family and key; empty without a table, or with a bad one."""
    return _load(_folder.get(), gpu, arch)


@functools.cache
def _load(folder: Path, gpu: str, arch: str) -> Mapping[tuple[str, Key], Any]:
    path = folder / f"{gpu}.json"
    if not path.is_file():
        return {}
    try:
        found = read(path)
        if found["provenance"]["arch"] != arch:
            raise ValueOptionError(f"{path.name}: was measured on {found['provenance']['arch']}, not on {arch}")
        if found["provenance"]["triton"] != triton_version():
            return {}  # another compiler's fastest tile is a guess; rules are as good
        out = {}
        for row in found["rows"]:
            if row["tuned"] and current(row):
                try:
                    out[row["family"], tuple(sorted(row["key"].items()))] = row_config(row, arch)
                except ValueOptionError as error:
                    raise ValueOptionError(f"{path.name}: {row['family']} {row['key']}: {error}") from None
        return out
    except Exception as error:  # a launch must not fail for a file that it can do without
        reason = str(error) if isinstance(error, ValueOptionError) else f"{path.name}: {type(error).__name__}: {error}"
        warnings.warn(f"{reason}; the table is not used and rules choose", RuntimeWarning, stacklevel=4)
        return {}


def triton_version() -> str | None:
    """Version of Triton; None where there is none."""
    if "triton" not in sys.modules:
        try:
            importlib.import_module("triton")
        except ImportError:
            return None
    return str(sys.modules["triton"].__version__)


def describe(gpu: str, arch: str) -> str:
    """One sentence about a card's table, for people."""
    path = _folder.get() / f"{gpu}.json"
    if not path.is_file():
        return f"no table for {gpu}; rules choose"
    try:
        found = read(path)
    except ValueOptionError as error:
        return f"{error}; rules choose"
    rows = [row for row in found["rows"] if row["tuned"]]
    holds = len(table(gpu, arch))
    if found["provenance"]["triton"] != triton_version():
        return f"{path.name}: measured with Triton {found['provenance']['triton']}; rules choose"
    return f"{path.name}: {holds} tuned configurations hold, {len(rows) - holds} are of other kernels"


def as_row(family: str, key: Key, config: Any) -> dict[str, Any]:
    """The part of a row that says what is chosen for what."""
    return {"family": family, "key": dict(key), "config": asdict(config)}
