from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from svdq_cli.calibration import (
    Calibration,
    CalibrationFacts,
    SamplingSettings,
    artefact,
    open_calibration,
    save_calibration,
)
from svdq_cli.calibration.covariance import stored_covariance
from svdq_cli.errors import InputError, OutOfResourcesError, UsageError
from svdq_cli.records import ActivationStats, InputCovariance

FACTS = CalibrationFacts(
    svdq_version="1.2.3",
    model_class="FluxTransformer2DModel",
    family="flux",
    source_sha256="ab" * 32,
    settings=SamplingSettings(steps=4, guidance=None, height=16, width=16, seed=1),
    prompts_sha256="cd" * 32,
    prompts_count=3,
)


def _stats(name: str, *, k: int, rows: int, seed: int) -> ActivationStats:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, k, generator=generator).bfloat16()
    moment = torch.rand(k, generator=generator)
    return ActivationStats(name, moment * 3, moment, sample, tokens_seen=100 + rows)


def _covariance(*, k: int, seed: int) -> InputCovariance:
    x = torch.randn(300, k, generator=torch.Generator().manual_seed(seed))
    return stored_covariance(x.mean(0), torch.cov(x.T, correction=0), 300)


STATS = {
    s.name: s
    for s in (
        _stats("blocks.0.to_q", k=128, rows=17, seed=0),
        _stats("blocks.0.ff", k=1, rows=1, seed=1),
        replace(_stats("blocks.1.to_q", k=129, rows=40, seed=2), covariance=_covariance(k=129, seed=3)),
    )
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_calibration(tmp_path / "calib", STATS, FACTS)
    return tmp_path / "calib"


def test_what_is_saved_is_what_is_opened(saved: Path):
    calibration = open_calibration(saved)
    assert calibration.names == tuple(STATS)
    assert calibration.manifest.facts == FACTS
    assert calibration.manifest.bytes == (saved / "stats-00001.safetensors").stat().st_size
    for name, stats in STATS.items():
        found = calibration.stats(name)
        for part in ("abs_max", "second_moment", "rows"):
            assert torch.equal(getattr(found, part), getattr(stats, part))
            assert getattr(found, part).dtype == getattr(stats, part).dtype
        assert (found.name, found.tokens_seen) == (name, stats.tokens_seen)
        assert (found.covariance is None) == (stats.covariance is None)
        if found.covariance is not None and stats.covariance is not None:
            assert found.covariance.tokens == 300
            for part in ("mean", "deviation", "correlations"):
                assert torch.equal(getattr(found.covariance, part), getattr(stats.covariance, part))
    entry = calibration.manifest.inputs[0]
    assert (entry.k, entry.rows, entry.tokens_seen) == (128, 17, 117)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["calib"]


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path):
    save_calibration(tmp_path / "again", STATS, FACTS)
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_the_digest_stands_for_what_matters(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    digest = open_calibration(saved).digest

    def digest_of(facts: CalibrationFacts, stats: dict[str, ActivationStats] = STATS) -> str:
        return save_calibration(tmp_path / "other", stats, facts, overwrite=True).digest

    assert digest_of(replace(FACTS, svdq_version="9")) == digest
    assert digest_of(replace(FACTS, settings=replace(FACTS.settings, batch_size=4))) == digest
    assert digest_of(replace(FACTS, settings=replace(FACTS.settings, steps=5))) != digest
    assert digest_of(replace(FACTS, prompts_sha256="00")) != digest
    assert digest_of(replace(FACTS, source_sha256=None)) != digest
    assert digest_of(FACTS, {**STATS, "blocks.0.ff": _stats("blocks.0.ff", k=1, rows=1, seed=9)}) != digest
    other = replace(STATS["blocks.1.to_q"], covariance=_covariance(k=129, seed=4))
    assert digest_of(FACTS, {**STATS, "blocks.1.to_q": other}) != digest
    monkeypatch.setattr(artefact, "MAX_FILE_BYTES", 1)
    assert digest_of(FACTS) == digest


def test_a_folder_of_a_version_without_covariances_is_read(tmp_path: Path):
    old = {name: replace(stats, covariance=None) for name, stats in STATS.items()}
    save_calibration(tmp_path / "calib", old, FACTS)
    manifest = tmp_path / "calib" / "manifest.json"
    said = json.loads(manifest.read_text())
    for entry in said["inputs"]:
        assert entry.pop("covariance_tokens") == 0
    manifest.write_text(json.dumps(said))
    assert open_calibration(tmp_path / "calib").stats("blocks.1.to_q").covariance is None


def test_large_statistics_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(artefact, "MAX_FILE_BYTES", 6000)
    manifest = save_calibration(tmp_path / "calib", STATS, FACTS)
    assert [entry.file for entry in manifest.inputs] == [
        "stats-00001.safetensors",
        "stats-00001.safetensors",
        "stats-00002.safetensors",
    ]
    calibration = open_calibration(tmp_path / "calib")
    assert all(torch.equal(calibration.stats(name).rows, STATS[name].rows) for name in STATS)


def test_an_input_is_read_without_the_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(artefact, "MAX_FILE_BYTES", 1)
    save_calibration(tmp_path / "calib", STATS, FACTS)
    calibration = open_calibration(tmp_path / "calib")
    (tmp_path / "calib" / "stats-00001.safetensors").unlink()
    assert torch.equal(calibration.stats("blocks.1.to_q").rows, STATS["blocks.1.to_q"].rows)
    with pytest.raises(InputError, match=r"stats-00001\.safetensors"):
        calibration.stats("blocks.0.to_q")


def test_an_existing_path_is_kept_unless_told_otherwise(saved: Path, tmp_path: Path):
    before = (saved / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        save_calibration(saved, STATS, FACTS)
    assert (saved / "manifest.json").read_bytes() == before
    save_calibration(saved, {"blocks.0.ff": STATS["blocks.0.ff"]}, FACTS, overwrite=True)
    assert open_calibration(saved).names == ("blocks.0.ff",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib"]


def test_overwrite_never_removes_what_is_not_a_calibration(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("dear")
    with pytest.raises(UsageError, match="not a calibration"):
        save_calibration(tmp_path / "photos", STATS, FACTS, overwrite=True)
    assert (tmp_path / "photos" / "one.jpg").read_text() == "dear"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutOfResourcesError),
        (artefact.SafetensorError("I/O error: No space left on device (os error 28)"), OutOfResourcesError),
        (PermissionError(errno.EACCES, "Permission denied"), UsageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, expected: type[BaseException]
):
    save_calibration(tmp_path / "calib", STATS, FACTS)
    before = (tmp_path / "calib" / "manifest.json").read_bytes()

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(artefact, "save_tensors", fail)
    for target, overwrite in (("new", False), ("calib", True)):
        with pytest.raises(expected):
            save_calibration(tmp_path / target, STATS, FACTS, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["calib"]
    assert (tmp_path / "calib" / "manifest.json").read_bytes() == before


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def _cut(folder: Path) -> None:
    file = folder / "stats-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    (r"no readable manifest\.json", lambda folder: (folder / "manifest.json").unlink()),
    (r"manifest\.json: .*not valid JSON", lambda folder: (folder / "manifest.json").write_text("{")),
    (r"describes something else", lambda folder: (folder / "manifest.json").write_text("[]")),
    (r"describes something else", _edit(lambda m: m.update(kind="photos"))),
    (r"calibration schema 2", _edit(lambda m: m.update(schema=2))),
    (r"manifest\.json: .*a key is missing", _edit(lambda m: m.pop("prompts"))),
    (r"manifest\.json: .*a key is missing", _edit(lambda m: m["inputs"][0].pop("sha256"))),
    (r"manifest\.json: .*does not match its digest", _edit(lambda m: m["inputs"].pop())),
    (r"manifest\.json: .*does not match its digest", _edit(lambda m: m["settings"].update(steps=9))),
    (r"does not belong to it: \.\./x", _edit(lambda m: m["inputs"][0].update(file="../x.safetensors"))),
    (r"stats-00001\.safetensors: .*missing", lambda folder: (folder / "stats-00001.safetensors").unlink()),
    (r"stats-00001\.safetensors: .*bytes instead of", _cut),
]


@pytest.mark.parametrize(("says", "damage"), DAMAGE)
def test_a_damaged_calibration_is_refused_with_a_cure(
    saved: Path, says: str, damage: Callable[[Path], object]
):
    damage(saved)
    with pytest.raises(InputError, match=says) as caught:
        open_calibration(saved)
    assert "svdq calibrate" in str(caught.value.hint)


def test_a_missing_calibration_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="not a calibration"):
        open_calibration(tmp_path / "absent")


def _read_all(calibration: Calibration) -> list[ActivationStats]:
    return [calibration.stats(name) for name in calibration.names]


@pytest.mark.parametrize("position", [3, 60, -1])
def test_a_flipped_byte_is_found_when_its_input_is_read(saved: Path, position: int):
    file = saved / "stats-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)
    calibration = open_calibration(saved)
    with pytest.raises(InputError, match=r"stats-00001\.safetensors: damaged"):
        _read_all(calibration)


def test_a_name_of_another_model_is_refused(saved: Path):
    with pytest.raises(InputError, match=r"no statistics for 'unet\.to_q'"):
        open_calibration(saved).stats("unet.to_q")


def test_opening_a_calibration_does_not_import_diffusers():
    loaded = "any(name in sys.modules for name in ('diffusers', 'datasets'))"
    code = f"import sys, svdq_cli.calibration.artefact; sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
