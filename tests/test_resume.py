"""A conversion that ends early goes on where it stood, to the same bytes; and only if it is the same conversion."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdq_cli import writing
from svdq_cli.conversion import run as converting
from svdq_cli.conversion import solving
from svdq_cli.errors import InterruptedRunError, OutOfResourcesError, SvdqError, Terminated, UsageError
from svdq_cli.pipeline import check, convert
from svdq_cli.preparing import RunOptions
from svdq_cli.recipe import Quantization, Recipe, default_recipe
from svdq_cli.records import Event
from svdq_cli.source import open_source

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
CPU = RunOptions(device="cpu")
RESUME = RunOptions(device="cpu", resume=True)


def recipe_for(source: Path, *, rank: int = 16) -> Recipe:
    quantization = Quantization.model_validate({"rank": rank, "effort": "datafree"})
    return default_recipe(str(source), quantization=quantization)


def stopped_after(inputs: int) -> Callable[[Event], None]:
    """An observer in which SIGTERM arrives once so many inputs are solved."""
    seen = 0

    def observe(event: Event) -> None:
        nonlocal seen
        seen += event.kind == "advance" and event.stage == "solve"
        if seen == inputs:
            raise Terminated

    return observe


def begun(source: Path, out: Path, *, inputs: int = 4) -> SvdqError:
    """A conversion that was told to stop after some inputs."""
    with pytest.raises(InterruptedRunError) as caught:
        convert(recipe_for(source), out, options=CPU, observe=stopped_after(inputs))
    return caught.value


@pytest.fixture(scope="module")
def whole(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversion, left alone."""
    path = tmp_path_factory.mktemp("whole") / "out"
    convert(recipe_for(tiny_flux), path, options=CPU)
    return path


def same_bytes(one: Path, other: Path) -> bool:
    return all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in (WEIGHTS, Path("transformer/config.json"))
    )


