"""Solving where memory runs out: the same bytes with less of it at a time, the CPU instead of a GPU, or a clear end."""

from __future__ import annotations

import json
import math
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from svdq_cli.cli import run
from svdq_cli.conversion import allocation, memory, memory_backoff, solve_layers
from svdq_cli.conversion import convert as converting
from svdq_cli.conversion.allocation import candidates_of
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.memory_backoff import MemoryNeed, Placement, where_it_fits
from svdq_cli.conversion.solve_layers import Statistics
from svdq_cli.errors import OutOfResourcesError, as_out_of_memory
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe
from svdq_cli.records import ActivationStats, Event, SharedInput, ignore_events
from svdq_cli.reports import ConvertReport
from svdq_cli.system.threads import NoMemoryAlongside
from tests.allocations import Allocations

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
ON_CPU = RunOptions(device="cpu")
GIB = 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda")
FIRST = "transformer_blocks.0.attn.to_q"  # of the layers, where they are solved one after the other


def recipe_for(source: Path) -> Recipe:
    return default_recipe(str(source), quantization=Quantization(rank=16, effort="datafree"))


class Warnings(list[str]):
    """An observer that keeps the warnings of the solve stage."""

    def __call__(self, event: Event) -> None:
        if event.kind == "warning" and event.stage == "solve":
            self.append(event.detail)


@pytest.fixture(scope="module")
def whole(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ConvertReport]:
    """A conversion with enough memory: its weights and its report."""
    path = tmp_path_factory.mktemp("whole") / "out"
    report = convert(recipe_for(tiny_flux), path, options=ON_CPU)
    return (path / WEIGHTS).read_bytes(), report


def solve_with(monkeypatch: pytest.MonkeyPatch, allocator: Callable[[int], Allocations]) -> None:
    """Every layer group is solved with an allocator of its own. `allocator` is told which attempt it is for, from 1."""
    attempts: Counter[str] = Counter()
    solve = solve_layers.solve_input

    def watched(layer_group: SharedInput, *args):
        attempts[layer_group.layers[0]] += 1
        with allocator(attempts[layer_group.layers[0]]):
            return solve(layer_group, *args)

    monkeypatch.setattr(solve_layers, "solve_input", watched)


