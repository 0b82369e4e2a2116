"""The grammar: sentences to scenes and back, and the held-out rule."""

import pytest

from pyvideo_kernels.tiny.grammar import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, all_scenes, parse, vocabulary


def test_every_scene_survives_the_round_trip():
    scenes = list(all_scenes())
    assert len(scenes) == len(set(scenes)) == 8 * 6 * 6 * 2 * 3
    assert all(parse(scene.prompt) == scene for scene in scenes)


def test_the_example_sentence():
    expected = Scene("red", "ball", "moves left", "black")
    assert parse("a red ball moves left on a black background") == expected
    assert parse("  A RED ball  moves left on a black background.") == expected
    assert expected.prompt == "a red ball moves left on a black background"


@pytest.mark.parametrize(
    "sentence",
    ["", "a red ball", "a red ball moves on a black background", "a huge red ball grows on a gray background"],
)
def test_other_sentences_are_refused(sentence):
    assert parse(sentence) is None


def test_a_scene_names_the_bad_field():
    with pytest.raises(ValueError, match="shape: expected one of .*'ball'.*, got 'cube'"):
        Scene("red", "cube", "grows", "gray")


def test_held_out_depends_on_color_shape_and_motion_alone():
    triples = {}
    for scene in all_scenes():
        triples.setdefault((scene.color, scene.shape, scene.motion), set()).add(scene.held_out)
    assert all(len(answers) == 1 for answers in triples.values())
    share = sum(answers == {True} for answers in triples.values()) / len(triples)
    assert 0.08 < share < 0.16


def test_every_word_and_every_pair_is_seen_in_training():
    seen = [scene for scene in all_scenes() if not scene.held_out]
    assert {(s.color, s.shape) for s in seen} == {(c, s) for c in COLORS for s in SHAPES}
    assert {(s.shape, s.motion) for s in seen} == {(s, m) for s in SHAPES for m in MOTIONS}
    assert {(s.color, s.motion) for s in seen} == {(c, m) for c in COLORS for m in MOTIONS}
    assert {s.background for s in seen} == set(BACKGROUNDS)


def test_the_split_never_moves():
    held = sorted({f"{s.color} {s.shape} {s.motion}" for s in all_scenes() if s.held_out})
    assert held[:3] == ["blue diamond moves down", "blue square grows", "blue triangle moves up"]
    assert len(held) == 37


def test_vocabulary():
    words = vocabulary()
    assert words == sorted(set(words)) and {"a", "on", "background", "moves", "ring"} <= set(words)
