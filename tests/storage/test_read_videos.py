"""Frames of the videos that pipelines start from."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from svdq_cli.errors import InputError
from svdq_cli.pipelines.settings import video_files
from svdq_cli.storage.videos import read_frames, write_video

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def write(path: Path) -> Path:
    write_video(path, [Image.new("RGB", (16, 16), color) for color in COLORS], fps=8)
    return path


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_frames_come_in_their_order_and_no_more_than_are_asked_for(suffix: str, tmp_path: Path):
    if suffix == ".mp4" and find_spec("av") is None:
        pytest.skip("needs the package av")
    video = write(tmp_path / f"video{suffix}")
    frames = read_frames(video)
    brightest = [max(range(3), key=lambda channel: frame.getpixel((8, 8))[channel]) for frame in frames]  # type: ignore[index]
    assert brightest == [0, 1, 2]
    assert len(read_frames(video, most=2)) == 2


def test_what_is_no_video_is_named(tmp_path: Path):
    (tmp_path / "broken.gif").write_text("no video")
    with pytest.raises(InputError, match=r"broken.gif: can't be read as a video"):
        read_frames(tmp_path / "broken.gif")


def test_a_folder_of_videos_has_at_least_one(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match="no video in this folder") as refusal:
        video_files(tmp_path)
    assert "a folder of videos" in str(refusal.value.hint)
    write(tmp_path / "b.gif")
    write(tmp_path / "a.png")
    assert [Path(file.path).name for file in video_files(tmp_path)] == ["a.png", "b.gif"]
