"""A conversion that ends early goes on where it stood, to the same bytes; and only if it is the same conversion."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdq_cli.checkpoint import writer
from svdq_cli.checkpoint.check import check
from svdq_cli.conversion import convert as converting
from svdq_cli.conversion import solve_layers
from svdq_cli.conversion import tune_model as tuning_models
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.conversion.resume import kept_work
from svdq_cli.errors import InterruptedRunError, OutOfResourcesError, SvdqError, Terminated, UsageError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import Calibration, Output, Quantization, Recipe, default_recipe
from svdq_cli.reconstruct import tuning
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
    solve = solve_layers.solve_input

    def counted(shared, *args, **kwargs):
        solved.append(f"{shared.layers[0]}.safetensors")
        return solve(shared, *args, **kwargs)

    monkeypatch.setattr(solve_layers, "solve_input", counted)
    report = convert(recipe_for(tiny_flux), tmp_path / "out", options=RESUME)
    assert before.isdisjoint(solved)
    layer_groups = prepare(recipe_for(tiny_flux)).plan.layer_groups(data_free=True)
    held = [each.layers for each in layer_groups if f"{each.layers[0]}.safetensors" in before]
    assert report.layers_taken_over == sum(map(len, held))
    assert len(solved) == len(layer_groups) - len(before)
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


@pytest.fixture(params=[1, 2, 3, 4, 5])
def killed_removing_its_work(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """The output of a run that ended while it removed its work folder, at the n-th file or, for 5, the folder."""
    left = request.param
    unlink, rmdir = Path.unlink, Path.rmdir

    def count_down() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt  # not caught any more: as good as SIGKILL

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == ".out.work":
            count_down()
        unlink(path, missing_ok)

    def removed(path: Path) -> None:
        if path.name == ".out.work" and path.is_dir():
            count_down()
        rmdir(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlinked)
        patched.setattr(Path, "rmdir", removed)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe_for(tiny_flux), tmp_path / "out", options=CPU)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.work"}
    return tmp_path / "out"


def test_what_is_left_of_a_work_folder_is_taken_away_by_the_next_run(
    tiny_flux: Path, whole: Path, killed_removing_its_work: Path
):
    out = killed_removing_its_work
    assert same_bytes(out, whole)
    assert check(out).status == "ok"
    with pytest.raises(UsageError, match="already exists"):
        convert(recipe_for(tiny_flux), out, options=RESUME)
    assert list(out.parent.iterdir()) == [out]


def test_it_does_not_keep_the_output_from_being_overwritten(
    tiny_flux: Path, whole: Path, killed_removing_its_work: Path
):
    out = killed_removing_its_work
    convert(recipe_for(tiny_flux), out, options=RunOptions(device="cpu", overwrite=True))
    assert same_bytes(out, whole)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    "options", [RESUME, RunOptions(device="cpu", overwrite=True)], ids=["resume", "overwrite"]
)
def test_what_killed_runs_left_of_an_output_is_taken_away(
    tiny_flux: Path, whole: Path, tmp_path: Path, options: RunOptions
):
    (tmp_path / ".out.partial-1").mkdir()
    (tmp_path / ".out.old-1").mkdir()
    (tmp_path / ".out.old-1/svdq_report.json").touch()
    if options.resume:  # what such a run had noted of the names that it was about to give
        begun(tiny_flux, tmp_path / "out")
        (tmp_path / ".out.work/naming.json").write_text(json.dumps([str(tmp_path / "out")]))
    convert(recipe_for(tiny_flux), tmp_path / "out", options=options)
    assert same_bytes(tmp_path / "out", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_whose_replacing_was_killed_keeps_its_name_until_there_is_another(
    tiny_flux: Path, tmp_path: Path
):
    """Killed between two renames: the old output had made room, the new one had not come."""
    (tmp_path / ".out.old-1").mkdir()
    (tmp_path / ".out.old-1/svdq_report.json").write_text("the old one")
    with pytest.raises(InterruptedRunError):
        convert(
            recipe_for(tiny_flux),
            tmp_path / "out",
            options=RunOptions(device="cpu", overwrite=True),
            observe=stopped_after(1),
        )
    assert (tmp_path / "out/svdq_report.json").read_text() == "the old one"


def test_unfinished_work_is_neither_used_nor_lost_unasked(tiny_flux: Path, whole: Path, tmp_path: Path):
    begun(tiny_flux, tmp_path / "out")
    with pytest.raises(UsageError, match="holds an unfinished run of this conversion") as caught:
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


def test_a_plan_says_what_an_unfinished_run_left_and_asks_for_no_disk_that_it_has(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    recipe = recipe_for(tiny_flux).model_copy(update={"outputs": (Output(path=str(out)),)})
    whole = predict(recipe, options=CPU)
    begun(tiny_flux, out)
    left = sum(file.stat().st_size for file in (tmp_path / ".out.work").rglob("*") if file.is_file())
    planned = predict(recipe, options=RESUME)
    assert (whole.disk_kept_bytes, planned.disk_kept_bytes) == (0, left)
    assert planned.disk_bytes == whole.disk_bytes, "at its fullest"
    usage = shutil.disk_usage(tmp_path)
    for room, refused in ((planned.disk_bytes - left, False), (planned.disk_bytes - left - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, room=room: usage._replace(free=room))
        error = predict(recipe, options=RESUME).error
        assert (error is not None and error.kind == "disk-full") == refused


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
    with pytest.raises(OutOfResourcesError, match=r"solving it takes .* GB, but --max-ram allows 0\.001 GB"):
        convert(recipe_for(tiny_flux), tmp_path / "out", options=RunOptions(device="cpu", max_ram=1_000_000))
    assert list(tmp_path.iterdir()) == []


def test_a_large_folder_is_sharded_as_diffusers_does(
    tiny_flux: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same tensors in several files with an index, which svdq and diffusers' own index reader open."""
    from diffusers.utils.hub_utils import _get_checkpoint_shard_files

    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
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
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}


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

    keep = solve_layers.WorkFolder.keep

    def kept_once(self, folder, name, *rest):
        keep(self, folder, name, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(solve_layers.WorkFolder, "keep", kept_once)
    words = f"convert {tiny_flux} -o {tmp_path / 'out'} --effort datafree --rank 16 --device cpu --json -q"
    assert run(words.split()) == 130
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["kind"] == "canceled"
    monkeypatch.undo()
    resuming = next(line for line in said.err.splitlines() if "to resume: svdq" in line)
    assert run(resuming.split("svdq ", 1)[1].split()) == 0
    assert json.loads(capsys.readouterr().out)["layers_taken_over"] > 0


# ------------------------------------------------------------------------------------------------- effort best


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\n")
    return path


def best_recipe(source: Path, prompts: Path) -> Recipe:
    drawn = {"samples": 2, "steps": 2, "height": 32, "width": 32, "max_sequence_length": 16, "rows": 128}
    return default_recipe(
        str(source),
        calibration=Calibration.model_validate({"prompts": str(prompts), **drawn}),
        quantization=Quantization.model_validate(
            {"rank": 16, "effort": "best", "smoothing": "closed-form", "search": []}
        ),
    )


@pytest.fixture
def tunings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tuning in a moment. Lists what is tuned."""
    return with_few_steps(monkeypatch)


def with_few_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    tuned: list[str] = []
    tune = tuning_models.tune_model

    def counted(job, **named):
        tuned.extend(job.plan.components)
        return tune(job, **named)

    monkeypatch.setattr(tuning, "STEPS", 4)
    monkeypatch.setattr(tuning, "JUDGE_EVERY", 1)
    monkeypatch.setattr(tuning, "WARM_UP", 1)
    monkeypatch.setattr(tuning_models, "tune_model", counted)
    return tuned


@pytest.fixture(scope="module")
def best_whole(tiny_flux: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversion, left alone."""
    folder = tmp_path_factory.mktemp("best")
    with pytest.MonkeyPatch.context() as patch:
        tuned = with_few_steps(patch)
        convert(best_recipe(tiny_flux, prompts), folder / "out", options=CPU)
    assert tuned == ["transformer"]
    return folder / "out"


def test_a_tuned_model_is_not_tuned_again(
    tiny_flux: Path, prompts: Path, best_whole: Path, tmp_path: Path, tunings: list[str]
):
    def stop(event: Event) -> None:
        if event.stage == "pack":
            raise Terminated

    recipe = best_recipe(tiny_flux, prompts)
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM") as caught:
        convert(recipe, tmp_path / "out", options=CPU, observe=stop)
    assert caught.value.code == 75
    assert "1 tuned model;" in str(caught.value.hint)
    report = convert(recipe, tmp_path / "out", options=RESUME)
    assert tunings == ["transformer"]
    assert same_bytes(tmp_path / "out", best_whole)
    (search,) = report.search.tuning.values()
    assert list(report.search.tuning) == tunings
    assert search.after < search.before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_tuning_that_was_interrupted_starts_over(
    tiny_flux: Path, prompts: Path, best_whole: Path, tmp_path: Path, tunings: list[str]
):
    def stop(event: Event) -> None:
        if event.stage == "reconstruct" and event.done == 3:
            raise Terminated

    recipe = best_recipe(tiny_flux, prompts)
    with pytest.raises(InterruptedRunError) as caught:
        convert(recipe, tmp_path / "out", options=CPU, observe=stop)
    assert "tuned" not in str(caught.value.hint)
    convert(recipe, tmp_path / "out", options=RESUME)
    assert tunings == ["transformer"] * 2
    assert same_bytes(tmp_path / "out", best_whole)


def test_a_run_that_is_killed_behind_a_tuned_model_goes_on(
    tiny_flux: Path, prompts: Path, tmp_path: Path, tunings: list[str]
):
    """What host memory had no room for lies in files, which the killed run leaves behind."""
    code = f"""
import os, signal
from svdq_cli.conversion import block_by_block
from svdq_cli.conversion.convert import convert
from svdq_cli.reconstruct import tuning
from tests.conversion.test_resume import CPU, Path, with_output
tuning.STEPS, tuning.JUDGE_EVERY, tuning.WARM_UP = 4, 1, 1
block_by_block.hidden_state_bytes = lambda *_: 0
def kill(event):
    if event.stage == "output" and event.kind == "advance":
        os.kill(os.getpid(), signal.SIGKILL)
source, prompts, out = (Path(name) for name in {list(map(str, (tiny_flux, prompts, tmp_path / "out")))!r})
convert(with_output(source, prompts), out, options=CPU, observe=kill)
"""
    killed = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    work = tmp_path / ".out.work"
    assert list((work / "passages").iterdir())
    assert list(written(work / "tuned")) == ["transformer.safetensors"]
    assert set(written(work / "blocks")) == {
        "transformer_blocks.0.safetensors",
        "single_transformer_blocks.0.safetensors",
    }
    convert(with_output(tiny_flux, prompts), tmp_path / "out", options=RESUME)
    assert tunings == []
    convert(with_output(tiny_flux, prompts), tmp_path / "again", options=CPU)
    assert same_bytes(tmp_path / "out", tmp_path / "again")


def with_output(source: Path, prompts: Path) -> Recipe:
    plain = best_recipe(source, prompts)
    quantization = plain.quantization.model_copy(update={"search": ("output",)})
    return plain.model_copy(update={"quantization": quantization})


def test_a_fitted_last_linear_is_taken_over(tiny_flux: Path, prompts: Path, tmp_path: Path):
    plain = best_recipe(tiny_flux, prompts)
    wanted = {"effort": "balanced", "search": ("output",)}
    recipe = plain.model_copy(update={"quantization": plain.quantization.model_copy(update=wanted)})
    ways: list[str] = []

    def watch(event: Event) -> None:
        if event.stage == "output" and event.kind == "end":
            ways.append("fitted")

    def stop(event: Event) -> None:
        watch(event)
        if event.stage == "pack":
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        convert(recipe, tmp_path / "out", options=CPU, observe=stop)
    kept = tmp_path / ".out.work/outputs/transformer.safetensors"
    whole = kept.read_bytes()
    with pytest.raises(InterruptedRunError):
        convert(recipe, tmp_path / "out", options=RESUME, observe=stop)
    assert ways == ["fitted"]
    kept.write_bytes(whole[:-10])
    convert(recipe, tmp_path / "out", options=RESUME, observe=watch)
    assert ways == ["fitted"] * 2, "a damaged file is not taken over"
    convert(recipe, tmp_path / "again", options=CPU)
    assert same_bytes(tmp_path / "out", tmp_path / "again")


def test_a_model_with_a_damaged_block_is_tuned_again_and_that_is_said(
    tiny_flux: Path, prompts: Path, best_whole: Path, tmp_path: Path, tunings: list[str]
):
    def stop(event: Event) -> None:
        if event.stage == "pack":
            raise KeyboardInterrupt

    recipe, blocks = best_recipe(tiny_flux, prompts), tmp_path / ".out.work/blocks"
    with pytest.raises(InterruptedRunError) as caught:
        convert(recipe, tmp_path / "out", options=CPU, observe=stop)
    assert caught.value.code == 130
    tunings.clear()
    damaged = blocks / "transformer_blocks.0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    said: list[str] = []
    convert(recipe, tmp_path / "out", options=RESUME, observe=lambda event: said.append(event.detail))
    assert tunings == ["transformer"]
    assert any("is tuned again" in each for each in said)
    assert same_bytes(tmp_path / "out", best_whole)


@pytest.mark.usefixtures("tunings")
@pytest.mark.parametrize(
    ("quantization", "stage"),
    [({"effort": "best"}, "reconstruct"), ({"effort": "fast", "rank": "auto"}, "solve")],
    ids=["tuned model", "searched ranks"],
)
def test_work_is_not_gone_on_with_for_other_prompts_in_a_file_of_the_same_name(
    tiny_flux: Path, prompts: Path, tmp_path: Path, quantization: dict[str, object], stage: str
):
    """Models and ranks are judged on pictures of their own, also where the statistics come from an artefact."""
    drawn = tmp_path / "prompts.txt"
    shutil.copy(prompts, drawn)
    recipe = best_recipe(tiny_flux, drawn)
    recipe = recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update=quantization)})
    calibrate(recipe, tmp_path / "calib", options=CPU)

    def stop(event: Event) -> None:
        if event.stage == stage and event.kind == "advance":
            raise Terminated

    with pytest.raises(InterruptedRunError):
        convert(recipe, tmp_path / "out", calibration=tmp_path / "calib", options=CPU, observe=stop)
    drawn.write_text("another one\n")
    with pytest.raises(UsageError, match=r"calibration\.prompts sha256: "):
        convert(recipe, tmp_path / "out", calibration=tmp_path / "calib", options=RESUME)


