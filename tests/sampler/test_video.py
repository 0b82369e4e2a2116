"""Film files: formats, metadata, and that a destination is never half written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from pyvideo_kernels.sampler import video
from pyvideo_kernels.sampler.problems import OutputError
from pyvideo_kernels.sampler.video import check_output, read_metadata, write_video

META = {"prompt": "a “red” ball; = # \\ naïve", "seed": 3, "steps": 8}


def film(count: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """A red square on gray that moves right."""
    frames = np.full((count, height, width, 3), 110, np.uint8)
    for i, frame in enumerate(frames):
        frame[8:24, 4 + 4 * i : 20 + 4 * i] = (225, 30, 35)
    return frames


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_films_come_back_with_their_colours(tmp_path: Path, suffix: str) -> None:
    frames = film()
    seen: list[int] = []
    path = write_video(tmp_path / f"a{suffix}", frames, 8, META, upscale=2, on_frame=seen.append)
    back = decoded(path)
    assert back.shape == (5, 64, 96, 3) and seen == [0, 1, 2, 3, 4]
    error = np.abs(back.astype(int) - frames.repeat(2, 1).repeat(2, 2))
    assert error.mean() < 3, "colours moved"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(8, rel=0.01)
    assert read_metadata(path) == META
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_odd_sizes_and_odd_rates(tmp_path: Path) -> None:
    path = write_video(tmp_path / "odd.mp4", film(3, 31, 47), 23.976)
    assert decoded(path).shape == (3, 32, 48, 3)
    assert read_metadata(path) == {}


def test_gif_keeps_its_length_and_comment(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.gif", film(8), 16, META)
    with Image.open(path) as gif:
        assert gif.n_frames == 8 and gif.info["loop"] == 0
        total = 0
        for index in range(8):
            gif.seek(index)
            total += gif.info["duration"]
            pixel = gif.convert("RGB").getpixel((6 + 4 * index, 10))
            assert np.abs(np.subtract(pixel, (225, 30, 35))).max() < 12
    assert total == 500
    assert read_metadata(path) == META


@pytest.mark.parametrize("name", ["clip.png", "clip", "clip/"])
def test_a_folder_of_pngs_is_exact(tmp_path: Path, name: str) -> None:
    frames = film()
    path = write_video(f"{tmp_path}/{name}", frames, 8, META)
    assert path == tmp_path / "clip"
    names = sorted(p.name for p in path.iterdir())
    assert names == [f"frame_{i:05d}.png" for i in range(5)]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(path / n)) for n in names]), frames)
    assert read_metadata(path) == META
    # A second film of the same name replaces the first as a whole.
    write_video(f"{tmp_path}/{name}", frames[:2], 8)
    assert len(list(path.iterdir())) == 2 and len(list(tmp_path.iterdir())) == 1


def test_the_same_film_is_the_same_file(tmp_path: Path) -> None:
    for suffix in (".mp4", ".webm", ".gif"):
        files = {write_video(tmp_path / f"{n}{suffix}", film(), 8, META).read_bytes() for n in range(12)}
        assert len(files) == 1, suffix


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webm", "a"])
def test_an_interrupted_film_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    before = write_video(tmp_path / name, film(2), 8, {"seed": 1})

    def stop(index: int) -> None:
        if index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / name, film(5), 8, META, on_frame=stop)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert read_metadata(before) == {"seed": 1}


def test_where_a_film_cannot_go(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for path, wanted in (
        (tmp_path / "a.avi", ".avi is not a format this writes; use .mp4"),
        (tmp_path / "folder.mp4", "is a folder; name a file in it"),
        (tmp_path / "file" / "a.mp4", "cannot be written"),
        (tmp_path / "file.png", "is a file; name a new folder"),
        (tmp_path / "mine", "holds other files"),
    ):
        with pytest.raises(OutputError, match=wanted):
            check_output(path)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    check_output(tmp_path / "new" / "deep" / "a.mp4")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_encoders_are_taken_in_order_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = video._has_encoder
    monkeypatch.setattr(video, "_has_encoder", lambda av, name: name == "mpeg4" and real(av, name))
    notes: list[str] = []
    path = write_video(tmp_path / "a.mp4", film(), 8, META, note=notes.append)
    assert decoded(path).shape == (5, 32, 48, 3) and read_metadata(path) == META
    assert notes == ["FFmpeg has no libx264 here; writing mpeg4"]
    monkeypatch.setattr(video, "_has_encoder", lambda av, name: False)
    with pytest.raises(OutputError, match=r"no encoder for .webm here.*libvpx-vp9.*write a .gif"):
        check_output(tmp_path / "a.webm")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_write_gif", full)
    with pytest.raises(OutputError, match=r"No space left on device.*free some space"):
        write_video(tmp_path / "a.gif", film(), 8)
    assert list(tmp_path.iterdir()) == []


def test_frames_must_be_frames(tmp_path: Path) -> None:
    for bad in (np.zeros((0, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4), np.uint8)):
        with pytest.raises(OutputError, match="uint8"):
            write_video(tmp_path / "a.mp4", bad, 8)
