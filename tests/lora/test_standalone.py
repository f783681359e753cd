"""LoRA files for Nunchaku's FLUX.1 engine, against the bytes of its own converter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.updates import LowRankUpdate
from svdq_cli.checkpoint.branches import stacked_branches
from svdq_cli.checkpoint.file_layout import FileLayout, StoredModule
from svdq_cli.checkpoint.match_layout import lay_out
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.errors import UsageError
from svdq_cli.families.layouts import layout_of
from svdq_cli.formats.contract import Branch
from svdq_cli.formats.nunchaku import FORMAT
from svdq_cli.lora.branch_ops import additions, extended, padded, whole_tiles
from svdq_cli.lora.standalone import block_tensors, modulation_tensors, write_nunchaku_lora
from svdq_cli.pack.low_rank import unpack_down, unpack_up
from svdq_cli.records import Int4, LayerPlan, Linear, W4A4Plan, W4A16Plan
from tests.adapters.test_loras import peft
from tests.lora.layers import FOUR_BIT, MODULATION, SIXTEEN_BIT, small_lora
from tests.lora.test_fold import saved

GOLDEN = Path(__file__).parent.parent / "golden" / "lorafold_flux_h128_r16.safetensors"
# The layers of the golden block: hidden 128, MLP 128, rank 16
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
WIDE = {"proj_out": (128, 256)}
W4A4 = {
    DOUBLE: (
        *(f"attn.to_{x}" for x in "qkv"),
        *(f"attn.add_{x}_proj" for x in "qkv"),
        "attn.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    ),
    SINGLE: (*(f"attn.to_{x}" for x in "qkv"), "proj_mlp", "proj_out"),
}
NORMS = {f"{DOUBLE}.norm1.linear": 768, f"{SINGLE}.norm.linear": 384}


def golden(prefix: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def golden_file() -> FileLayout:
    plans: dict[str, LayerPlan] = {}
    for block, names in W4A4.items():
        for name in names:
            rows, columns = WIDE.get(name, (128, 128))
            plans[f"{block}.{name}"] = W4A4Plan(Linear(f"{block}.{name}", columns, rows, True), Int4(), 16)
    for name, rows in NORMS.items():
        plans[name] = W4A16Plan(Linear(name, 128, rows, True))
    linears = [plan.linear for plan in plans.values()]
    state = {f"{linear.name}.weight": (linear.out_features, linear.in_features) for linear in linears}
    return lay_out(FORMAT, layout_of("flux", "nunchaku"), tuple(plans.values()), state)


def golden_updates() -> dict[str, LowRankUpdate]:
    lora = golden("lora.")
    names = {key.partition(".lora_")[0] for key in lora}
    return {
        name: LowRankUpdate(lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"], 1.0)
        for name in names
    }


def with_lora(module: StoredModule, base: Branch, updates: dict[str, LowRankUpdate]) -> Branch:
    """A module's branch with the LoRA, of whole rank tiles. The two parts of the base's proj_out have branches of their
    own, so each takes its columns of the LoRA."""
    columns = slice(None) if module.columns is None else slice(*module.columns)
    of_module = {
        layer.name: replace(updates[layer.name], down=updates[layer.name].down[:, columns])
        for layer in module.layers
        if layer.name in updates
    }
    sizes = [layer.linear.out_features for layer in module.layers]
    ups = dict(zip([layer.name for layer in module.layers], base.up.split(sizes), strict=True))
    before = {name: Branch(base.down, up) for name, up in ups.items()}
    joined = extended(before, additions([of_module], torch.bfloat16))
    whole = padded(joined, rank=whole_tiles(joined[module.layers[0].name].rank))
    return stacked_branches(module, whole)


def test_the_golden_file_byte_for_byte():
    """q, k, v with three A matrices, with one, with one of the three missing; rank padding; fc1 and fc2 of equal rank;
    the single block's split projection; interleaved modulations."""
    file, updates = golden_file(), golden_updates()
    base = golden("base.")
    stored: dict[str, Branch] = {}
    for module in file.modules:
        if isinstance(module.plan, W4A4Plan):
            suffixes = ("lora_down", "lora_up")
            found = FORMAT.decode_branch({s: base[f"{module.name}.{s}"] for s in suffixes}, module.traits)
            stored[module.name] = with_lora(module, found, updates)
    norms = {name: Branch(updates[name].down, updates[name].up) for name in NORMS}
    made = {**block_tensors(file.modules, stored), **modulation_tensors(file.modules, norms)}
    expected = golden("out.")
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(made[name].view(torch.int16), tensor.view(torch.int16)), name


def test_a_file_holds_every_branch_with_the_loras_and_the_rest_beside(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    base = converted_flux("int4") / "nunchaku.safetensors"
    adapter = small_lora({**FOUR_BIT, **MODULATION, **SIXTEEN_BIT})
    lora = saved(tmp_path / "lora.safetensors", peft(adapter))
    report = write_nunchaku_lora(base, [LoraFile(lora, 0.5)], tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    checkpoint = open_checkpoint(base)
    modules = {m.name for m in checkpoint.file.modules if isinstance(m.plan, W4A4Plan)}
    assert {name.removesuffix(".lora_up") for name in found if name.endswith(".lora_up")} == {
        *modules,
        *MODULATION,
    }
    module = "transformer_blocks.0.out_proj"
    plan = next(p for p in checkpoint.layers if p.name == "transformer_blocks.0.attn.to_out.0")
    assert isinstance(plan, W4A4Plan)
    before = checkpoint.branch(plan)
    down, up = adapter[plan.name]
    product = (
        unpack_up(found[f"{module}.lora_up"]).float() @ unpack_down(found[f"{module}.lora_down"]).float()
    )
    torch.testing.assert_close(
        product, before.up.float() @ before.down.float() + 0.5 * up @ down, rtol=0, atol=2e-3
    )
    a, b = (found[f"x_embedder.lora_{half}.weight"].float() for half in "AB")
    down, up = adapter["x_embedder"]
    torch.testing.assert_close(b @ a, 0.5 * up @ down, rtol=0, atol=2e-3)
    assert {row.how for row in report.keys if row.layers[0] not in SIXTEEN_BIT} == {"applied"}
    assert "at strength 1" in report.warnings[-1]
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["svdq_lora"])["loras"][0]["weight"] == 0.5


def test_other_bases_and_biases_are_refused(converted_flux: Callable[[str], Path], tmp_path: Path):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora(FOUR_BIT)))
    with pytest.raises(UsageError, match=r"FLUX\.1 in the nunchaku format"):
        write_nunchaku_lora(converted_flux("int4") / "lite", [LoraFile(lora, 1.0)], tmp_path / "out")
    name = next(iter(FOUR_BIT))
    biased = {**peft(small_lora(FOUR_BIT)), f"transformer.{name}.lora_B.bias": torch.ones(128)}
    with pytest.raises(UsageError, match="changes a bias"):
        write_nunchaku_lora(
            converted_flux("int4") / "nunchaku.safetensors",
            [LoraFile(saved(tmp_path / "biased.safetensors", biased), 1.0)],
            tmp_path / "out",
        )


def test_the_command_writes_it_with_a_format(
    converted_flux: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora(FOUR_BIT)))
    command = f"lora {converted_flux('int4')}/nunchaku.safetensors --lora {lora} -o {tmp_path}/out --json"
    assert run([*command.split(), "--format", "nunchaku"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["format"] == "nunchaku-lora"
    assert run([*command.split(), "--format", "comfy", "--overwrite"]) == 2
