from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import pipes


@pytest.fixture(scope="session")
def quiet() -> Iterator[None]:
    from pyvideo_kernels.sampler.loading import quiet_libraries

    with quiet_libraries():
        yield


@pytest.fixture(scope="session")
def pipe(quiet: None) -> Any:
    """A random text-to-video pipeline; tests leave it as they found it."""
    return pipes.wan()


@pytest.fixture(scope="session")
def model_dir(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline as a directory, with defaults of its own."""
    path = pipes.save(pipe, tmp_path_factory.mktemp("models") / "random-wan")
    (path / "pyvideo.json").write_text(
        '{"height": 32, "width": 48, "frames": 5, "fps": 8, "steps": 3, "guidance": 3.0, "note": "not an option"}'
    )
    return path
