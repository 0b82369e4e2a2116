"""A film that is written while it is made: the same file as at once, and nothing of one that nobody wants."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pyvideo_kernels.sampler import video
from pyvideo_kernels.sampler.problems import OutputError
from pyvideo_kernels.sampler.progress import PlainReporter, RichReporter
from pyvideo_kernels.sampler.video import read_metadata, write_video
from pyvideo_kernels.sampler.writer import FilmWriter

from .test_video import META, decoded, film


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "clip"])
def test_is_the_file_that_is_written_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "at-once").mkdir()
    expected = write_video(tmp_path / "at-once" / name, film(), 8, META, upscale=2)
    seen: list[int] = []
    writer = FilmWriter(tmp_path / name, 8, META, upscale=2, on_frame=seen.append)
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        writer.add(film()[start:stop])
    assert writer.finish() == tmp_path / name and seen == [0, 1, 2, 3, 4]
    writer.discard()
    files = [tmp_path / name] if (tmp_path / name).is_file() else sorted((tmp_path / name).iterdir())
    for file in files:
        assert file.read_bytes() == (expected / file.name if expected.is_dir() else expected).read_bytes()


def test_frames_are_encoded_as_they_come(tmp_path: Path) -> None:
    first = threading.Event()
    writer = FilmWriter(tmp_path / "a.mp4", 8, on_frame=lambda index: first.set())
    writer.add(film()[:1])
    assert first.wait(30) and not (tmp_path / "a.mp4").exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_kept_frames_are_a_film_of_their_own(tmp_path: Path, name: str) -> None:
    before = write_video(tmp_path / name, film(2), 8, {"seed": 1})
    partial = before.with_name(f"{before.stem}.partial{before.suffix}")
    writer = FilmWriter(tmp_path / name, 8, META)
    assert writer.keep(partial) is None, "nothing was added"
    writer = FilmWriter(tmp_path / name, 8, META)
    writer.add(film(3))
    assert writer.keep(partial) == partial
    assert read_metadata(partial) == META and read_metadata(before) == {"seed": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([before.name, partial.name])
    if name == "a.mp4":
        assert decoded(partial).shape == (3, 32, 48, 3)


def test_what_goes_wrong_in_the_encoder_is_said_where_frames_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="is not a format this writes"):
        FilmWriter(tmp_path / "a.avi", 8)

    def full(path: Any, images: Any, *rest: Any) -> None:
        next(images)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_write_av", full)
    writer = FilmWriter(tmp_path / "a.mp4", 8)
    with pytest.raises(OutputError, match=r"a\.mp4 could not be written .No space left on device.*free some space"):
        for _ in range(1000):
            writer.add(film(1))
            time.sleep(0.01)
    with pytest.raises(OutputError):
        writer.finish()
    assert writer.keep(tmp_path / "b.mp4") is None and list(tmp_path.iterdir()) == []


def test_phases_beside_each_other() -> None:
    text = io.StringIO()
    plain = PlainReporter(text)
    with plain.phase("load"), plain.phase("text"):
        pass
    with plain.phase("write", 2) as wrote:
        with plain.phase("decode", 1) as decoded_one:
            decoded_one()
        wrote()
    with plain.phase("denoise", 1):
        pass
    lines = text.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "read the prompt", "load the model", "decode", "write the film", "denoise",
    ]  # fmt: skip
    assert lines[3].endswith("0.00 s of it after decode") and "after" not in lines[2] + lines[4]

    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    rich = RichReporter(console)
    with rich.phase("write", 2) as wrote, rich.phase("decode", 3) as advance:
        advance()
        threads = [threading.Thread(target=wrote) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with rich.phase("load"):
        pass
    shown = console.file.getvalue()
    assert "write the film" in shown and "2/2" in shown and "3/3" in shown and "load the model" in shown
    assert rich._bars is None
