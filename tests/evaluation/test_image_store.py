"""Pictures on disk: drawn once, found again, never taken from another run."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from svdq_cli.errors import InputError, UsageError
from svdq_cli.evaluation.image_store import (
    keep_image,
    open_image_store,
    read_image,
)

FACTS = {"settings": {"steps": 4, "image": ()}, "source": "abc"}
PROMPTS = ("a red circle", "a blue square", "a green star")


def red(level: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (level, 0, 0))


def test_a_second_run_finds_what_the_first_drew(tmp_path: Path):
    image_store = open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False)
    keep_image(image_store, "16bit", 1, red(7))
    again = open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False)
    assert again.missing("16bit", 3) == (0, 2)
    assert read_image(again, "16bit", 1).getpixel((0, 0)) == (7, 0, 0)


def test_images_come_back_bit_for_bit_under_their_index(tmp_path: Path):
    image_store = open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False)
    drawn = [Image.effect_noise((40, 24), 90).convert("RGB") for _ in range(3)]
    for index in (2, 0, 1):
        keep_image(image_store, "16bit", index, drawn[index])
    for index in range(3):
        assert read_image(image_store, "16bit", index).tobytes() == drawn[index].tobytes()


@pytest.mark.parametrize(
    ("facts", "prompts", "difference"),
    [
        ({**FACTS, "settings": {"steps": 5, "image": ()}}, PROMPTS, r'"steps": 4.*"steps": 5'),
        ({**FACTS, "source": "abd"}, PROMPTS, 'source "abc" there, "abd" here'),
        ({"source": "abc"}, PROMPTS, "settings"),
        (FACTS, ("a red circle", "a blue dot"), 'prompt 1 "a blue square" there, "a blue dot" here'),
    ],
)
def test_another_run_is_refused_and_the_difference_named(
    tmp_path: Path, facts: dict[str, object], prompts: tuple[str, ...], difference: str
):
    open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False)
    with pytest.raises(UsageError, match=difference) as caught:
        open_image_store(tmp_path / "run", facts, prompts, overwrite=False)
    assert caught.value.kind == "other-run"
    assert "--overwrite" in (caught.value.hint or "")


def test_more_prompts_continue_a_run_and_fewer_look_at_its_first(tmp_path: Path):
    first = open_image_store(tmp_path / "run", FACTS, PROMPTS[:2], overwrite=False)
    keep_image(first, "16bit", 1, red(1))
    assert open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False).missing("16bit", 3) == (0, 2)
    open_image_store(tmp_path / "run", FACTS, PROMPTS[:1], overwrite=False)
    with pytest.raises(UsageError, match="prompt 2"):
        open_image_store(tmp_path / "run", FACTS, (*PROMPTS[:2], "another"), overwrite=False)


def test_overwrite_generates_all_again(tmp_path: Path):
    image_store = open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False)
    keep_image(image_store, "16bit", 0, red(1))
    image_store = open_image_store(tmp_path / "run", {}, PROMPTS, overwrite=True)
    assert image_store.missing("16bit", 3) == (0, 1, 2)


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not written by svdq eval"):
            open_image_store(tmp_path, FACTS, PROMPTS, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_image_cut_short_is_named_with_its_cure(tmp_path: Path):
    image_store = open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False)
    keep_image(image_store, "16bit", 0, Image.effect_noise((64, 64), 90))
    path = image_store.path("16bit", 0)
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(InputError, match=r"0000\.png") as caught:
        read_image(image_store, "16bit", 0)
    assert "delete it" in (caught.value.hint or "")


def test_a_damaged_run_file_is_refused_until_overwritten(tmp_path: Path):
    open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json"):
        open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=False)
    open_image_store(tmp_path / "run", FACTS, PROMPTS, overwrite=True)
