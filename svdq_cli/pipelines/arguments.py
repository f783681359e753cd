"""What a diffusers pipeline is called with: the settings in the words of its own signature."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdq_cli.errors import InputError, UsageError
from svdq_cli.pipelines.settings import ImageFile, SamplingSettings
from svdq_cli.storage.videos import FRAME_ARGUMENTS, RATE_ARGUMENTS, read_frames

if TYPE_CHECKING:
    from PIL.Image import Image

ONE_AT_A_TIME = "use a batch size of 1: --batch-size 1, or batch_size under calibration in the recipe"

# What pipelines call the inputs that a recipe may name; the first that a pipeline takes is meant.
INPUT_NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "images"),
    "mask": ("mask_image", "mask"),
    "video": ("driving_video", "video"),
    "strength": ("strength",),
    "frames": FRAME_ARGUMENTS,
    "fps": RATE_ARGUMENTS,
}

_SCHEDULE = "guidance_schedule"

# What is sung where a pipeline sings, and prompts describe the music alone
_LYRICS = "[verse]\nMorning light is on the water\n[chorus]\nSing it once again"

# Pipelines that guide, and break where they are given no negative prompt
_WANT_NEGATIVE = ("EasyAnimatePipeline", "EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline")


# Pipelines to whose prompts belong lists of images, one for each prompt
_IMAGES_OF_EACH = ("GlmImagePipeline", "JoyImageEditPlusPipeline")
# Pipelines that show every prompt of a batch all images of a list
_IMAGES_OF_ALL = (
    "BriaFibo2Pipeline",
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "QwenImage21Pipeline",
    "QwenImageEditPlusPipeline",
    "ZImageOmniPipeline",
)


# Pipelines that give the denoiser another text for a prompt among several: cut to its length alone, else padded
_OTHERWISE_ALONE = ("LattePipeline",)


def optional_arguments(
    settings: SamplingSettings, *, accepted: Mapping[str, Parameter], pipeline: str, images: Sequence[int]
) -> dict[str, Any]:
    """Everything beyond prompt, steps, size and generator. `accepted`: the parameters of the pipeline's call by name.
    `images`: indices of the images to generate.

    Raises UsageError, naming it, for a setting that the pipeline has no argument for.
    """
    if pipeline in _OTHERWISE_ALONE and len(images) > 1:
        raise UsageError(
            f"{pipeline} reads a prompt otherwise among {len(images)} than alone: its images depend on their batch",
            hint=ONE_AT_A_TIME,
        )
    arguments: dict[str, Any] = {**_as_large_as_asked(settings), **_guided(settings, accepted)}
    if settings.max_sequence_length is not None:
        arguments["max_sequence_length"] = settings.max_sequence_length
    if settings.true_cfg > 1:
        if "true_cfg_scale" not in accepted:
            raise UsageError(
                f"{pipeline} has no true classifier-free guidance",
                hint="leave true_cfg at 1 and set guidance instead",
            )
        arguments["true_cfg_scale"] = settings.true_cfg
        arguments["negative_prompt"] = "" if len(images) == 1 else [""] * len(images)
    if pipeline in _WANT_NEGATIVE:
        arguments.setdefault("negative_prompt", "" if len(images) == 1 else [""] * len(images))
    for name, value in (("strength", settings.strength), ("frames", settings.frames)):
        if value:
            arguments[_argument(name, accepted, pipeline)] = value
    if settings.fps is not None and (rate := argument_of("fps", accepted)):
        # most models do not read it: it is then the rate at which their videos are shown
        arguments[rate] = int(settings.fps) if settings.fps.is_integer() else settings.fps
    for name, files in (("image", settings.image), ("mask", settings.mask)):
        if files:
            read = _images(files, images, settings, mask=name == "mask")
            if name == "image":
                read = _as_the_pipeline_takes(read, pipeline, alike=len(files) == 1)
            arguments[_argument(name, accepted, pipeline)] = read
    if settings.video:
        arguments[_argument("video", accepted, pipeline)] = _videos(settings.video, images, settings)
    lyrics = accepted.get("lyrics")
    if lyrics is not None and lyrics.default in (None, Parameter.empty):
        arguments["lyrics"] = _LYRICS
    return arguments


def _guided(settings: SamplingSettings, accepted: Mapping[str, Parameter]) -> dict[str, Any]:
    """How strongly the prompt counts. A pipeline that has a value for each of its own number of steps (Ideogram 4) gets
    these spread over the steps that are asked for, or none beside the one value that is."""
    found: dict[str, Any] = {} if settings.guidance is None else {"guidance_scale": settings.guidance}
    if (schedule := accepted.get(_SCHEDULE)) is not None and isinstance(schedule.default, tuple):
        values = schedule.default
        spread = [values[step * len(values) // settings.steps] for step in range(settings.steps)]
        found[_SCHEDULE] = spread if settings.guidance is None else None
    return found


def missing_inputs(settings: SamplingSettings, accepted: Collection[str]) -> list[str]:
    """Recipe keys of inputs that the pipeline takes and that were not given."""
    given = {
        "image": settings.image,
        "mask": settings.mask,
        "video": settings.video,
        "frames": settings.frames,
    }
    return [
        name for name, value in given.items() if not value and any(n in accepted for n in INPUT_NAMES[name])
    ]


def _as_the_pipeline_takes(read: Image | list[Image], pipeline: str, *, alike: bool) -> Any:
    """Images of a batch's prompts in the form in which each prompt sees its own. UsageError where no form is."""
    each = read if isinstance(read, list) else [read]
    if pipeline in _IMAGES_OF_EACH:
        return [[image] for image in each]
    if pipeline in _IMAGES_OF_ALL and len(each) > 1:
        if not alike:
            raise UsageError(
                f"{pipeline} shows every prompt of a batch the images of all of them",
                hint="use a batch size of 1, or one image for all prompts",
            )
        return each[0]
    return read