def test_a_calibration_is_not_gone_on_with_for_another_schedule(
    tiny_flux_copy: Path, prompts: Path, tmp_path: Path
):
    """The scheduler lies beside the model, and what it is set to decides what the model is fed."""
    recipe = best_recipe(tiny_flux_copy, prompts)

    def stop(event: Event) -> None:
        if event.stage == "calibrate" and event.kind == "advance":
            raise Terminated

    with pytest.raises(InterruptedRunError):
        calibrate(recipe, tmp_path / "calib", options=CPU, observe=stop)
    file = tiny_flux_copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 5.0}))
    with pytest.raises(UsageError, match=r"calibration\.pipeline sha256: "):
        calibrate(recipe, tmp_path / "calib", options=RESUME)


def test_statistics_of_a_run_that_is_refused_late_serve_the_next_one_as_the_error_says(tmp_path: Path):
    folder = tmp_path / ".out.work"

    def refused() -> None:
        with kept_work(
            folder, {}, options=CPU, stage="convert", kept=lambda work: "", observe=lambda event: None
        ) as work:
            work.calibration.mkdir()
            (work.calibration / "manifest.json").write_text("{}")
            raise UsageError("a layer does not fit", hint="choose another rank")

    with pytest.raises(UsageError) as refusal:
        refused()
    said = f"move {folder / 'calibration'}, the calibration statistics, elsewhere and give them with --calib"
    assert refusal.value.hint == f"choose another rank; {said}"
    assert not refusal.value.resumable  # with another recipe there is nothing to resume
    assert (folder / "calibration").is_dir()
