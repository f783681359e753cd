"""Video files: what is written as which type, and frames that are read back one by one."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from svdq_cli.errors import EnvironmentLacksError, InputError, UsageError, first_line
from svdq_cli.storage.atomic import whole_file
from svdq_cli.storage.images import ANIMATED_SUFFIXES, write_image
from svdq_cli.storage.sounds import SOUND_SUFFIX, Sound

if TYPE_CHECKING:
    from PIL.Image import Image

ENCODED_SUFFIXES = (".mp4", ".mov", ".mkv")  # H.264, as diffusers writes it; these hold sound, too
VIDEO_SUFFIXES = (*ENCODED_SUFFIXES, *ANIMATED_SUFFIXES)
# What pipelines call the number of frames, and how many of them a second has
FRAME_ARGUMENTS = ("num_frames", "video_length", "frames", "segment_frame_length")
RATE_ARGUMENTS = ("frame_rate", "fps", "target_fps")
USUAL_FPS = 16.0
_CHANNELS = 2  # of a sound in a video, at most


def require_encoder(path: Path) -> None:
    """EnvironmentLacksError where a file of this type needs a package that is not installed."""
    if path.suffix.lower() in ENCODED_SUFFIXES:
        _require_av(path, "writing")


def _require_av(path: Path, doing: str) -> None:
    if importlib.util.find_spec("av") is None:
        raise EnvironmentLacksError(
            f"{path}: {doing} such a video needs the package av",
            hint=f'pip install "svdq[video]", or take {", ".join(ANIMATED_SUFFIXES)} (animated)',
            where="av",
        )


def holds_sound(path: Path) -> bool:
    """Whether a file of this type holds a sound."""
    return path.suffix.lower() in (*ENCODED_SUFFIXES, SOUND_SUFFIX)


def write_video(path: Path, frames: Sequence[Image], *, fps: float, sound: Sound | None = None) -> None:
    """A whole video file of the type that the suffix of `path` names. Animated images hold no sound: it is left out."""
    if path.suffix.lower() in ENCODED_SUFFIXES:
        _encode(path, frames, fps, sound)
    else:
        moving = {"save_all": True, "append_images": frames[1:], "duration": 1000 / fps, "loop": 0}
        write_image(path, frames[0], **moving)


def write_frames(path: Path, frames: Sequence[Image], *, fps: float) -> None:
    """An animated PNG, without loss, of exactly these frames, the equal ones among them too."""
    # Pillow joins equal frames in a row unless they are blended in different ways, which opaque ones do not show
    blend = list(islice(cycle((0, 1)), len(frames)))
    moving = {"save_all": True, "append_images": frames[1:], "duration": 1000 / fps, "loop": 0}
    write_image(path, frames[0], **moving, blend=blend)


def frames_in(image: Image) -> Iterator[Image]:
    """The frames of an opened image file in RGB, one after the other; one of a file that does not move."""
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        yield image.convert("RGB")


def read_frames(path: Path, *, most: int | None = None) -> list[Image]:
    """The frames of a video file in RGB, the first `most` of them. Raises InputError for what is none, and
    EnvironmentLacksError for a type that needs a package which is not installed."""
    if path.suffix.lower() in ENCODED_SUFFIXES:
        _require_av(path, "reading")
    from PIL.Image import DecompressionBombError

    try:
        frames = list(islice(_read(path), most))
    except (OSError, ValueError, DecompressionBombError) as error:  # av's own errors are OSErrors, too
        raise InputError(
            f"{path}: can't be read as a video ({first_line(error)})",
            hint=f"save it as {ENCODED_SUFFIXES[0]} (H.264), or as an animated {ANIMATED_SUFFIXES[0]}",
            where=str(path),
        ) from error
    if not frames:
        raise InputError(f"{path}: a video without frames", hint="give another one", where=str(path))
    return frames


def _read(path: Path) -> Iterator[Image]:
    if path.suffix.lower() not in ENCODED_SUFFIXES:
        from PIL import Image as pillow

        with pillow.open(path) as image:
            yield from frames_in(image)
        return
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_image()


def _encode(path: Path, frames: Sequence[Image], fps: float, sound: Sound | None) -> None:
    from diffusers.utils.export_utils import encode_video

    path.parent.mkdir(parents=True, exist_ok=True)
    # the encoder goes by the file's name, which `whole_file` gives no suffix
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".svdq-video-") as folder,
        whole_file(path) as partial,
    ):
        named = Path(folder) / f"video{path.suffix.lower()}"
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own
                encode_video(
                    list(frames),
                    fps=max(1, round(fps)),
                    output_path=str(named),
                    audio=None if sound is None else sound.samples[:_CHANNELS],
                    audio_sample_rate=None if sound is None else sound.rate,
                )
        except ValueError as error:  # what the encoder says of sizes and rates that it can't have
            raise UsageError(
                f"{path}: can't be written as a video: {first_line(error)}",
                hint=f"name the output {', '.join(ANIMATED_SUFFIXES)} (animated)",
                where=str(path),
            ) from error
        shutil.copyfile(named, partial)