@pytest.mark.parametrize("failing", [1, 20, 77])
def test_where_memory_runs_out_a_layer_group_is_solved_with_less_at_a_time_to_the_same_bytes(
    failing: int,
    tiny_flux: Path,
    whole: tuple[bytes, ConvertReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    solve_with(monkeypatch, lambda attempt: Allocations(failing={failing} if attempt == 1 else ()))
    said = Warnings()
    convert(recipe_for(tiny_flux), tmp_path / "out", options=ON_CPU, observe=said)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == whole[0]
    layer, _, what = said[0].partition(": ")
    assert layer in whole[1].search.layers
    assert what.startswith("solving it on the CPU: CUDA out of memory")
    assert what.endswith("; now on the CPU with one weight at a time")


def test_the_same_with_calibration(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    recipe = default_recipe(
        str(tiny_flux),
        calibration=Calibration(prompts=str(prompts), samples=1, steps=4, height=32, width=32, rows=64),
        quantization=Quantization(smoothing="closed-form", search=("gptq", "refit"), rank=16),
    )
    statistics = tmp_path / "statistics"
    calibrate(recipe, statistics, options=ON_CPU)
    whole = convert(recipe, tmp_path / "whole", calibration=statistics, options=ON_CPU)
    solve_with(monkeypatch, lambda attempt: Allocations(failing={400} if attempt == 1 else ()))
    said = Warnings()
    convert(recipe, tmp_path / "out", calibration=statistics, options=ON_CPU, observe=said)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    layer, _, what = said[0].partition(": ")
    assert layer in whole.search.layers
    assert what.startswith("solving it on the CPU: CUDA out of memory")


def test_the_search_for_ranks_backs_off_too(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared = prepare(recipe_for(tiny_flux))
    shared = prepared.plan.inputs[0]
    generator = torch.Generator().manual_seed(0)
    stats: dict[str, ActivationStats] = {}
    for each in prepared.plan.inputs:
        x = torch.randn(32, prepared.plan.by_name[each.layers[0]].linear.in_features, generator=generator)
        stats[each.name] = ActivationStats(each.name, x.abs().amax(0), x.square().mean(0), x.bfloat16(), 32)
    statistics = Statistics("", stats)
    whole = candidates_of(prepared, statistics, (16,), CPU, ignore_events, None)
    measure, failed = allocation.rank_errors, set[str]()

    def once_too_small(layer_group: SharedInput, *args):
        limit = math.inf if layer_group.name in failed else 0
        failed.add(layer_group.name)
        with Allocations(limit=limit):
            return measure(layer_group, *args)

    monkeypatch.setattr(allocation, "rank_errors", once_too_small)
    warnings: list[str] = []

    def observe(event: Event) -> None:
        if event.kind == "warning":
            warnings.append(f"{event.stage}: {event.detail}")

    assert candidates_of(prepared, statistics, (16,), CPU, observe, None) == whole
    assert warnings[0].startswith(f"allocate: {shared.layers[0]}: solving it on the CPU: CUDA out of memory")


class GpuWithoutMemory(TorchFunctionMode):
    """A GPU on which nothing can be put."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if (func is torch.Tensor.to and args[1] == GPU) or (kwargs or {}).get("device") == GPU:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def test_what_fits_on_no_gpu_is_solved_on_the_cpu_and_the_report_says_so(
    tiny_flux: Path,
    whole: tuple[bytes, ConvertReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(converting, "resolve_device", lambda wanted: GPU)
    monkeypatch.setattr(solve_layers.RawWeight, "pinned", lambda weight: weight)  # takes a driver
    said = Warnings()
    with GpuWithoutMemory():
        report = convert(recipe_for(tiny_flux), tmp_path / "out", options=ON_CPU, observe=said)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == whole[0]
    assert {each.device for each in report.search.layers.values()} == {"cpu"}
    assert said[:2] == [
        f"{FIRST}: solving it on the GPU: CUDA out of memory. Tried to allocate 2.00 GiB.; "
        "now on the GPU with one weight at a time",
        f"{FIRST}: solving it on the GPU with one weight at a time: CUDA out of memory. Tried to allocate 2.00 GiB.; "
        "now on the CPU",
    ]
    assert any("were solved on the CPU" in warning and FIRST in warning for warning in report.warnings)


def test_a_limit_on_gpu_memory_moves_layers_to_the_cpu_without_a_try(
    tiny_flux: Path, whole: tuple[bytes, ConvertReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(converting, "resolve_device", lambda wanted: GPU)
    monkeypatch.setattr(converting, "limit_vram", lambda device, most: None)  # takes a driver
    monkeypatch.setattr(solve_layers.RawWeight, "pinned", lambda weight: weight)
    said = Warnings()
    convert(recipe_for(tiny_flux), tmp_path / "out", options=RunOptions(max_vram=100), observe=said)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == whole[0]
    assert said[0].startswith(f"{FIRST}: solving it takes ")
    assert said[0].endswith("GB, but --max-vram allows 0.000 GB; now on the CPU")


def test_out_of_memory_for_good_ends_with_code_5_and_names_the_layer(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    solve_with(monkeypatch, lambda attempt: Allocations(limit=0))
    words = f"convert {tiny_flux} -o {tmp_path / 'out'} --effort datafree --device cpu --json"
    assert run(words.split()) == 5
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["where"] in {layer.name for layer in prepare(recipe_for(tiny_flux)).plan.layers}
    assert error["kind"] == "out-of-memory"
    assert error["message"].startswith(
        f"{error['where']}: solving it on the CPU with one weight at a time: CUDA out of memory"
    )
    assert "smaller --effort" in error["hint"]
    assert list(tmp_path.iterdir()) == [], "nothing was solved, so there is nothing to go on with"


def test_host_memory_that_shrinks_ends_the_run_before_it_is_gone(
    tiny_flux: Path, whole: tuple[bytes, ConvertReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another process takes the memory after three layer groups; the run ends, and goes on once there is some again."""
    kept = tmp_path / ".out.work/layers"

    def left() -> int:
        return 1000 if kept.is_dir() and len(list(kept.glob("*.safetensors"))) >= 3 else GIB

    with monkeypatch.context() as short:
        short.setattr(memory, "available_ram", left)
        short.setattr(memory_backoff, "available_ram", left)
        with pytest.raises(
            OutOfResourcesError, match=r"solving it takes .* GB of memory, but 0\.00 GB are free"
        ) as seen:
            convert(recipe_for(tiny_flux), tmp_path / "out", options=ON_CPU)
    assert str(seen.value.where).startswith(("transformer_blocks.", "single_transformer_blocks."))
    assert seen.value.resumable
    report = convert(recipe_for(tiny_flux), tmp_path / "out", options=RunOptions(device="cpu", resume=True))
    assert report.layers_taken_over > 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == whole[0]


def test_a_layer_group_lets_go_of_what_it_can_before_it_takes_less_at_a_time(monkeypatch: pytest.MonkeyPatch):
    free = [100]
    monkeypatch.setattr(memory, "available_ram", lambda: free[0])

    def let_go() -> None:
        free[0] += 50

    def needs(placement: Placement) -> MemoryNeed:
        return MemoryNeed(80 if placement.streamed else 130, 0)

    def chosen() -> Placement:
        return where_it_fits(
            "layer",
            lambda placement: placement,
            needs,
            device=CPU,
            options=ON_CPU,
            observe=Warnings(),
            let_go=let_go,
        )

    assert chosen() == Placement(CPU, streamed=False)
    free[0] = 40
    assert chosen() == Placement(CPU, streamed=True)


def test_a_limit_on_memory_that_is_enough_changes_nothing(
    tiny_flux: Path, whole: tuple[bytes, ConvertReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(solve_layers, "free_tensors_at_once", lambda: None)  # or other tests would be slower
    convert(recipe_for(tiny_flux), tmp_path / "out", options=RunOptions(device="cpu", max_ram=64 * GIB))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == whole[0]


def test_beside_others_a_layer_group_takes_no_less_and_waits_for_them_instead(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(memory, "available_ram", lambda: 100)

    def solved(needed: int, *, fail: bool = False) -> Placement:
        def attempt(placement: Placement) -> Placement:
            if fail:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return placement

        need = MemoryNeed(needed, 0)
        return where_it_fits(
            "layer",
            attempt,
            lambda placement: need,
            device=CPU,
            options=ON_CPU,
            observe=Warnings(),
            alone=False,
        )

    assert solved(80) == Placement(CPU, streamed=False)
    with pytest.raises(NoMemoryAlongside):
        solved(101)
    with pytest.raises(NoMemoryAlongside):
        solved(80, fail=True)


def test_what_the_process_grows_by_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch):
    """A layer group that `--max-ram` had room for when the work began has it later, too."""
    held = [300 * 2**20]
    monkeypatch.setattr(memory, "resident_ram", lambda: held[0])
    options = RunOptions(device="cpu", max_ram=400 * 2**20)
    reserved = memory.reserved_ram()
    before = memory.free_ram(options)
    held[0] += memory.UNCOUNTED // 2
    assert memory.free_ram(options, reserved=reserved) == before
    held[0] += memory.UNCOUNTED
    assert memory.free_ram(options, reserved=reserved) == before - memory.UNCOUNTED // 2


def test_what_a_failed_drawing_held_is_gone_before_it_is_begun_again():
    """An exception holds its frames, and with them all that they had on a GPU."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def attempt(share: float) -> float:
        activation = torch.zeros(1)
        held.append(weakref.ref(activation))
        if share > 0:
            raise OutOfResourcesError("out of memory")
        return share

    def observe(event: Event) -> None:
        alive.append(held[-1]() is not None)

    assert memory.first_that_fits(attempt, (1.0, 0.5, 0.0), stage="record", observe=observe) == 0
    assert alive == [False, False]


def test_errors_that_are_no_want_of_memory_are_not_hidden():
    def attempt(placement: Placement) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        where_it_fits(
            "layer",
            attempt,
            lambda placement: MemoryNeed(0, 0),
            device=CPU,
            options=ON_CPU,
            observe=Warnings(),
            let_go=lambda: None,
        )


def test_torchs_own_words_for_want_of_host_memory_are_known():
    with pytest.raises(RuntimeError) as seen:
        torch.empty(1 << 55, device="cpu")
    refusal = as_out_of_memory(seen.value)
    assert refusal is not None
    assert refusal.code == 5
