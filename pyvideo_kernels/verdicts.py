"""What is known of a compiled kernel's correctness: verdicts on this machine, and the record that ships.

Two records, both about one (op, implementation, architecture, dtype, head_dim) and one state of its sources:

* ``self_check.json`` in the user's cache: what self-checks and ``pyvideo verify`` found on this machine.
* ``verified.json`` in the package: what a correctness run on a card found before a release. An architecture maps to
  entries ``"<op> <impl> <dtype>[ <head_dim>]": {"digest", "triton", "torch", "gpu", "driver", "revision", "date"}``.
  ``auto`` trusts an entry without a check if digest and Triton version are those of this installation.

The digest is over the sources of that op alone, so that work on one kernel leaves the verdicts of the others standing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UnsupportedError, ValueOptionError

if TYPE_CHECKING:
    from .schemas import Op

VERIFIED = Path(__file__).with_name("verified.json")

LIBRARIES = ("flash", "cudnn", "cublas")
"""Implementations that are another project's binary; each takes only a part of what its op does."""

_PACKAGE = "pyvideo_kernels"
# Followed: what a kernel is made of. Read, but not followed: the functions it borrows from there.
_FOLLOWED = (f"{_PACKAGE}.kernels", f"{_PACKAGE}.configs")
_BORROWED = (f"{_PACKAGE}.ops.", f"{_PACKAGE}.reference.")
_PROVENANCE = ("arch", "gpu", "driver", "triton", "torch", "revision", "date")


def name_of(op: Op | str, impl: str, dtype: torch.dtype | str, head_dim: int | None = None) -> str:
    """``"spacetime_attention triton bfloat16 128"``: what a verdict is about, within one architecture."""
    parts = [op if isinstance(op, str) else op.name, impl, str(dtype).removeprefix("torch.")]
    return " ".join(parts if head_dim is None else [*parts, str(head_dim)])


