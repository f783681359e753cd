"""A model family that svdq has never heard of: planned by its structure, written as a recipe, converted, checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.conversion.convert import convert
from svdq_cli.entrypoints.init import write_recipe
from svdq_cli.errors import InputError, RecipeError
from svdq_cli.formats import format_named
from svdq_cli.inference.backend import Backend
from svdq_cli.inference.load import load_model
from svdq_cli.planning.plan import plan_model
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import (
    GroupOverride,
    IncludeOverride,
    KeepOverride,
    LayerOverride,
    Quantization,
    SkipOverride,
    default_recipe,
    load_recipe,
)
from svdq_cli.records import Int4, ModelPlan, SharedInput
from svdq_cli.source import open_source

WIDTH, TEXT = 128, 256
LITE = format_named("nunchaku-lite")


class OddBlock(nn.Module):
    """Names that no family file knows."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(WIDTH, 2 * WIDTH)  # modulation, but not by its name
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(WIDTH, 2 * WIDTH)
        self.cross_query = nn.Linear(WIDTH, WIDTH)
        self.cross_key_value = nn.Linear(TEXT, 2 * WIDTH)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.squeeze = nn.Linear(WIDTH, 24)  # fits no 4-bit kernel

    def forward(self, x, text, condition):
        scale, shift = self.shift(condition).unsqueeze(1).chunk(2, dim=-1)
        y = x * (1 + scale) + shift
        key, value = self.key_value(y).chunk(2, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(self.query(y), key, value)
        key, value = self.cross_key_value(text).chunk(2, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(self.cross_query(x), key, value)
        y = torch.tanh(x)
        return x + self.down(torch.sigmoid(self.gate(y)) * self.up(y)) + self.squeeze(x).mean()


class OddTransformer2DModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, in_channels: int = 16, text_width: int = TEXT, depth: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(in_channels, WIDTH)
        self.clock = nn.Linear(1, WIDTH)
        self.trunk = nn.ModuleList([OddBlock() for _ in range(depth)])
        self.leave = nn.Linear(WIDTH, in_channels)

    def forward(self, hidden_states, encoder_hidden_states, timestep, return_dict: bool = True):
        condition = torch.tanh(self.clock(timestep[:, None].float()))
        x = self.enter(hidden_states)
        for block in self.trunk:
            x = block(x, encoder_hidden_states, condition)
        return (self.leave(x),)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The component's folder, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("odd") / "transformer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        OddTransformer2DModel().bfloat16().save_pretrained(folder)
    return folder


def plan_of(folder: Path, *rules: LayerOverride, family: str = "auto") -> ModelPlan:
    return plan_model(
        open_source(folder),
        precision=Int4(),
        rank=16,
        family=family,
        overrides=rules,
        supports=LITE.unsupported_reason,
    )


def groups_of(plan: ModelPlan) -> dict[str, tuple[str, ...]]:
    """The first block's shared inputs: first layer -> the layers, by their own names."""
    leaf = {shared.name: tuple(n.rsplit(".", 1)[1] for n in shared.layers) for shared in plan.inputs}
    return {
        name.removeprefix("trunk.0."): names for name, names in leaf.items() if name.startswith("trunk.0.")
    }


def test_roles_follow_from_the_structure(odd: Path):
    plan = plan_of(odd)
    assert plan.family == "structural"
    assert {layer.name for layer in plan.w4a16} == {"trunk.0.shift", "trunk.1.shift"}
    assert {layer.name for layer in plan.w4a4} == {
        f"trunk.{i}.{name}"
        for i in (0, 1)
        for name in ("query", "key_value", "cross_query", "cross_key_value", "gate", "up", "down")
    }
    # outside the blocks; a size that fits no kernel
    kept = {linear.name for linear in plan.kept}
    assert {"enter", "clock", "leave", "trunk.1.squeeze"} <= kept


def test_shared_inputs_are_seen_in_one_forward_pass(odd: Path):
    assert groups_of(plan_of(odd)) == {
        "shift": ("shift",),
        "query": ("query", "key_value"),
        "cross_query": ("cross_query",),
        "cross_key_value": ("cross_key_value",),
        "gate": ("gate", "up"),
        "down": ("down",),
    }


def test_it_converts_and_checks_with_no_code_of_its_own(odd: Path, tmp_path: Path):
    quantization = Quantization.model_validate({"effort": "datafree", "rank": 16})
    report = convert(
        default_recipe(str(odd), quantization=quantization),
        tmp_path / "out",
        options=RunOptions(device="cpu"),
    )
    assert report.status == "ok"
    assert report.model.family == "structural"
    assert (report.layers.w4a4, report.layers.w4a16) == (14, 2)
    assert check(tmp_path / "out", against=open_source(odd)).status == "ok"
    torch.manual_seed(1)
    arguments = (torch.randn(1, 9, 16), torch.randn(1, 5, TEXT), torch.tensor([0.5]))
    wanted = OddTransformer2DModel.from_pretrained(odd, torch_dtype=torch.float32)(*arguments)[0]
    checkpoint = open_checkpoint(tmp_path / "out")
    converted, _ = load_model(checkpoint, dtype=torch.float32, backend=Backend("reference", "a test's"))
    got = converted(*arguments)[0]
    assert (got - wanted).norm() < 0.5 * wanted.norm()


def test_init_writes_the_plan_as_rules_that_give_the_same_plan(odd: Path, tmp_path: Path):
    out = tmp_path / "recipe.yaml"
    write_recipe(str(odd), out, {}, overwrite=False)
    text = out.read_text()
    assert "{match: trunk.*.query, include: w4a4}" in text
    assert "{match: trunk.*.shift, include: w4a16}" in text
    assert "{match: trunk.*, group: [gate, up]}" in text
    assert "{match: enter, keep: true}" in text
    written, found = prepare(load_recipe(out)).plan, prepare(default_recipe(str(odd))).plan
    assert written.layers == found.layers
    assert written.kept == found.kept
    assert sorted_inputs(written) == sorted_inputs(found)


def sorted_inputs(plan: ModelPlan) -> list[SharedInput]:
    return sorted(plan.inputs, key=lambda shared: shared.name)


def test_rules_include_skip_keep_and_group(odd: Path):
    plan = plan_of(
        odd,
        IncludeOverride(match="trunk.*.cross_key_value", include="w4a16"),
        SkipOverride(match="trunk.1", skip=True),
        KeepOverride(match="*.down", keep=True),
        GroupOverride(match="trunk.*", group=("up",)),
    )
    names = {layer.name for layer in plan.layers}
    assert "trunk.0.cross_key_value" in names
    assert "trunk.0.down" not in names
    assert not any(name.startswith("trunk.1.") for name in names)
    groups = groups_of(plan)
    assert groups["gate"] == ("gate",)
    assert groups["up"] == ("up",)
    covered = sorted(name for shared in plan.inputs for name in shared.layers)
    assert covered == sorted(names)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (SkipOverride(match="branch.0", skip=True), "matches no module"),
        (IncludeOverride(match="trunk.*.querry", include="w4a4"), "matches no linear layer"),
        (GroupOverride(match="trunk.*", group=("query", "nothing")), "holds all of query, nothing"),
        (GroupOverride(match="trunk.*", group=("query", "down")), "input sizes differ"),
        (GroupOverride(match="trunk.*", group=("query", "shift")), "not all of them are W4A4"),
    ],
    ids=["skip", "include", "group-name", "group-size", "group-role"],
)
def test_a_rule_that_fits_nothing_is_refused(odd: Path, rule: LayerOverride, said: str):
    with pytest.raises(RecipeError, match=said):
        plan_of(odd, rule)


