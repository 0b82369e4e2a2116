"""Result files: what a measurement must say of its machine, and how it is written and read.

One JSON object a file: ``schema``, ``kind`` (`KINDS`), ``provenance``, ``settings``, ``ceilings`` and
``rows``. A file without its machine is refused by every reader.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch

from pyvideo_kernels import collect_env
from pyvideo_kernels.dispatch import arch_of
from pyvideo_kernels.errors import ValueOptionError

SCHEMA = 1
KINDS = ("ops", "e2e", "vae", "tuning", "correctness", "environment")
_REQUIRED = ("device", "arch", "torch", "python", "pyvideo_kernels", "revision", "date")
_REQUIRED_ON = {"cuda": ("gpu", "driver", "triton", "clock_sm"), "cpu": ("cpu", "threads")}


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what a row was measured."""
    versions = collect_env.versions()
    row: dict[str, Any] = {
        "device": device.type,
        "arch": arch_of(device),
        **{name: versions[name] for name in ("torch", "triton", "python", "pyvideo_kernels", "diffusers")},
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": None,
        "dirty": None,
        **collect_env.revision(),
    }
    if device.type == "cuda":
        return row | collect_env.nvidia_smi(device)
    return row | {"cpu": collect_env.cpu_name(), "threads": torch.get_num_threads()}


def missing_provenance(where: dict[str, Any]) -> list[str]:
    """Facts that a result's provenance lacks; empty: it may be shown."""
    device = where.get("device")
    if device not in _REQUIRED_ON:
        return ["device"]
    return [key for key in _REQUIRED + _REQUIRED_ON[device] if not where.get(key)]


def read(path: Path) -> dict[str, Any]:
    """A result file, refused with a sentence if it is not one or does not say where it comes from."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueOptionError(f"{path}: not a result file ({error})") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or result.get("kind") not in KINDS:
        raise ValueOptionError(
            f"{path}: expected a result file of schema {SCHEMA} and kind {'|'.join(KINDS)}; got schema "
            f"{result.get('schema')!r}, kind {result.get('kind')!r}"
            if isinstance(result, dict)
            else f"{path}: expected a JSON object; got {type(result).__name__}"
        )
    missing = missing_provenance(result.get("provenance", {}))
    if missing:
        raise ValueOptionError(f"{path}: provenance lacks {', '.join(missing)}")
    return result


def write(path: Path, result: dict[str, Any]) -> Path:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
