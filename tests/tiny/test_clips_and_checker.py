"""The generator, and the checker on its clips: right on real ones, at chance on shuffled labels."""

import pytest
import torch
import torch.nn.functional as F

from pyvideo_kernels.tiny.checker import read
from pyvideo_kernels.tiny.clips import HELD_OUT_SCENES, TRAINING_SCENES, draw_scenes, render
from pyvideo_kernels.tiny.grammar import Scene

SCENES = (*TRAINING_SCENES, *HELD_OUT_SCENES)


def _clips(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return render(draw_scenes(count, generator, SCENES), generator)


def _accuracy(frames, scenes):
    hits = {}
    for clip, scene in zip(frames, scenes, strict=True):
        for name, right in read(clip).agrees(scene).items():
            hits.setdefault(name, []).append(right)
    return {name: sum(answers) / len(answers) for name, answers in hits.items()}


def _blur(frames):
    planes = frames.float().permute(0, 1, 4, 2, 3).flatten(0, 1)
    soft = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return soft.unflatten(0, frames.shape[:2]).permute(0, 1, 3, 4, 2) / 255


def test_the_same_seed_draws_the_same_clips():
    first, second, other = _clips(4, 3), _clips(4, 3), _clips(4, 4)
    assert first.scenes == second.scenes and torch.equal(first.frames(), second.frames())
    assert not torch.equal(first.frames(), other.frames())


def test_clips_have_the_documented_form():
    clips = _clips(3, 0)
    video, frames = clips.video(), clips.frames()
    assert video.shape == (3, 3, 17, 64, 64) and frames.shape == (3, 17, 64, 64, 3)
    assert frames.dtype == torch.uint8 and video.abs().max() <= 1
    assert render([SCENES[0]], frames=9, height=96, width=128).coverage.shape == (1, 9, 96, 128)


def test_the_object_never_leaves_the_frame():
    coverage = _clips(200, 1).coverage
    edge = torch.cat([coverage[:, :, 0], coverage[:, :, -1], coverage[..., 0], coverage[..., -1]], -1)
    assert edge.max() == 0


def test_training_and_held_out_scenes_do_not_meet():
    def triples(scenes):
        return {(s.color, s.shape, s.motion) for s in scenes}

    assert not triples(TRAINING_SCENES) & triples(HELD_OUT_SCENES)


@pytest.mark.parametrize("kind", ["clean", "noisy", "blurred"])
def test_the_checker_reads_real_clips(kind):
    clips = _clips(40, 7)
    frames = clips.frames()
    if kind == "noisy":
        noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
        frames = (frames / 255 + 0.1 * noise).clamp(0, 1)
    elif kind == "blurred":
        frames = _blur(frames)
    accuracy = _accuracy(frames, clips.scenes)
    assert set(accuracy) == {"color", "shape", "motion", "background", "size"}
    assert min(accuracy.values()) >= 0.97, accuracy


def test_the_checker_is_at_chance_on_shuffled_labels():
    clips = _clips(64, 8)
    readings = [read(clip) for clip in clips.frames()]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    for name, chance in {"color": 1 / 8, "shape": 1 / 6, "motion": 1 / 6, "background": 1 / 2}.items():
        hits = sum(getattr(r, name) == getattr(clips.scenes[j], name) for r, j in zip(readings, order, strict=True))
        # Four standard deviations of a binomial.
        assert abs(hits / 64 - chance) < 4 * (chance * (1 - chance) / 64) ** 0.5


def test_nothing_is_read_from_nothing():
    assert read(torch.zeros(17, 64, 64, 3)).shape is None
    noise = read(torch.rand(17, 64, 64, 3, generator=torch.Generator().manual_seed(0)))
    assert noise.shape is None and noise.motion is None
    still = render([Scene("red", "ball", "moves left", "black")]).frames()[0][:1].expand(17, -1, -1, -1)
    assert read(still).shape == "ball" and read(still).motion is None


def test_other_layouts_are_refused():
    with pytest.raises(ValueError, match=r"frames: expected \[T, H, W, 3\], got \(3, 17, 64, 64\)"):
        read(torch.zeros(3, 17, 64, 64))
