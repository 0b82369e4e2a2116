"""Memory, and the stats file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .problems import OutputError
from .video import check_folder, write_bytes


def peak_memory(device: Any) -> int | None:
    """Most memory torch held on a GPU during this run, or that this process ever held on the host, in bytes."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_stats(path: Path) -> None:
    """Refuse a stats file that cannot be written, before there are any."""
    if path.is_dir():
        raise OutputError(f"--stats {path} is a folder; name a file in it")
    check_folder(path.parent, "stats")


def write_stats(path: Path, runs: list[dict[str, Any]]) -> Path:
    """``{"runs": [...]}`` as JSON, one entry a film."""
    text = json.dumps({"runs": runs}, indent=2, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    try:
        return write_bytes(path, write)
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"--stats {path} cannot be written ({why}); choose another file") from None
