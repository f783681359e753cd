"""Tiny random pipelines of classes that svdq has no family file for: the library's own, small widths, random weights.

`make pipelines` takes all of them from calibration to an image, with those of `tests/tiny_families.py`; the tests take
those that need no more than a few seconds (`FAST`).
"""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
from PIL import Image

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pipelines.generate import generate_one
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe
from svdq_cli.reports import ConvertReport
from svdq_cli.source import open_source
from tests.tiny_families import PIPELINES as FAMILIES
from tests.tiny_families import save_tiny
from tests.tiny_pipelines import images, modular, processors, sounds, videos


@dataclass(frozen=True, slots=True)
class Tiny:
    """A tiny pipeline, and what it can be sampled with."""

    make: Callable[[], diffusers.DiffusionPipeline]
    size: int = 32  # of its images, in pixels
    frames: int | None = None  # of its videos
    image: bool = False  # whether it starts from one
    mask: bool = False  # whether it changes a part of it
    package: str | None = None  # without which it can't be made
    video: bool = False  # whether it takes the motion of one


_WITH_PROCESSORS = {
    name: replace(tiny, package="torchvision")
    for name, tiny in {
        "qwen-image-2.1": Tiny(processors.tiny_qwen_image_21),
        "qwen-image-2.1-edit": Tiny(processors.tiny_qwen_image_21, image=True),
        # their images have an area of 1024 x 1024 pixels, whatever is asked for
        "qwen-image-edit-i2i": Tiny(processors.tiny_qwen_image_edit, image=True),
        "qwen-image-edit-plus": Tiny(processors.tiny_qwen_image_edit_plus, image=True),
        "bria-fibo2": Tiny(processors.tiny_bria_fibo2, size=64),
        "bria-fibo2-edit": Tiny(processors.tiny_bria_fibo2, size=64, image=True),
        "glm-image": Tiny(processors.tiny_glm_image, size=64),
        "joy-image-edit": Tiny(processors.tiny_joy_image_edit, size=1024, image=True),
        "joy-image-edit-plus": Tiny(processors.tiny_joy_image_edit_plus, size=1024, image=True),
        "kandinsky6": Tiny(processors.tiny_kandinsky6, frames=5),
        "dreamlite": Tiny(processors.tiny_dreamlite),
        "dreamlite-edit": Tiny(processors.tiny_dreamlite, image=True),
        "omnigen": Tiny(processors.tiny_omnigen),
    }.items()
}
PIPELINES: Mapping[str, Tiny] = {
    **{name: Tiny(make) for name, make in FAMILIES.items() if not name.startswith(("wan", "flux-"))},
    "flux": Tiny(images.tiny_flux),
    "flux-kontext": Tiny(FAMILIES["flux-kontext"], image=True),
    "flux-fill": Tiny(FAMILIES["flux-fill"], image=True, mask=True),
    "chroma-i2i": Tiny(images.tiny_chroma_i2i, image=True),
    "z-image-i2i": Tiny(images.tiny_z_image_i2i, image=True),
    "nucleus": Tiny(images.tiny_nucleus),
    "krea2": Tiny(images.tiny_krea2),
    "lumina": Tiny(images.tiny_lumina),
    "lumina2": Tiny(images.tiny_lumina2),
    "auraflow": Tiny(images.tiny_auraflow),
    "ovis": Tiny(images.tiny_ovis),
    "cogview3": Tiny(images.tiny_cogview3),
    "cogview4": Tiny(images.tiny_cogview4),
    "bria": Tiny(images.tiny_bria),
    "bria-fibo": Tiny(images.tiny_bria_fibo),
    "ernie": Tiny(images.tiny_ernie),
    "longcat": Tiny(images.tiny_longcat),
    "prx": Tiny(images.tiny_prx),
    "hunyuan-dit": Tiny(images.tiny_hunyuan_dit, size=64),
    "hunyuan-image": Tiny(images.tiny_hunyuan_image),
    "kandinsky3": Tiny(images.tiny_kandinsky3, size=64),
    # the smallest of the sizes that it knows
    "kandinsky5-t2i": Tiny(images.tiny_kandinsky5_t2i, size=1024),
    # it draws images of one area
    "hidream": Tiny(images.tiny_hidream, size=256),
    "cogvideox": Tiny(videos.tiny_cogvideox, frames=5),
    "ltx": Tiny(videos.tiny_ltx, frames=9),
    "latte": Tiny(videos.tiny_latte, frames=2),
    "ltx-i2v": Tiny(videos.tiny_ltx_i2v, frames=9, image=True),
    "ltx2": Tiny(videos.tiny_ltx2, frames=9),
    "wan": Tiny(FAMILIES["wan"], frames=5),
    "wan-2.2": Tiny(FAMILIES["wan-2.2"], frames=5),
    "wan-i2v": Tiny(videos.tiny_wan_i2v, frames=5, image=True),
    "wan-vace": Tiny(videos.tiny_wan_vace, frames=5),
    "chronoedit": Tiny(videos.tiny_chronoedit, frames=5, image=True),
    "anyflow": Tiny(videos.tiny_anyflow, frames=5),
    "skyreels": Tiny(videos.tiny_skyreels, frames=5),
    "hunyuan-video": Tiny(videos.tiny_hunyuan_video, frames=5),
    "hunyuan-video-1.5": Tiny(videos.tiny_hunyuan_video_15, frames=5),
    "kandinsky5": Tiny(videos.tiny_kandinsky5, frames=5),
    "allegro": Tiny(videos.tiny_allegro, frames=24),
    "mochi": Tiny(videos.tiny_mochi, frames=7),
    "sana-video": Tiny(videos.tiny_sana_video, frames=5),
    "easyanimate": Tiny(videos.tiny_easyanimate, frames=5),
    "svd": Tiny(videos.tiny_svd, frames=2, image=True),
    "modelscope": Tiny(videos.tiny_modelscope, frames=2),
    "animatediff": Tiny(videos.tiny_animatediff, frames=2),
    # its chunks are those of 81 frames
    "anyflow-far": Tiny(videos.tiny_anyflow_far, frames=81),
    "helios": Tiny(videos.tiny_helios, frames=5),
    "framepack": Tiny(videos.tiny_framepack, frames=5, image=True),
    "amused": Tiny(images.tiny_amused),
    "ideogram4": Tiny(images.tiny_ideogram4),
    "motif-video": Tiny(videos.tiny_motif_video, frames=5),
    "stable-audio": Tiny(sounds.tiny_stable_audio),
    "stable-audio-3": Tiny(sounds.tiny_stable_audio_3),
    "longcat-audio": Tiny(sounds.tiny_longcat_audio),
    "ace-step": Tiny(sounds.tiny_ace_step),
    **_WITH_PROCESSORS,
    "flux3": Tiny(modular.tiny_flux3),
    "flux3-edit": Tiny(modular.tiny_flux3, image=True),
    "flux3-distilled": Tiny(modular.tiny_flux3_distilled),
    "minimax-h3": Tiny(modular.tiny_minimax_h3, frames=124),
    "minimax-music3": Tiny(modular.tiny_minimax_music3),
    "wan-animate-2": Tiny(modular.tiny_wan_animate_2, frames=5, image=True, video=True),
    **{f"modular-{name}": Tiny(make) for name, make in modular.OF_PLAIN.items()},
    "modular-wan": Tiny(modular.tiny_wan, frames=5),
    "modular-wan-2.2": Tiny(modular.tiny_wan_2_2, frames=5),
}
FAST = (
    "nucleus",
    "krea2",
    "lumina2",
    "cogview4",
    "ernie",
    "longcat",
    "prx",
    "hunyuan-video",
    "kandinsky5",
    "wan-vace",
    "flux3",
)


