"""Every kind of adapter that peft and LyCORIS make, folded into a converted model and loaded into a running one: the
layer's output moves by what the library's own forward adds to a layer with the converted weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from torch import Tensor

import svdq_cli
from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.errors import InputError
from svdq_cli.lora.fold import FoldSettings, fold
from svdq_cli.lora.weights import CheckpointWeights
from svdq_cli.records import W4A4Plan
from svdq_cli.reports import LoraReport
from tests.adapters.kinds import (
    LYCORIS,
    LYCORIS_REFUSED,
    PEFT,
    PEFT_CHANGES_BASE,
    PEFT_LINEAR,
    PEFT_WITH_BIAS,
    LyCORISKind,
    PeftKind,
    TrainedAdapter,
    TrainedLayer,
    skeleton,
    train_with_lycoris,
    train_with_peft,
)
from tests.entrypoints.test_export import converted_alone
from tests.lora.layers import layer_output, relative
from tests.lora.test_attach import layer_of, loaded
from tests.tiny_families import tiny_pipeline

Kinds = Mapping[str, PeftKind | LyCORISKind]
READ: Kinds = {
    **{f"peft: {name}": kind for name, kind in {**PEFT, **PEFT_WITH_BIAS, **PEFT_LINEAR}.items()},
    **{f"LyCORIS: {name}": kind for name, kind in LYCORIS.items()},
}
POINTWISE: Kinds = {
    **{f"peft: {name}": kind for name, kind in {**PEFT, **PEFT_WITH_BIAS}.items()},
    **{f"LyCORIS: {name}": kind for name, kind in LYCORIS.items()},
}
# No kind has more ranks than the layers' 128 inputs or outputs, so that nothing is cut off
EXACT = FoldSettings(approximate_rank=128)


def trained(kind: PeftKind | LyCORISKind, checkpoint: Checkpoint, layer: str, folder: Path) -> TrainedAdapter:
    """On a layer with the weights that the converted model has."""
    folder.mkdir(parents=True)
    model = skeleton(weights_of(checkpoint, layer), [layer])
    if isinstance(kind, tuple):
        return train_with_lycoris(kind, model, [layer], folder / "lora.safetensors")
    return train_with_peft(kind, model, [layer], folder)


def weights_of(checkpoint: Checkpoint, layer: str) -> dict[str, Tensor]:
    shape = checkpoint.state[f"{layer}.weight"]
    weight = CheckpointWeights(checkpoint)(f"{layer}.weight", 0, shape[0]).reshape(shape)
    if f"{layer}.bias" not in checkpoint.state:
        return {f"{layer}.weight": weight}
    plan = next((plan for plan in checkpoint.layers if plan.name == layer), None)
    bias = checkpoint.kept_tensor(f"{layer}.bias") if plan is None else checkpoint.solution(plan).bias
    assert bias is not None
    return {f"{layer}.weight": weight, f"{layer}.bias": bias}


def on_layers(kinds: Kinds, layers: list[str]) -> Iterator[dict[str, PeftKind | LyCORISKind]]:
    """As many kinds at a time as there are layers."""
    names = list(kinds)
    for start in range(0, len(names), len(layers)):
        yield {name: kinds[name] for name in names[start : start + len(layers)]}


def fold_every_kind(
    base: Path, kinds: Kinds, layers: list[str], folder: Path, require: Callable[..., None]
) -> list[LoraReport]:
    """Each kind on a layer of its own, some of them at once. Returns the reports."""
    before, reports = open_checkpoint(base), []
    for number, some in enumerate(on_layers(kinds, layers)):
        adapters = {
            kind: trained(how, before, layer, folder / str(number) / str(index))
            for index, ((kind, how), layer) in enumerate(zip(some.items(), layers, strict=False))
        }
        out = folder / f"out{number}"
        reports.append(fold(base, [LoraFile(a.path) for a in adapters.values()], out, settings=EXACT))
        after = open_checkpoint(out)
        for kind, adapter in adapters.items():
            ((layer, run),) = adapter.layers.items()
            run = run.as_rows()
            require(run, layer_output(before, layer, run.x), layer_output(after, layer, run.x), kind)
    return reports


def require_exact(run: TrainedLayer, before: Tensor, after: Tensor, kind: str) -> None:
    """Of the change: bfloat16 rounds both factors to 0.2 %."""
    assert run.error(before, after) < 1e-2, kind


def require_moved(run: TrainedLayer, before: Tensor, after: Tensor, kind: str) -> None:
    """Where weights or outputs are rounded to bfloat16, by 0.2 % of the whole, which is some ten times the change."""
    assert relative(after, before + run.after - run.before) < 4e-3, kind
    assert run.error(before, after) < 0.25, kind


@pytest.mark.parametrize("fmt", ["lite", "nunchaku.safetensors", "comfy.safetensors"])
def test_every_kind_is_folded_into_4_bit_layers(
    converted_flux: Callable[[str], Path], tmp_path: Path, fmt: str
):
    base = converted_flux("int4") / fmt
    layers = [plan.name for plan in open_checkpoint(base).layers if isinstance(plan, W4A4Plan)]
    reports = fold_every_kind(base, READ, layers, tmp_path, require_exact)
    assert {row.how for report in reports for row in report.keys} == {"applied"}
    assert all((row.error or 0) < 1e-3 for report in reports for row in report.keys)


@pytest.mark.parametrize("fmt", ["lite", "nunchaku.safetensors", "comfy.safetensors"])
def test_every_kind_is_merged_into_16_bit_layers(
    converted_flux: Callable[[str], Path], tmp_path: Path, fmt: str
):
    base = converted_flux("int4") / fmt
    reports = fold_every_kind(base, READ, sixteen_bit_layers(base, ndim=2), tmp_path, require_moved)
    assert {row.how for report in reports for row in report.keys} == {"merged"}


def test_every_kind_is_merged_into_pointwise_convolutions(tmp_path: Path):
    """Formats keep them at 16 bits."""
    source = tiny_pipeline("sd15", tmp_path / "source") / "unet"
    base = converted_alone(source, tmp_path / "lite", "nunchaku-lite", "int4")
    fold_every_kind(base, POINTWISE, sixteen_bit_layers(base, ndim=4), tmp_path / "kinds", require_moved)


def sixteen_bit_layers(base: Path, *, ndim: int) -> list[str]:
    """Linear layers, or 1x1 convolutions, that a checkpoint keeps."""
    checkpoint = open_checkpoint(base)
    planned = {plan.name for plan in checkpoint.layers}
    return [
        name.removesuffix(".weight")
        for name, shape in checkpoint.state.items()
        if len(shape) == ndim
        and name.endswith(".weight")
        and all(size == 1 for size in shape[2:])
        and name.removesuffix(".weight") not in planned
    ]


def test_every_kind_is_loaded_into_a_running_model(converted_flux: Callable[[str], Path], tmp_path: Path):
    base = converted_flux("int4") / "lite"
    checkpoint, pipe = open_checkpoint(base), loaded(base, "reference")
    layers = [plan.name for plan in checkpoint.layers if isinstance(plan, W4A4Plan)]
    for number, some in enumerate(on_layers(READ, layers)):
        runs = {}
        for index, ((kind, how), layer) in enumerate(zip(some.items(), layers, strict=False)):
            adapter = trained(how, checkpoint, layer, tmp_path / str(number) / str(index))
            svdq_cli.load_lora(pipe, adapter.path, kind, approximate_rank=128)
            runs[kind] = layer, adapter.layers[layer]
        before = {kind: layer_of(pipe, layer)(run.x) for kind, (layer, run) in runs.items()}
        svdq_cli.set_adapters(pipe, dict.fromkeys(runs, 1.0))
        for kind, (layer, run) in runs.items():
            require_moved(run, before[kind], layer_of(pipe, layer)(run.x), kind)
        svdq_cli.set_adapters(pipe, {})


@pytest.mark.parametrize("kind", [*PEFT_CHANGES_BASE, *LYCORIS_REFUSED])
def test_what_can_t_be_folded_is_refused_by_name(
    converted_flux: Callable[[str], Path], tmp_path: Path, kind: str
):
    base = converted_flux("int4") / "lite"
    how = PEFT_CHANGES_BASE[kind] if kind in PEFT_CHANGES_BASE else LYCORIS_REFUSED[kind][:2]
    name = kind.split(",")[0] if kind in PEFT_CHANGES_BASE else LYCORIS_REFUSED[kind][2]
    layer = "transformer_blocks.0.attn.to_q"
    adapter = trained(how, open_checkpoint(base), layer, tmp_path / "a")
    with pytest.raises(InputError) as folding:
        fold(base, [LoraFile(adapter.path, 1.0)], tmp_path / "out")
    with pytest.raises(InputError) as loading:
        svdq_cli.load_lora(loaded(base, "reference"), adapter.path, "style")
    assert all(name in caught.value.message and caught.value.hint for caught in (folding, loading))
    assert not (tmp_path / "out").exists()
