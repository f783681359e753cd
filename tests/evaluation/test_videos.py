"""Videos and their sounds: written, read back, and judged frame by frame."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from svdq_cli.calibration import load_source_pipeline
from svdq_cli.cli import run
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError
from svdq_cli.evaluation.image_store import (
    ImageStore,
    keep_image,
    kept_sound,
    open_image_store,
    read_frames,
    read_image,
)
from svdq_cli.evaluation.outputs import record_outputs
from svdq_cli.evaluation.score import Scores, load_metrics, score_pairs
from svdq_cli.metrics.psnr import psnr_db
from svdq_cli.metrics.sound import SNR_CAP_DB, snr_db
from svdq_cli.metrics.temporal import temporal_psnr_db
from svdq_cli.pipelines.generated import Generated
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.options import RunOptions
from svdq_cli.records import ignore_events
from svdq_cli.storage.sounds import Sound
from tests.tiny_pipelines import PIPELINES, recipe_of, save_tiny


def noise(count: int, sigma: float = 60) -> list[Image.Image]:
    return [Image.effect_noise((24, 16), sigma).convert("RGB") for _ in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return open_image_store(tmp_path / "run", {}, ["a fox"], overwrite=False, fps=8)


def scored(store: ImageStore, reference: Generated, other: Generated) -> Scores:
    keep_image(store, "16bit", 0, reference)
    keep_image(store, "converted", 0, other)
    metrics = load_metrics(torch.device("cpu"), images=1).without_networks()
    return score_pairs(store, "16bit", "converted", ["a fox"], metrics, ignore_events, stage="score")


def test_frames_come_back_bit_for_bit_even_where_equal_ones_follow_each_other(store: ImageStore):
    first, second = noise(2)
    frames = [first, first, first, second, second]
    keep_image(store, "16bit", 0, Generated(tuple(frames)))
    assert [frame.tobytes() for frame in read_frames(store, "16bit", 0)] == [f.tobytes() for f in frames]
    assert read_image(store, "16bit", 0).size == (24, 4 * 16), "four of its frames, one below the other"


def test_a_video_is_scored_frame_by_frame(store: ImageStore):
    """Its PSNR is the mean of its frames' and not that of all pixels; the worst frame is told apart."""
    exact, other = noise(10), noise(10)
    other[3] = exact[3]
    found = scored(store, Generated(tuple(exact)), Generated(tuple(other)))
    by_frame = [psnr_db(a, b) for a, b in zip(exact, other, strict=True)]
    assert found.video is not None
    assert found.video.frames["psnr_db"] == [by_frame]
    assert found.per_image["psnr_db"] == [pytest.approx(sum(by_frame) / 10)]
    facts = found.video.facts(8.0)
    assert (facts.frames, facts.worst_frame_psnr_db.mean) == (10, min(by_frame))
    assert facts.audio_snr_db is None


def test_a_constant_error_does_not_flicker_and_a_changing_one_does(store: ImageStore):
    exact = [Image.new("RGB", (24, 16), (100, 100, 100))] * 3
    brighter = [Image.new("RGB", (24, 16), (110, 110, 110))] * 3
    assert temporal_psnr_db((exact[0], exact[1]), (brighter[0], brighter[1])) == 100
    flicker = [brighter[0], Image.new("RGB", (24, 16), (90, 90, 90)), brighter[2]]
    found = scored(store, Generated(tuple(exact)), Generated(tuple(flicker)))
    assert found.video is not None
    assert psnr_db(exact[1], flicker[1]) == psnr_db(exact[0], brighter[0])
    # differences of 20 levels, against errors of 10: twice the error, 6 dB
    assert found.video.temporal_psnr_db[0] == pytest.approx(found.per_image["psnr_db"][0] - 6.02, abs=0.01)


def test_a_lost_frame_is_said(store: ImageStore):
    frames = noise(3)
    with pytest.raises(InputError, match="not as many frames"):
        scored(store, Generated(tuple(frames)), Generated(tuple(frames[:2])))