def key_of(op: Op, impl: str, arch: str, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """Key of a verdict on this machine: the code, the compilers, the architecture, and what it is about."""
    from . import __version__

    build = f"{__version__} {digest(op, impl)} torch {torch.__version__} {arch}"
    if impl == "triton":
        build += f" triton {triton_version()}"
    return f"{build} {name_of(op, impl, dtype, head_dim)}"


def triton_version() -> str:
    """Of the imported Triton, else of the installed one; empty without one."""
    if (triton := sys.modules.get("triton")) is not None:
        return str(triton.__version__)
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


# Digest of an op's sources --------------------------------------------------------------------------------------


@functools.cache
def _digest(name: str, impl: str, module: str) -> str:
    hashed = hashlib.sha256()
    if module.startswith(f"{_PACKAGE}.kernels."):
        for source in sources(module):
            hashed.update(source.name.encode() + b"\0" + source.read_bytes())
        for table in _tuned(name):
            hashed.update(table)
    else:
        # Compiled code: the binary is what runs, whatever the sources beside it say by now.
        found = importlib.util.find_spec(f"{_PACKAGE}._C")
        if found is not None and found.origin is not None:
            hashed.update(Path(found.origin).read_bytes())
    return hashed.hexdigest()[:12]


def digest(op: Op, impl: str) -> str:
    """Digest of what ``impl`` is made of here: the op's Triton sources and configurations, the extension, a library."""
    if impl == "cudnn":
        from .collect_env import cudnn_version

        return f"cuDNN {cudnn_version()}"
    if impl == "cublas":
        from .ops import linear_gelu_library

        return f"cuBLASLt {linear_gelu_library.cublas_version()}"
    if impl in LIBRARIES:
        from .ops import flash_attention

        return flash_attention.digest()
    return _digest(op.name, impl, op.impls[impl].partition(":")[0])


def sources(module: str) -> list[Path]:
    """The files behind a kernel module: its own, what it imports of kernels/ and configs/, and what it borrows."""
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _file_of(name)
        if name in found or path is None:
            continue
        found[name] = path
        if name.startswith(_FOLLOWED):
            todo += _imports(name, path)
    return [found[name] for name in sorted(found)]


def _file_of(module: str) -> Path | None:
    """Source of one of this package's modules, found without importing it."""
    if module != _PACKAGE and not module.startswith(f"{_PACKAGE}."):
        return None
    package = Path(__file__).parent
    inner = module.split(".")[1:]
    places = [package]
    if inner[:1] == ["kernels"] and (package.parent / "csrc" / "module.cpp").is_file():
        places.append(package.parent)  # a checkout keeps them beside the package
    for place in places:
        for path in (place.joinpath(*inner).with_suffix(".py"), place.joinpath(*inner, "__init__.py")):
            if inner and path.is_file():
                return path
    return None


def _imports(module: str, path: Path) -> Iterator[str]:
    """Modules of kernels/, configs/, ops/ and reference/ that a file imports, at its top or inside a function."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            # Each name may be a module of that package, or something defined in it.
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith((*_FOLLOWED, *_BORROWED)) or name in (f"{_PACKAGE}.ops", f"{_PACKAGE}.reference"):
                yield name


def _tuned(name: str) -> Iterator[bytes]:
    """What the tuned tables say of this op: another tile is another kernel."""
    wanted = {name, name.removesuffix("_backward"), name.rstrip("_")}
    for path in sorted((Path(__file__).parent / "configs").glob("*.json")):
        try:
            rows = json.loads(path.read_text())["rows"]
            mine = [row for row in rows if row["tuned"] and row["key"].get("op", row["family"]) in wanted]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # no table; configs.tuned does not use it either, and says so
        if mine:
            yield json.dumps([path.name, mine], sort_keys=True).encode()


# Verdicts on this machine ---------------------------------------------------------------------------------------


def record_path() -> Path:
    """Where self-check verdicts are kept between processes."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "pyvideo-kernels" / "self_check.json"


def read() -> dict[str, bool]:
    """Key -> verdict; empty where nothing readable is kept."""
    try:
        record = json.loads(record_path().read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in record.items() if isinstance(value, bool)} if isinstance(record, dict) else {}


def remember(key: str, verdict: bool) -> None:
    """Keep a verdict for the next process; a read-only home only costs a repeated check."""
    try:
        # Two processes may each write the file without the other's line: that too costs one repeated check.
        _write(record_path(), read() | {key: verdict})
    except OSError:
        pass


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# The record that ships ------------------------------------------------------------------------------------------


def committed(op: Op, impl: str, arch: str, dtype: torch.dtype, head_dim: int | None = None) -> dict[str, Any] | None:
    """The shipped entry that speaks for exactly this code and this Triton, or None."""
    entry = _committed(VERIFIED).get(arch, {}).get(name_of(op, impl, dtype, head_dim))
    if not isinstance(entry, dict) or any(not entry.get(fact) for fact in _PROVENANCE if fact != "arch"):
        return None
    # Builds of one release differ after the plus: the compiler is the same.
    compiler = str(entry["triton"]).partition("+")[0]
    if entry.get("digest") != digest(op, impl) or compiler != triton_version().partition("+")[0]:
        return None
    return entry


@functools.lru_cache(maxsize=4)
def _committed(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def commit(path: Path, rows: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any]) -> int:
    """Merge the rows of a correctness run into a record; returns how many entries it then has for that architecture.

    Args:
        path: the record, ``VERIFIED`` for the one that ships; made if it is not there.
        rows: ``{"op", "impl", "dtype", "head_dim": int or None, "ok": bool, "digest"}``, as ``verify.canaries`` gives
            them. What failed is taken out of the record; rows of implementations that need no check are passed over.
        provenance: ``arch``, ``gpu``, ``driver``, ``triton``, ``torch``, ``revision`` and ``date`` of the run
            (``benchmarks.results.provenance``).
    Raises:
        ValueOptionError: the run does not say on which GPU it was, or a row is of other sources than these.
    """
    from .schemas import OPS

    missing = [fact for fact in _PROVENANCE if not provenance.get(fact)]
    if provenance.get("device") != "cuda" or missing:
        lacks = f"lacks {', '.join(missing)}" if missing else f"is of device {provenance.get('device')!r}"
        raise ValueOptionError(f"commit: `provenance` must be that of a run on a GPU; it {lacks}")
    arch = str(provenance["arch"])
    record = dict(_committed(path))
    entries = dict(record.get(arch, {}))
    facts = {fact: provenance[fact] for fact in _PROVENANCE if fact != "arch"}
    failed = set()
    for row in rows:
        op, impl = OPS.get(row["op"]), row["impl"]
        if op is None or impl not in op.impls:
            raise ValueOptionError(f"commit: `rows` must be of ops of this package; got {row['op']!r}, impl {impl!r}")
        # A library's verdict is about the version that is installed here, and every machine makes its own.
        if not needs_check(impl) or impl in LIBRARIES:
            continue
        name = name_of(op, impl, row["dtype"], row.get("head_dim"))
        if row["digest"] != digest(op, impl):
            raise ValueOptionError(
                f"commit: the row of {name} is about other sources (digest {row['digest']}) than these "
                f"({digest(op, impl)}); run the checks again"
            )
        if not row["ok"]:
            failed.add(name)
        entries[name] = {"digest": row["digest"], **facts}
    entries = {name: entry for name, entry in entries.items() if name not in failed}
    _write(path, record | {arch: entries})
    _committed.cache_clear()
    return len(entries)


_CHECKED = frozenset(("triton", "cuda", *LIBRARIES))


def needs_check(impl: str) -> bool:
    """Whether ``impl`` is a kernel for a GPU that is right only once it was seen to be on that card.

    The oracle and PyTorch's own attention are not ours to verify; CPU code is covered by the test suite.
    """
    return impl in _CHECKED


def head_dims_known(op: Op, impl: str, arch: str, dtype: torch.dtype) -> dict[int | None, bool]:
    """head_dim (None for ops without one) -> verdict on this machine, for doctor."""
    try:
        stem = key_of(op, impl, arch, dtype)
    except UnsupportedError:
        return {}
    out: dict[int | None, bool] = {}
    for key, verdict in read().items():
        if key == stem:
            out[None] = verdict
        elif key.startswith(stem + " ") and key[len(stem) + 1 :].isdigit():
            out[int(key[len(stem) + 1 :])] = verdict
    return out
