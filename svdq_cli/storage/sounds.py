"""Sounds: what they are in memory, and WAV files of them."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.storage.atomic import whole_file

SOUND_SUFFIX = ".wav"
_LEVELS = 32767  # of 16 bits, on either side of silence
_BYTES = 2  # a sample


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """`samples`: (channels, N) float32, -1 to 1, `rate` of them a second."""

    samples: Tensor
    rate: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[-1] / self.rate


def sound_of(samples: Tensor, rate: int) -> Sound:
    """Of a pipeline's samples, (N,) or (channels, N), or (N, channels) as some have it."""
    flat = samples.detach().float().cpu()
    if flat.ndim == 1:
        flat = flat[None]
    if flat.shape[0] > flat.shape[1]:  # no sound is shorter than its channels are many
        flat = flat.T
    return Sound(flat.contiguous(), rate)


def write_sound(path: Path, sound: Sound) -> None:
    """A whole WAV file, 16 bits a sample; what is louder than it can hold is cut off."""
    levels = (sound.samples.clamp(-1, 1) * _LEVELS).round().to(torch.int16)
    with whole_file(path) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(levels.shape[0])
        file.setsampwidth(_BYTES)
        file.setframerate(sound.rate)
        file.writeframes(levels.T.contiguous().numpy().tobytes())


def read_sound(path: Path) -> Sound:
    """What `write_sound` wrote. Raises InputError for anything else."""
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != _BYTES:
                raise wave.Error("not 16 bits a sample")
            channels, rate = file.getnchannels(), file.getframerate()
            read = bytearray(file.readframes(file.getnframes()))
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{path}: can't be read as a sound ({error})", where=str(path)) from error
    levels = torch.frombuffer(read, dtype=torch.int16) if read else torch.zeros(0, dtype=torch.int16)
    return Sound(levels.reshape(-1, channels).T.float() / _LEVELS, rate)