def is_possible(name: str) -> bool:
    """Whether the package that a tiny pipeline needs is installed and works."""
    if (package := PIPELINES[name].package) is None:
        return True
    try:
        importlib.import_module(package)
    except Exception:  # one that was built for another torch fails in ways of its own
        return False
    return True


def round_trip(name: str, folder: Path) -> ConvertReport:
    """A tiny pipeline calibrated and converted, its checkpoint checked against it, loaded, and an image generated from
    it. Raises what goes wrong; AssertionError where the check finds something, or the image is of one color."""
    tiny, cpu = PIPELINES[name], RunOptions(device="cpu")
    source, out = save_tiny(tiny.make, folder / "source"), folder / "out"
    recipe = recipe_of(source, tiny)
    report = convert(recipe, out, options=cpu)
    assert check(out, against=open_source(source)).status == "ok"
    settings = sampling_for(recipe, open_source(source)).settings
    made = generate_one(load_pipeline(out, device="cpu"), "a red circle", settings=settings)
    assert made.frames or made.sound
    assert all(len(image.getcolors(maxcolors=image.width * image.height) or ()) > 1 for image in made.frames)
    assert made.sound is None or made.sound.samples.std() > 0
    return report


def recipe_of(source: Path, tiny: Tiny) -> Recipe:
    """Two samples of two steps, calibrated as a user would."""
    prompts = source.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    image, video = source.parent / "first.png", source.parent / "motion.webp"
    frames = [Image.effect_noise((tiny.size, tiny.size), 60) for _ in range(tiny.frames or 1)]
    frames[0].save(image)
    frames[0].save(video, save_all=True, append_images=frames[1:], lossless=True)
    calibration = Calibration(
        prompts=str(prompts),
        samples=2,
        steps=2,
        height=tiny.size,
        width=tiny.size,
        frames=tiny.frames,
        image=str(image) if tiny.image else None,
        mask=str(image) if tiny.mask else None,
        video=str(video) if tiny.video else None,
        max_sequence_length=16,
        rows=128,
    )
    quantization = Quantization.model_validate({"rank": 16, "smoothing": "closed-form"})
    return default_recipe(str(source), calibration=calibration, quantization=quantization)
