"""Scenes, captions, pictures and the judge agree with each other."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
import random

import pytest

from svdq_cli.demo.world import (
    Scene,
    Thing,
    caption_of,
    is_held_out,
    parse_caption,
    render,
    sample_captions,
    sample_scene,
    write_prompt_lists,
)
from svdq_cli.errors import InputError
from tools.train_demo.judge import judge


def scenes(count: int) -> list[Scene]:
    rng = random.Random(7)
    return [sample_scene(rng) for _ in range(count)]


@pytest.mark.parametrize("long", [False, True])
def test_a_caption_reads_back_as_its_scene(long):
    for scene in scenes(300):
        assert parse_caption(caption_of(scene, long=long)) == scene


@pytest.mark.parametrize(
    "text", ["", "a cat", "a small red circle on white", "a small pink circle above on white"]
)
def test_text_outside_the_world_is_named_in_the_error(text):
    with pytest.raises(InputError, match="unknown"):
        parse_caption(text)


def test_the_judge_finds_everything_in_rendered_images():
    rng = random.Random(8)
    assert all(judge(render(scene, rng=rng), scene).everything for scene in scenes(60))


def test_the_judge_finds_nothing_right_in_the_image_of_another_caption():
    drawn = scenes(60)
    images = [render(scene) for scene in drawn]
    assert not any(judge(images[i - 1], scene).objects_and_colors for i, scene in enumerate(drawn))


def test_the_judge_names_the_attribute_that_is_wrong():
    red, blue = Thing("small", "red", "circle"), Thing("large", "blue", "square")
    asked = Scene((red, blue), "left of", "white")
    swapped = judge(render(Scene((blue, red), "left of", "white")), asked)
    assert swapped.objects_and_colors
    assert not swapped.layout
    resized = judge(render(Scene((Thing("large", "red", "circle"), blue), "left of", "white")), asked)
    assert resized.objects_and_colors
    assert not resized.sizes
    unbound = Scene((Thing("small", "red", "square"), Thing("large", "blue", "circle")), "left of", "white")
    assert not judge(render(unbound), asked).shapes
    assert not judge(render(Scene((red, blue), "left of", "pink")), asked).background
    assert not judge(render(Scene((red,), "in the center", "white")), asked).count


def test_an_image_of_any_size_can_be_judged():
    scene = scenes(1)[0]
    assert judge(render(scene, 192), scene).everything


def test_the_split_is_decided_by_the_image_and_not_by_the_wording():
    for scene in scenes(300):
        side = is_held_out(caption_of(scene))
        assert is_held_out(caption_of(scene, long=True)) == side
        if scene.layout == "left of":
            mirrored = Scene(scene.things[::-1], "right of", scene.background)
            assert is_held_out(caption_of(mirrored)) == side


def test_the_prompt_lists_come_from_the_two_sides_of_the_split(tmp_path):
    calibration, evaluation = (
        path.read_bytes().decode().splitlines() for path in write_prompt_lists(tmp_path)
    )
    assert len(set(calibration)) == len(set(evaluation)) == 64
    assert not any(map(is_held_out, calibration))
    assert all(map(is_held_out, evaluation))


def test_the_committed_prompt_lists_are_the_generated_ones(tmp_path):
    from pathlib import Path

    committed = Path(__file__).parents[2] / "calib_prompts"
    for path in write_prompt_lists(tmp_path):
        assert (committed / path.name).read_bytes() == path.read_bytes()


def test_sampled_captions_are_different_and_repeatable():
    captions = sample_captions(50, held_out=True, seed=3)
    assert len(set(captions)) == 50
    assert captions == sample_captions(50, held_out=True, seed=3)