def test_inspect_prints_what_shares_an_input(odd: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["inspect", str(odd)]) == 0
    printed = capsys.readouterr().out
    assert "structural (OddTransformer2DModel)" in printed
    assert "trunk.*\n" in printed.replace(" ", "")
    assert "2 x key_value, gate+up" in printed


def test_a_known_family_can_be_planned_by_structure_too(tiny_flux: Path):
    """The same roles as the family's rules, and the same layers share an input."""
    known, found = plan_of(tiny_flux), plan_of(tiny_flux, family="structural")
    assert {layer.name for layer in found.w4a4} == {layer.name for layer in known.w4a4}
    assert {layer.name for layer in found.w4a16} == {layer.name for layer in known.w4a16}

    def w4a4_groups(plan: ModelPlan) -> set[frozenset[str]]:
        w4a4 = {layer.name for layer in plan.w4a4}
        return {frozenset(shared.layers) for shared in plan.inputs if shared.layers[0] in w4a4}

    assert w4a4_groups(found) == w4a4_groups(known)


def test_a_class_that_the_program_did_not_define_is_refused(odd: Path, tmp_path: Path):
    config = (odd / "config.json").read_text().replace("OddTransformer2DModel", "OtherTransformer2DModel")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="no model class 'OtherTransformer2DModel'") as caught:
        plan_of(tmp_path / "config.json")
    assert "import the module" in str(caught.value.hint)
