"""A film that is written while it is decoded: an encoder in a thread of its own. Torch-free."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import video


class _Stopped(Exception):
    """The film is not wanted any more."""


class FilmWriter:
    """Encodes frames as they are added; what `write_video` promises of the file holds.

        writer = FilmWriter("film.mp4", 16, metadata)
        for frames in decoder: writer.add(frames)
        path = writer.finish()

    The file is written under a temporary name; one of `finish`, `keep` and `discard` says what becomes of it.

    Args:
        path, fps, metadata, upscale, note, on_frame: as for `write_video`; ``note`` and ``on_frame`` are called from
            the writer's thread.
    Raises:
        OutputError: at once where the destination cannot be written; from ``add`` or ``finish`` what the encoder met.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        *,
        upscale: int = 1,
        note: Callable[[str], None] = lambda text: None,
        on_frame: Callable[[int], None] = lambda index: None,
    ) -> None:
        video.check_output(path)
        self._frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._made: Path | None = None
        self._elsewhere: Path | None = None
        self._stopped = False
        self._count = 0

        def run() -> None:
            try:
                self._made = video.encode(
                    path, self._arriving(), fps, metadata, upscale=upscale, note=note, on_frame=on_frame,
                    settle=lambda target: self._elsewhere or target,
                )  # fmt: skip
            except _Stopped:
                pass
            except BaseException as error:  # raised in the thread that adds
                self._error = error

        # Whoever leaves without a word does not leave a process that waits for frames.
        self._thread = threading.Thread(target=run, name="film writer", daemon=True)
        self._thread.start()

    def _arriving(self) -> Iterator[Any]:
        while (frame := self._frames.get()) is not None:
            if self._stopped:
                raise _Stopped
            yield frame
        if self._stopped:
            raise _Stopped

    def add(self, frames: Any) -> None:
        """Frames ``[t, H, W, 3]`` uint8, which must stay as they are until they are encoded."""
        if self._error is not None:
            raise self._error
        for frame in frames:
            self._count += 1
            self._frames.put(frame)

    def finish(self) -> Path:
        """Wait for the encoder; the path of the film."""
        self._end()
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made

    def keep(self, path: Path) -> Path | None:
        """Make what was added so far a film of its own, beside the destination; None if that is nothing."""
        if not self._count or self._error is not None:
            self.discard()
            return None
        self._elsewhere = path
        self._end()
        return None if self._error is not None else self._made

    def discard(self) -> None:
        """Leave nothing behind; after ``finish`` or ``keep``, do nothing."""
        self._stopped = True
        self._end()

    def _end(self) -> None:
        self._frames.put(None)
        # Not one long wait: Ctrl-C must be heard on every system.
        while self._thread.is_alive():
            self._thread.join(0.1)
