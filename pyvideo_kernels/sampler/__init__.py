"""From a prompt to a film: loading, the sampling loop, video files and the command line.

    from pyvideo_kernels.sampler import sample
    result = sample("a red ball moves left on a black background", output="film.mp4")
    result.frames        # [T, H, W, 3] uint8

Names resolve lazily: importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "sample": "run",
    "Result": "run",
    "Sampler": "run",
    "Interrupted": "problems",
    "OutputError": "problems",
    "OutOfMemoryError": "problems",
    "Settings": "settings",
    "write_video": "video",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from .problems import Interrupted as Interrupted
    from .problems import OutOfMemoryError as OutOfMemoryError
    from .problems import OutputError as OutputError
    from .run import Result as Result
    from .run import Sampler as Sampler
    from .run import sample as sample
    from .settings import Settings as Settings
    from .video import write_video as write_video


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