def _as_large_as_asked(settings: SamplingSettings) -> dict[str, Any]:
    """Pipelines that round the size to one of their own (PixArt, SANA) or scale to an area (FLUX.1 Kontext) are told
    not to: activations come from images of the size that the recipe names, and from prompts as they are written, by
    which text encoders alone have run."""
    return {
        "use_resolution_binning": False,
        "max_area": settings.height * settings.width,
        # of the images that Qwen-Image 2.1 starts from: the side of a square with as many pixels
        "output_resolution": round(math.sqrt(settings.height * settings.width)),
        "_auto_resize": False,
        "clean_caption": False,
        "enable_prompt_rewrite": False,
        # the prompt enhancer of ERNIE-Image, a language model that writes other words each time
        "use_pe": False,
    }


def argument_of(name: str, accepted: Collection[str]) -> str | None:
    """What a pipeline calls an input of `INPUT_NAMES`; None where it takes none of the kind. `accepted`: the names of
    its arguments."""
    return next((argument for argument in INPUT_NAMES[name] if argument in accepted), None)


def _argument(name: str, accepted: Collection[str], pipeline: str) -> str:
    found = argument_of(name, accepted)
    if found is None:
        raise UsageError(
            f"{pipeline} takes no {name}",
            hint=f"leave it out: --{name}, or {name} in the recipe's calibration",
        )
    return found


def _images(
    files: tuple[ImageFile, ...], indices: Sequence[int], settings: SamplingSettings, *, mask: bool
) -> Image | list[Image]:
    """The images of a batch, scaled to the size that is generated; one alone is not put into a list, which some
    pipelines take for several images of one prompt."""
    read = [opened_image(files[index % len(files)], mask=mask) for index in indices]
    scaled = [image.resize((settings.width, settings.height)) for image in read]
    return scaled[0] if len(scaled) == 1 else scaled


def _videos(files: tuple[ImageFile, ...], indices: Sequence[int], settings: SamplingSettings) -> list[Any]:
    """The frames of a batch's videos, no more than are generated, scaled to the size that is; those of one alone."""
    size = (settings.width, settings.height)
    read = [
        [
            frame.resize(size)
            for frame in read_frames(Path(files[index % len(files)].path), most=settings.frames)
        ]
        for index in indices
    ]
    return read[0] if len(read) == 1 else read


def opened_image(file: ImageFile, *, mask: bool = False) -> Image:
    """An image file in RGB, or gray for a mask, upright. InputError for what is not an image, or too large to be
    one."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file.path) as image:
            return ImageOps.exif_transpose(image).convert("L" if mask else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:  # Pillow's own error is an OSError
        raise InputError(
            f"{file.path}: can't be read as an image ({error})", hint="save it as PNG", where=file.path
        ) from error
