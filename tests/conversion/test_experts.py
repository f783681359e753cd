"""Experts that diffusers stacks in one tensor: layers of their own, in 4 bits, or diffusers' own tensor at 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, NucleusMoEImageTransformer2DModel
from diffusers.models.transformers.transformer_nucleusmoe_image import SwiGLUExperts
from safetensors.torch import load_file
from torch import Tensor, nn

from svdq_cli.calibration import collect_stats
from svdq_cli.calibration.row_sampling import RowSampling
from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.conversion.convert import convert
from svdq_cli.inference.load import load_16bit_pipeline, load_pipeline
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.planning.rules import recipe_rules
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare, warnings_of
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import IncludeOverride, Recipe
from svdq_cli.records import ActivationStats
from svdq_cli.source import open_source, read_tensor, take_experts_apart
from svdq_cli.source.experts import SingleExperts
from tests.families.test_pipelines import recipe_for
from tests.tiny_families import save_tiny
from tests.tiny_pipelines.images import tiny_nucleus

CPU = RunOptions(device="cpu")
STACK = "transformer_blocks.1.img_mlp.experts.gate_up_proj"
DOWN = "transformer_blocks.1.img_mlp.experts.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_nucleus, tmp_path_factory.mktemp("experts") / "model")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return recipe_for(folder)


@pytest.fixture(scope="module")
def converted(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("experts") / "out"
    convert(recipe, out, options=CPU)
    return out


def test_single_experts_compute_what_the_stack_does():
    torch.manual_seed(0)
    stacked = SwiGLUExperts(hidden_size=16, moe_intermediate_dim=8, num_experts=3)
    for weight in stacked.parameters():
        nn.init.normal_(weight)
    single = SingleExperts(stacked).to_empty(device="cpu")
    for name, weight in stacked.named_parameters():
        for number, linear in enumerate(getattr(single, name)):
            linear.weight.data = weight[number].T.contiguous()
    x, counts = torch.randn(9, 16), torch.tensor([5, 0, 2])  # two rows are padding
    # float32 sums in another order
    torch.testing.assert_close(single(x, counts), stacked(x, counts), rtol=1e-5, atol=1e-5)


def test_a_source_has_a_matrix_for_each_expert(folder: Path):
    source = open_source(folder)
    stored = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")[STACK]
    assert STACK not in source.tensors
    for number in range(4):
        entry = source.tensors[f"{STACK}.{number}.weight"]
        assert torch.equal(entry.read(), stored[number].T)
        assert torch.equal(entry.read_rows(3, 7), stored[number].T[3:7])
        assert entry.shape == (384, 128)


def test_the_16_bit_model_draws_what_diffusers_does(folder: Path, recipe: Recipe):
    prepared = prepare(recipe)
    settings = sampling_for(recipe, prepared.source).settings
    own = load_16bit_pipeline(prepared.source, class_name="", device=torch.device("cpu"))
    theirs = DiffusionPipeline.from_pretrained(folder, torch_dtype=own.transformer.dtype)
    (a,), (b,) = (generate_images(pipe, ["a red circle"], settings=settings) for pipe in (own, theirs))
    assert a.tobytes() == b.tobytes()


@dataclass(frozen=True)
class _Watched:
    """What the first expert of a stack read: by what calibration keeps of it, and by a hook of the test's own."""

    stats: ActivationStats
    calls: list[Tensor]  # (M, K), one image after the other


@pytest.fixture(scope="module")
def watched(folder: Path, recipe: Recipe) -> Callable[..., _Watched]:
    prepared = prepare(recipe)
    pipe = load_16bit_pipeline(prepared.source, class_name="", device=torch.device("cpu"))
    settings = replace(sampling_for(recipe, prepared.source).settings, steps=3)
    (item,) = (shared for shared in prepared.plan.inputs if shared.name == f"{STACK}.0")

    def watch(*, rows: int, batch_size: int = 1) -> _Watched:
        calls: list[Tensor] = []
        model = pipe.transformer
        chosen = replace(settings, batch_size=batch_size)
        stats = collect_stats(pipe, model, [item], ["a cat", "a red circle"], sampling=chosen, rows=rows)
        handle = model.get_submodule(item.name).register_forward_hook(
            lambda _, args, __: calls.append(args[0].clone())
        )
        generate_images(pipe, ["a cat", "a red circle"], settings=chosen)
        handle.remove()
        return _Watched(stats[item.name], calls)

    return watch