def test_a_resumed_conversion_gives_the_same_bytes_and_solves_no_layer_twice(
    tiny_flux: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = begun(tiny_flux, tmp_path / "out")
    assert error.code == 75
    assert error.resumable
    assert str(tmp_path / ".out.work") in str(error.hint)
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    before = {file.name for file in (tmp_path / ".out.work/layers").iterdir()}
    assert len(before) == 4

    solved: list[str] = []
    solve = solving.solve_input

    def counted(shared, *args, **kwargs):
        solved.append(f"{shared.name}.safetensors")
        return solve(shared, *args, **kwargs)

    monkeypatch.setattr(solving, "solve_input", counted)
    report = convert(recipe_for(tiny_flux), tmp_path / "out", options=RESUME)
    assert before.isdisjoint(solved)
    assert report.layers_taken_over == 8  # q, k, v of both streams and their two projections
    assert same_bytes(tmp_path / "out", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_died_after_the_last_layer_only_packs(tiny_flux: Path, whole: Path, tmp_path: Path):
    def stop(event: Event) -> None:
        if event.stage == "pack":
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError) as caught:
        convert(recipe_for(tiny_flux), tmp_path / "out", options=CPU, observe=stop)
    assert caught.value.code == 130
    (tmp_path / ".out.partial-1").mkdir()  # of a run that was killed while it packed
    report = convert(recipe_for(tiny_flux), tmp_path / "out", options=RESUME)
    assert report.layers_taken_over == report.layers.w4a4 + report.layers.w4a16
    assert same_bytes(tmp_path / "out", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_is_neither_used_nor_lost_unasked(tiny_flux: Path, whole: Path, tmp_path: Path):
    begun(tiny_flux, tmp_path / "out")
    with pytest.raises(UsageError, match="begun already and not finished") as caught:
        convert(recipe_for(tiny_flux), tmp_path / "out", options=CPU)
    assert caught.value.kind == "work-exists"
    assert "--resume" in str(caught.value.hint)
    assert "--overwrite" in str(caught.value.hint)
    report = convert(
        recipe_for(tiny_flux), tmp_path / "out", options=RunOptions(device="cpu", overwrite=True)
    )
    assert report.layers_taken_over == 0
    assert same_bytes(tmp_path / "out", whole)


def test_resume_starts_where_there_is_nothing_to_go_on_with(tiny_flux: Path, whole: Path, tmp_path: Path):
    report = convert(recipe_for(tiny_flux), tmp_path / "out", options=RESUME)
    assert report.layers_taken_over == 0
    assert same_bytes(tmp_path / "out", whole)


def test_resume_refuses_another_rank_and_says_which(tiny_flux: Path, tmp_path: Path):
    begun(tiny_flux, tmp_path / "out")
    with pytest.raises(UsageError, match=r"recipe\.quantization\.rank: 16 -> 32") as caught:
        convert(recipe_for(tiny_flux, rank=32), tmp_path / "out", options=RESUME)
    assert caught.value.kind == "work-mismatch"
    assert len(list((tmp_path / ".out.work/layers").iterdir())) == 4


def test_resume_refuses_other_weights(tiny_flux: Path, tmp_path: Path):
    from tests.tiny import tiny_flux_pipeline

    begun(tiny_flux, tmp_path / "out")
    other = tiny_flux_pipeline(tmp_path / "other", seed=7)
    with pytest.raises(UsageError, match="model sha256: "):
        convert(recipe_for(other), tmp_path / "out", options=RESUME)


def test_resume_refuses_another_version(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun(tiny_flux, tmp_path / "out")
    monkeypatch.setattr(converting, "__version__", "99.0")
    with pytest.raises(UsageError, match=r"svdq version: .* -> 99\.0"):
        convert(recipe_for(tiny_flux), tmp_path / "out", options=RESUME)


def test_a_damaged_layer_is_solved_again_and_that_is_said(tiny_flux: Path, whole: Path, tmp_path: Path):
    begun(tiny_flux, tmp_path / "out")
    damaged = sorted((tmp_path / ".out.work/layers").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    warnings: list[str] = []

    def observe(event: Event) -> None:
        if event.kind == "warning":
            warnings.append(event.detail)

    report = convert(recipe_for(tiny_flux), tmp_path / "out", options=RESUME, observe=observe)
    assert 0 < report.layers_taken_over < 8
    assert any("is solved again" in warning and damaged.name in warning for warning in warnings)
    assert same_bytes(tmp_path / "out", whole)


def test_a_run_that_can_only_fail_again_leaves_no_work(tiny_flux_copy: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_flux_copy / WEIGHTS)
    weights["x_embedder.bias"][0] = float("nan")  # met when the output is packed, after all layers are solved
    save_file(weights, tiny_flux_copy / WEIGHTS)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(SvdqError, match=r"x_embedder\.bias"):
        convert(recipe_for(tiny_flux_copy), tmp_path / "outputs/out", options=CPU)
    assert list((tmp_path / "outputs").iterdir()) == []


def test_a_memory_limit_that_can_not_be_kept_is_refused_before_the_work(tiny_flux: Path, tmp_path: Path):
    with pytest.raises(OutOfResourcesError, match=r"solving it takes .* GB, and --max-ram allows 0\.00 GB"):
        convert(recipe_for(tiny_flux), tmp_path / "out", options=RunOptions(device="cpu", max_ram=1_000_000))
    assert list(tmp_path.iterdir()) == []


def test_a_large_folder_is_sharded_as_diffusers_does(
    tiny_flux: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same tensors in several files with an index, which svdq and diffusers' own index reader open."""
    from diffusers.utils.hub_utils import _get_checkpoint_shard_files

    monkeypatch.setattr(writing, "SHARD_BYTES", 100_000)
    report = convert(recipe_for(tiny_flux), tmp_path / "out", options=CPU)
    index = tmp_path / "out" / f"{WEIGHTS}.index.json"
    files, _ = _get_checkpoint_shard_files(tmp_path / "out/transformer", str(index))
    assert len(files) > 1
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    wanted = load_file(whole / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert report.outputs[0].bytes == sum(Path(file).stat().st_size for file in files)
    assert check(tmp_path / "out", against=open_source(tiny_flux)).status == "ok"


# ------------------------------------------------------------------------------------------------- killed


def killed_after(command: list[str], events: Path, seconds: float) -> int:
    """Start the command, wait for its first solved input, and kill it so many seconds later."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    while process.poll() is None and not (events.is_file() and '"advance"' in events.read_text()):
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}


# SVDQ_KILLS=10 takes ten
@pytest.mark.parametrize("kill", range(int(os.environ.get("SVDQ_KILLS", "1"))))
def test_a_killed_conversion_goes_on(tiny_flux: Path, whole: Path, tmp_path: Path, kill: int):
    """SIGKILL at random moments, on one conversion several times, until it is through."""
    chance = random.Random(kill)
    out, events, layers = tmp_path / "out", tmp_path / "events.jsonl", tmp_path / ".out.work/layers"
    words = f"convert {tiny_flux} -o {out} --effort datafree --rank 16 --device cpu --resume --json --events {events}"
    command = [sys.executable, "-m", "svdq_cli", *words.split()]
    for _ in range(2):
        before = written(layers)
        if killed_after(command, events, chance.uniform(0, 0.3)) != -signal.SIGKILL:
            break  # it was through before
        if out.exists():
            break  # killed while it removed its work, which is done
        after = written(layers)
        assert before.items() <= after.items()  # what was finished was not made again
        events.unlink()
    before = written(layers)
    last = subprocess.run(command, capture_output=True, env=environment(), check=False)
    if not out.exists():
        raise AssertionError(last.stderr.decode())
    if last.returncode == 0:
        report = json.loads(last.stdout)
        assert report["layers_taken_over"] >= len(before)
        assert not (tmp_path / ".out.work").exists()
    assert same_bytes(out, whole)


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """The finished files, with what would differ if one had been written again."""
    if not folder.is_dir():
        return {}
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}


def test_an_interrupted_command_names_the_one_that_goes_on(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from svdq_cli.cli import run

    keep = solving.WorkFolder.keep

    def kept_once(self, folder, name, *rest):
        keep(self, folder, name, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(solving.WorkFolder, "keep", kept_once)
    words = f"convert {tiny_flux} -o {tmp_path / 'out'} --effort datafree --rank 16 --device cpu --json -q"
    assert run(words.split()) == 130
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["kind"] == "canceled"
    monkeypatch.undo()
    resuming = next(line for line in said.err.splitlines() if "to go on: svdq" in line)
    assert run(resuming.split("svdq ", 1)[1].split()) == 0
    assert json.loads(capsys.readouterr().out)["layers_taken_over"] > 0
