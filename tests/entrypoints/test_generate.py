"""`svdq generate` for models that read an image or make videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import svdq_cli
from svdq_cli.cli import run
from svdq_cli.conversion.convert import convert
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Quantization, default_recipe
from tests.tiny_families import tiny_pipeline


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image.png`, wider than high, and `mask.png`: its left half."""
    folder = tmp_path_factory.mktemp("images")
    Image.linear_gradient("L").resize((48, 16)).convert("RGB").save(folder / "image.png")
    mask = Image.new("L", (48, 16))
    mask.paste(255, (0, 0, 24, 16))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source = tiny_pipeline(family, folder / "source")
            quantization = Quantization.model_validate({"effort": "datafree", "rank": 16})
            convert(
                default_recipe(str(source), quantization=quantization),
                folder / "int4",
                options=RunOptions(device="cpu"),
            )
            made[family] = folder / "int4"
        return made[family]

    return of


def generated(checkpoint: Path, out: Path, images: Path, *words: str) -> Image.Image:
    """With `image.png` and `mask.png` where the words say so."""
    given = [str(images / word) if word.endswith(".png") else word for word in words]
    assert (
        run(["generate", str(checkpoint), "--prompt", "a", "-o", str(out), "--steps", "2", "-q", *given]) == 0
    )
    return Image.open(out)


def refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, out: Path, *words: str
) -> dict[str, object]:
    capsys.readouterr()
    code = run(
        ["generate", str(checkpoint), "--prompt", "a", "-o", str(out), "--steps", "2", "--json", *words]
    )
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "error", words
    assert code == said["error"]["code"] == 2
    assert not out.exists()
    return said["error"]


@pytest.fixture(scope="module")
def flux(converted_flux: Callable[[str], Path]) -> Path:
    return converted_flux("int4") / "lite"


def test_a_text_to_image_model_changes_an_image_as_diffusers_does(flux: Path, images: Path, tmp_path: Path):
    from diffusers import AutoPipelineForImage2Image

    found = generated(flux, tmp_path / "out.png", images, "--image", "image.png", "--strength", "0.5")
    pipe = AutoPipelineForImage2Image.from_pipe(svdq_cli.load_pipeline(flux, device="cpu"))
    expected = pipe(
        "a",
        image=Image.open(images / "image.png").resize((48, 16)),
        strength=0.5,
        guidance_scale=0.0,
        max_sequence_length=256,
        num_inference_steps=2,
        width=48,
        height=16,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert found.size == (48, 16)
    assert found.tobytes() == expected.tobytes()


def test_a_mask_fills_in_with_the_model_of_text_to_image(flux: Path, images: Path, tmp_path: Path):
    words = ("--image", "image.png", "--mask", "mask.png", "--strength", "1")
    found = generated(flux, tmp_path / "out.png", images, *words)
    whole = generated(flux, tmp_path / "whole.png", images, "--image", "image.png", "--strength", "1")
    assert found.size == (48, 16)
    assert found.tobytes() != whole.tobytes()


def test_the_sides_that_are_given_win_and_the_other_follows_the_image(
    flux: Path, images: Path, tmp_path: Path
):
    given = ("--image", "image.png", "--strength", "0.5")
    assert generated(flux, tmp_path / "1.png", images, *given, "--width", "32").size == (32, 16)
    assert generated(flux, tmp_path / "2.png", images, *given, "--width", "32", "--height", "32").size == (
        32,
        32,
    )


def test_a_photo_is_turned_as_its_camera_says(flux: Path, images: Path, tmp_path: Path):
    turned = Image.open(images / "image.png")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photo.jpg", exif=exif)
    words = ("--image", str(tmp_path / "photo.jpg"), "--strength", "0.5")
    assert generated(flux, tmp_path / "out.png", images, *words).size == (16, 48)


def test_models_that_fill_in_and_edit_read_their_images(
    converted: Callable[[str], Path], images: Path, tmp_path: Path
):
    fill, edit = converted("flux-fill"), converted("flux-kontext")
    first = generated(fill, tmp_path / "1.png", images, "--image", "image.png", "--mask", "mask.png")
    other = generated(fill, tmp_path / "2.png", images, "--image", "mask.png", "--mask", "mask.png")
    assert first.tobytes() != other.tobytes()
    edited = generated(edit, tmp_path / "3.png", images, "--image", "image.png")
    assert edited.tobytes() != generated(edit, tmp_path / "4.png", images, "--image", "mask.png").tobytes()


def test_a_video_is_written_as_an_animated_image(
    converted: Callable[[str], Path], images: Path, tmp_path: Path
):
    words = ("--width", "32", "--height", "32")
    video = generated(converted("wan"), tmp_path / "out.webp", images, *words, "--frames", "5")
    assert (video.n_frames, video.size) == (5, (32, 32))  # type: ignore[attr-defined]
    assert generated(converted("wan"), tmp_path / "one.jpg", images, *words, "--frames", "1").size == (32, 32)


def test_what_does_not_go_together_is_refused_in_words(
    flux: Path,
    converted: Callable[[str], Path],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    out, image, mask = tmp_path / "out.png", str(images / "image.png"), str(images / "mask.png")
    cases = [
        (flux, ("--mask", mask), "a mask without an image"),
        (flux, ("--strength", "0.5"), "a strength without an image"),
        (flux, ("--image", image, "--strength", "1.5"), "strength is 1.5"),
        (flux, ("--image", image, "--strength", "0.1"), "leaves none of the 2 steps"),
        (
            flux,
            (
                "--width",
                "33",
            ),
            "asked for 33x32 pixels",
        ),
        (
            converted("flux-kontext"),
            ("--image", image, "--strength", "0.5"),
            "FluxKontextPipeline takes no strength",
        ),
        (converted("flux-fill"), ("--image", image), "could not generate without mask"),
        (converted("wan"), ("--image", image), "WanPipeline takes no image"),
        (flux, ("--fps", "24"), "FluxPipeline makes no videos: it takes no fps"),
        (flux, ("--frames", "5", "--fps", "24"), "it takes no frames and no fps"),
    ]
    for checkpoint, words, message in cases:
        assert message in str(refused(capsys, checkpoint, out, *words)["message"]), words
    said = refused(capsys, converted("flux-fill"), out, "--image", image)
    assert "--mask" in str(said["hint"])
    assert "generates a video" in str(refused(capsys, converted("wan"), tmp_path / "v.jpg")["message"])
    moving = refused(capsys, flux, tmp_path / "v.mp4")
    assert moving["hint"] == "name the output .png, .jpg, .jpeg, .webp, .gif"


def test_eval_judges_with_the_image_that_is_given(
    flux: Path, tiny_flux: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def sixteen_bit(name: str, *words: str) -> bytes:
        capsys.readouterr()
        command = f"eval {flux} --against {tiny_flux} --samples 1 --steps 2 --report {tmp_path / name} --json"
        assert run([*command.split(), "--without", "naive,floor,own-noise,outputs", *words]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 1
        (file,) = (tmp_path / name / "16bit").glob("*.png")
        return Image.open(file).tobytes()

    image = ("--image", str(images / "image.png"))
    weak = sixteen_bit("weak", *image, "--strength", "0.5")
    assert weak != sixteen_bit("strong", *image, "--strength", "1")
    assert weak != sixteen_bit("text")