def test_the_tokens_of_an_expert_are_those_of_one_turn(
    watched: Callable[..., _Watched], monkeypatch: pytest.MonkeyPatch
):
    """Few rows come from every call; where all are kept, they are all that the expert read, in its order."""
    turns: list[int] = []
    plain = RowSampling.tokens

    def counted(self: RowSampling, *, image: int, turn: int, **rest: int) -> list[int]:
        turns.append(turn)
        return plain(self, image=image, turn=turn, **rest)

    monkeypatch.setattr(RowSampling, "tokens", counted)
    few = watched(rows=12)  # two images, three steps, with guidance two calls in each
    calls = [call.bfloat16() for call in few.calls]
    assert len(calls) == len(few.stats.rows) == 12
    assert all((call == row).all(-1).any() for call, row in zip(calls, few.stats.rows, strict=True))
    assert turns == [*range(6), *range(6)]
    every = watched(rows=10_000)
    assert torch.equal(every.stats.rows, torch.cat(every.calls).bfloat16())
    for seen in (few, every):
        read = torch.cat(seen.calls)
        assert seen.stats.tokens_seen == len(read)
        assert torch.equal(seen.stats.abs_max, read.abs().amax(0).float())


def test_the_tokens_of_an_expert_belong_to_their_own_image(watched: Callable[..., _Watched]):
    alone, together = (watched(rows=8, batch_size=size).stats for size in (1, 2))
    assert alone.tokens_seen == together.tokens_seen
    # 2e-2: rows are bfloat16 (8 bits), and sums of another batch size may tip their last bit
    torch.testing.assert_close(alone.rows, together.rows, rtol=2e-2, atol=1e-3)


def test_experts_become_layers_and_the_checkpoint_draws(folder: Path, recipe: Recipe, converted: Path):
    checkpoint = open_checkpoint(converted)
    # 192 columns are no whole tiles of a W4A4 layer
    assert {layer.name for layer in checkpoint.plan().w4a4} >= {f"{STACK}.{n}" for n in range(4)}
    assert {layer.name for layer in checkpoint.plan().w4a16} >= {f"{DOWN}.{n}" for n in range(4)}
    assert "transformer_blocks.1.img_mlp.gate" in {linear.name for linear in checkpoint.kept}
    report = check(converted, against=open_source(folder))
    assert report.status == "ok"
    settings = sampling_for(recipe, checkpoint.source).settings
    (image,) = generate_images(load_pipeline(converted, device="cpu"), ["a red circle"], settings=settings)
    assert len(image.getcolors(maxcolors=32 * 32) or ()) > 1  # not one flat color


def test_convert_and_card_say_who_runs_it(recipe: Recipe, converted: Path):
    (said,) = (text for text in warnings_of(prepare(recipe), data_free=False) if "experts, which" in text)
    assert "8 layers (4 W4A4, 4 W4A16)" in said
    card = (converted / "README.md").read_text()
    assert "from_pretrained" not in card
    assert "svdq_cli.load_pipeline" in card


def test_a_written_recipe_has_one_rule_for_all_experts_of_a_stack(recipe: Recipe):
    prepared = prepare(recipe)
    rules = recipe_rules(prepared.plan, prepared.inventory)
    experts = [rule for rule in rules if isinstance(rule, IncludeOverride) and ".experts." in rule.match]
    assert [(rule.match.rpartition(".experts.")[2], rule.include) for rule in experts] == [
        ("gate_up_proj.*", "w4a4"),
        ("down_proj.*", "w4a16"),
    ]


def test_inspect_names_the_experts_of_a_stack_by_their_range(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "experts.gate_up_proj.0 to 3" in said
    assert "experts.gate_up_proj.1" not in said


def test_experts_that_a_rule_keeps_are_stacked_as_diffusers_has_them(
    folder: Path, recipe: Recipe, tmp_path: Path
):
    keep = recipe.model_validate(
        {**recipe.model_dump(exclude_unset=True), "layers": [{"match": "*.experts.*", "keep": True}]}
    )
    out = tmp_path / "out"
    report = convert(keep, out, options=CPU)
    assert any("a rule of the recipe keeps it" in text for text in report.warnings)
    assert "from_pretrained" in (out / "README.md").read_text()
    written = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    stored = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(written[STACK], stored[STACK])
    theirs = NucleusMoEImageTransformer2DModel.from_pretrained(folder / "transformer")
    quantized = {layer.name for layer in open_checkpoint(out).layers}
    wanted = {name for name in theirs.state_dict() if name.rpartition(".")[0] not in quantized}
    assert wanted <= written.keys()
    assert check(out, against=open_source(folder)).status == "ok"
    checkpoint = open_checkpoint(out)
    name = f"{DOWN}.2.weight"
    assert torch.equal(checkpoint.kept_tensor(name), read_tensor(open_source(folder), name))
    load_pipeline(out, device="cpu")


def test_other_models_are_left_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4))
    take_experts_apart(model)
    assert type(model[0]) is nn.Linear