def test_sounds_are_compared_in_db():
    sound = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)) - 0.5
    assert snr_db(sound, sound) == SNR_CAP_DB
    assert snr_db(sound, 0.9 * sound) == pytest.approx(20.0)
    assert snr_db(torch.zeros(1, 4), torch.ones(1, 4)) == -SNR_CAP_DB


def test_a_sound_is_kept_next_to_its_video(store: ImageStore):
    sound = Sound(torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1, 8000)
    found = scored(store, Generated(tuple(noise(2)), sound), Generated(tuple(noise(2)), sound))
    assert found.video is not None
    assert found.video.audio_snr_db == [SNR_CAP_DB]
    kept = kept_sound(store, "16bit", 0)
    assert kept is not None
    assert kept.rate == 8000
    # 16 bits
    torch.testing.assert_close(kept.samples, sound.samples, atol=1 / 32767, rtol=0)


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """LTX-2, which makes videos with sound, and its checkpoint."""
    folder = tmp_path_factory.mktemp("ltx2")
    source = save_tiny(PIPELINES["ltx2"].make, folder / "source")
    convert(recipe_of(source, PIPELINES["ltx2"]), folder / "int4", options=RunOptions(device="cpu"))
    return source, folder / "int4"


def test_an_evaluation_of_videos_with_sound_says_what_images_have_not(
    ltx2: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, checkpoint = ltx2
    words = (
        f"eval {checkpoint} --against {source} --samples 2 --without nf4,own-noise,floor,outputs --json -q"
    )
    summary, report = tmp_path / "summary.md", tmp_path / "report"
    assert run([*words.split(), "--report", str(report), "--summary", str(summary)]) == 0
    said = json.loads(capsys.readouterr().out)
    for video in (said["video"], said["baselines"]["rtn"]["video"]):
        assert (video["frames"], video["fps"]) == (9, 24.0)
        assert video["worst_frame_psnr_db"]["mean"] < said["psnr_db"]["max"]
        assert 0 < video["temporal_psnr_db"]["mean"] < 100
        assert 0 < video["audio_snr_db"]["mean"] < SNR_CAP_DB
    assert "sound SNR (dB)" in summary.read_text()
    page = (report / "report.html").read_text()
    assert "frame to frame PSNR (dB)" in page
    assert "9 frames a video" in page
    (first, _) = json.loads((report / "pictures.json").read_text())
    assert len(first["converted"]["frames"]["ssim"]) == 9


def test_a_gate_on_sound_that_there_is_not_is_missed(ltx2: tuple[Path, Path], tmp_path: Path):
    source, checkpoint = ltx2
    words = f"eval {checkpoint} --against {source} --samples 1 --without naive,nf4,own-noise,floor,outputs --json -q"
    assert run([*words.split(), "--fail-if", "audio_snr_db<-100"]) == 0
    assert run([*words.split(), "--fail-if", "temporal_psnr_db<100"]) == 6


def test_a_video_file_holds_the_sound(ltx2: tuple[Path, Path], tmp_path: Path):
    av = pytest.importorskip("av")
    out = tmp_path / "fox.mp4"
    assert run(["generate", str(ltx2[1]), "--prompt", "a fox", "-o", str(out), "--fps", "12", "-q"]) == 0
    with av.open(str(out)) as file:
        assert [stream.codec_context.name for stream in file.streams] == ["h264", "aac"]
        assert file.streams.video[0].average_rate == 12
        assert sum(1 for _ in file.decode(video=0)) == 9
    assert list(tmp_path.iterdir()) == [out]


def test_the_outputs_of_a_pipeline_that_takes_one_prompt_at_a_time_are_of_one(tmp_path: Path):
    source = save_tiny(PIPELINES["wan-vace"].make, tmp_path / "source")
    pipe = load_source_pipeline(source, dtype=torch.float32)
    settings = SamplingSettings(steps=2, guidance=1.0, height=32, width=32, seed=0, frames=5)
    calls = record_outputs(pipe, ["transformer"], ["a red circle", "a blue square"], settings, ignore_events)
    assert [call.output.shape[0] for call in calls] == [1, 1], "a step each"
