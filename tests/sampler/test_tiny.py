"""The embedded model through the sampler: what ``make film`` runs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from pyvideo_kernels.sampler import Sampler, Settings, sample
from pyvideo_kernels.sampler.models import TINY
from pyvideo_kernels.sampler.progress import PlainReporter
from pyvideo_kernels.tiny import checker, grammar

PROMPT = "a red ball moves left on a black background"


def test_a_sentence_becomes_a_film_of_it(tmp_path: Path, quiet: None) -> None:
    started = time.process_time()
    result = sample(PROMPT, output=tmp_path / "film.mp4")
    assert time.process_time() - started < 30, "the promise is ten seconds on two idle cores"
    assert result.frames.shape == (17, 64, 64, 3) and result.fps == 8
    scene = grammar.parse(PROMPT)
    assert scene is not None
    assert all(checker.read(result.frames).agrees(scene).values()), checker.read(result.frames)

    import av

    with av.open(str(tmp_path / "film.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (17, 256, 256, 3), "written four times as large"
    assert all(checker.read(frames).agrees(scene).values())


def test_a_sentence_it_does_not_know_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(prompt="a cat on a mat", steps=1, dtype="fp16", device="cpu")
    sampler = Sampler(settings, reporter=PlainReporter())
    sampler.plan(settings)  # the command plans every film first, and again when it is made
    sampler.run(settings)
    err = capsys.readouterr().err
    assert err.count("warning: tiny only knows sentences like") == 1 and "'a cat on a mat' is not one" in err
    assert "note: --dtype fp16 is slow on a CPU" in err and "Pipelines loaded with" not in err


def test_it_is_there() -> None:
    assert (TINY / "model_index.json").is_file()
