"""A folded LoRA is in the file: every layer computes what it did plus strength times what the LoRA adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.errors import InputError, SvdqError, UsageError
from svdq_cli.lora.fold import FoldSettings, fold
from svdq_cli.records import W4A4Plan
from svdq_cli.reports import LoraReport
from svdq_cli.source import open_source
from tests.adapters.test_loras import (
    NAMES,
    Halves,
    drawn,
    kohya_diffusers,
    kohya_unet,
    peft,
    trained,
    unet_adapter,
)
from tests.adapters.test_loras import sd15 as sd15  # a fixture
from tests.entrypoints.test_export import converted_alone
from tests.lora.layers import (
    FOUR_BIT,
    MODULATION,
    QKV,
    SINGLE,
    SIXTEEN_BIT,
    layer_output,
    probes,
    relative,
    small_lora,
)

# The promise: on the layer's output, with the LoRA a fraction of it. bfloat16 rounds the LoRA's own factors to 0.2 %.
TOLERANCE = 1e-3
SINGLE_FILES = {"nunchaku-lite": "lite", "nunchaku": "nunchaku.safetensors", "comfy": "comfy.safetensors"}


def require_folded(
    before: Path, after: Path, loras: list[tuple[Mapping[str, Halves], float]], tolerance: float = TOLERANCE
) -> None:
    """Every layer of the LoRAs computes the old output plus theirs."""
    old, new = open_checkpoint(before), open_checkpoint(after)
    for name in {layer for lora, _ in loras for layer in lora}:
        width = next(lora[name][0].shape[1] for lora, _ in loras if name in lora)
        x = probes(width)
        expected = layer_output(old, name, x)
        for lora, strength in loras:
            if name in lora:
                down, up = lora[name]
                expected = expected + strength * x @ down.T @ up.T
        assert relative(layer_output(new, name, x), expected) < tolerance, name


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def scaled(adapter: Mapping[str, Halves], factor: float) -> dict[str, Halves]:
    return {name: (down, factor * up) for name, (down, up) in adapter.items()}


@pytest.mark.parametrize("names", NAMES)
def test_every_naming_is_folded(
    converted_flux: Callable[[str], Path],
    tmp_path: Path,
    names: Callable[[Mapping[str, Halves]], dict[str, Tensor]],
):
    adapter = scaled(trained(), 0.01)
    lora = saved(tmp_path / "lora.safetensors", names(adapter))
    base = converted_flux("int4") / "nunchaku.safetensors"
    report = fold(base, [LoraFile(lora, 0.8)], tmp_path / "out.safetensors")
    require_folded(base, tmp_path / "out.safetensors", [(adapter, 0.8)])
    assert {row.how for row in report.keys} == {"applied"}
    assert {layer for row in report.keys for layer in row.layers} == set(adapter)


@pytest.mark.parametrize(
    ("fmt", "precision"),
    [
        ("nunchaku-lite", "int4"),
        ("nunchaku-lite", "nvfp4"),
        ("nunchaku", "int4"),
        ("nunchaku", "nvfp4"),
        ("comfy", "int4"),
    ],
)
def test_every_format_takes_every_kind_of_layer(
    converted_flux: Callable[[str], Path], tmp_path: Path, fmt: str, precision: str
):
    layers = {**FOUR_BIT, **SIXTEEN_BIT, **({} if fmt == "nunchaku" else MODULATION)}
    adapter = small_lora(layers)
    lora = saved(tmp_path / "lora.safetensors", peft(adapter))
    base, out = converted_flux(precision) / SINGLE_FILES[fmt], tmp_path / "out"
    report = fold(base, [LoraFile(lora, 1.0)], out)
    # a merged weight is rounded to bfloat16, 0.1 % on average
    require_folded(base, out, [(adapter, 1.0)], tolerance=2e-3)
    assert check(out).status == "ok"
    how = {row.layers[0]: row.how for row in report.keys}
    assert {how[name] for name in FOUR_BIT} == {"applied"}
    assert {how[name] for name in layers if name not in FOUR_BIT} == {"merged"}
    # q, k and v have A matrices of their own: stacked where the file stacks them
    stacked = 3 * 4 if fmt != "nunchaku-lite" else 4
    assert report.rank == {"before": 16, "after": 16 + -(-stacked // 16) * 16}


def test_vllm_omni_is_folded_too(tmp_path: Path):
    from tests.tiny_families import tiny_pipeline

    source = tiny_pipeline("z-image", tmp_path / "z-image") / "transformer"
    base = converted_alone(source, tmp_path / "base.safetensors", "vllm-omni", "nvfp4")
    plans = [plan for plan in open_checkpoint(base).layers if "layers.0." in plan.name]
    adapter = small_lora({p.name: (p.linear.out_features, p.linear.in_features) for p in plans[:6]})
    lora = saved(tmp_path / "lora.safetensors", peft(adapter))
    fold(base, [LoraFile(lora, 1.0)], tmp_path / "out.safetensors")
    require_folded(base, tmp_path / "out.safetensors", [(adapter, 1.0)])


def test_padded_and_interleaved_rows_are_folded_in_their_order(tmp_path: Path):
    """SANA's engine reads padded tiles, keys and values by head, and hidden and gate rows in pairs."""
    from tests.tiny_families import tiny_pipeline

    source = tiny_pipeline("sana", tmp_path / "sana") / "transformer"
    base = converted_alone(source, tmp_path / "base.safetensors", "nunchaku", "int4")
    plans = open_checkpoint(base).layers
    adapter = small_lora({p.name: (p.linear.out_features, p.linear.in_features) for p in plans[:6]})
    lora = saved(tmp_path / "lora.safetensors", peft(adapter))
    fold(base, [LoraFile(lora, 1.0)], tmp_path / "out.safetensors")
    require_folded(base, tmp_path / "out.safetensors", [(adapter, 1.0)])


# ------------------------------------------------------------------------------------------------- exactness


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor, as bytes."""
    file = path if path.is_file() else path / "transformer/diffusion_pytorch_model.safetensors"
    return {name: tensor.contiguous().flatten().view(torch.uint8) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("fmt", SINGLE_FILES)
def test_strength_0_is_the_base_bit_for_bit(converted_flux: Callable[[str], Path], tmp_path: Path, fmt: str):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora(FOUR_BIT)))
    base = converted_flux("int4") / SINGLE_FILES[fmt]
    report = fold(base, [LoraFile(lora, 0.0)], tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {(row.how, row.why) for row in report.keys} == {("not applicable", "its weight is 0")}


def test_what_no_lora_touches_keeps_its_bits(converted_flux: Callable[[str], Path], tmp_path: Path):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora({QKV[0]: (128, 128)})))
    base = converted_flux("int4") / "comfy.safetensors"
    fold(base, [LoraFile(lora, 1.0)], tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"double_blocks.0.img_attn.qkv.proj_{x}" for x in ("down", "up")}


def test_two_loras_in_either_order_are_the_same_to_rounding(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    layers = {**FOUR_BIT, **SIXTEEN_BIT}
    first, second = small_lora(layers), small_lora(layers, seed=1, rank=3)
    a, b = saved(tmp_path / "a.safetensors", peft(first)), saved(tmp_path / "b.safetensors", peft(second))
    base = converted_flux("int4") / "nunchaku.safetensors"
    fold(base, [LoraFile(a, 0.5), LoraFile(b, 2.0)], tmp_path / "ab")
    fold(base, [LoraFile(b, 2.0), LoraFile(a, 0.5)], tmp_path / "ba")
    require_folded(base, tmp_path / "ab", [(first, 0.5), (second, 2.0)], tolerance=2e-3)
    one, other = open_checkpoint(tmp_path / "ab"), open_checkpoint(tmp_path / "ba")
    for name, (_, width) in layers.items():
        x = probes(width)
        assert relative(layer_output(one, name, x), layer_output(other, name, x)) < 1e-6, name


def test_folding_again_adds_to_what_is_there(converted_flux: Callable[[str], Path], tmp_path: Path):
    first, second = small_lora(FOUR_BIT), small_lora(FOUR_BIT, seed=1)
    a, b = saved(tmp_path / "a.safetensors", peft(first)), saved(tmp_path / "b.safetensors", peft(second))
    base = converted_flux("int4") / "comfy.safetensors"
    fold(base, [LoraFile(a)], tmp_path / "once")
    fold(tmp_path / "once", [LoraFile(b, 0.5)], tmp_path / "twice")
    require_folded(base, tmp_path / "twice", [(first, 1.0), (second, 0.5)])
    with safe_open(tmp_path / "twice", framework="pt") as file:
        made = json.loads(file.metadata()["svdq"])
    assert [lora["name"] for lora in made["folded_loras"]] == ["a.safetensors", "b.safetensors"]


def test_layers_with_one_a_matrix_take_its_rank_once(converted_flux: Callable[[str], Path], tmp_path: Path):
    """A fused q, k, v as BFL's names have it; and what is missing of the three is zero."""
    adapter = small_lora(dict.fromkeys(QKV, (128, 128)), rank=16)
    shared = {name: (adapter[QKV[0]][0], up) for name, (_, up) in adapter.items()}
    base = converted_flux("int4") / "nunchaku.safetensors"
    for name, lora in (("shared", shared), ("one", {QKV[1]: adapter[QKV[1]]})):
        file = saved(tmp_path / f"{name}.safetensors", peft(lora))
        report = fold(base, [LoraFile(file, 1.0)], tmp_path / name)
        assert report.rank["after"] == 32
        require_folded(base, tmp_path / name, [(lora, 1.0)])


def test_the_check_against_the_model_wants_the_same_loras(
    converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path
):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora(FOUR_BIT)))
    fold(converted_flux("int4") / "lite", [LoraFile(lora, 0.8)], tmp_path / "out")
    merged = merge_loras(open_source(tiny_flux), [LoraFile(lora, 0.8)])
    assert check(tmp_path / "out", against=merged).status == "ok"
    wrong = {problem.layer for problem in check(tmp_path / "out", against=open_source(tiny_flux)).problems}
    assert wrong == set(FOUR_BIT)


# ------------------------------------------------------------------------------------------------- other kinds


def biased(base: Path, tmp_path: Path, layers: dict[str, tuple[int, int]]) -> None:
    """LoRAs with biases on these layers, folded and compared."""
    adapter = small_lora(layers)
    added = {name: torch.linspace(-1, 1, rows) for name, (rows, _) in layers.items()}
    biases = {f"transformer.{name}.lora_B.bias": bias for name, bias in added.items()}
    lora = saved(tmp_path / "lora.safetensors", {**peft(adapter), **biases})
    fold(base, [LoraFile(lora, 0.5)], tmp_path / "out")
    old, new = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    for name, (down, up) in adapter.items():
        x = probes(down.shape[1])
        expected = layer_output(old, name, x) + 0.5 * (x @ down.T @ up.T + added[name])
        assert relative(layer_output(new, name, x), expected) < 2e-3, name
    assert check(tmp_path / "out").status == "ok"


@pytest.mark.parametrize("fmt", SINGLE_FILES)
def test_biases_are_folded_into_biases_moved_ones_too(
    converted_flux: Callable[[str], Path], tmp_path: Path, fmt: str
):
    """ff.net.2 and proj_out read unsigned activations in int4 single files: their biases are stored moved."""
    layers = {
        name: FOUR_BIT[name] for name in (QKV[1], "transformer_blocks.0.ff.net.2", f"{SINGLE}.proj_out")
    }
    biased(converted_flux("int4") / SINGLE_FILES[fmt], tmp_path, {**layers, "x_embedder": (128, 16)})


def test_loha_is_exact_where_its_rank_is_small_and_cut_with_its_error_where_not(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    base = converted_flux("int4") / "comfy.safetensors"
    (b1, a1), (b2, a2) = drawn(128, 128, 0), drawn(128, 128, 1)
    flat = f"lycoris_{QKV[0].replace('.', '_')}"
    parts = {"hada_w1_a": a1 * 0.004, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    lora = saved(tmp_path / "loha.safetensors", {f"{flat}.{key}": tensor for key, tensor in parts.items()})
    x, old = probes(128), open_checkpoint(base)
    expected = layer_output(old, QKV[0], x) + x @ (0.004 * (a1 @ b1) * (a2 @ b2)).T

    (row,) = fold(base, [LoraFile(lora, 1.0)], tmp_path / "exact").keys
    assert (row.kind, row.rank, row.how, row.error) == ("LoHa", 16, "applied", None)
    assert relative(layer_output(open_checkpoint(tmp_path / "exact"), QKV[0], x), expected) < TOLERANCE

    (row,) = fold(
        base, [LoraFile(lora, 1.0)], tmp_path / "cut", settings=FoldSettings(approximate_rank=8)
    ).keys
    assert row.error is not None
    assert 0.05 < row.error < 0.95
    added = expected - layer_output(old, QKV[0], x)
    missing = layer_output(open_checkpoint(tmp_path / "cut"), QKV[0], x) - expected
    # measured on random activations, of which there are few
    assert float(missing.norm() / added.norm()) == pytest.approx(row.error, rel=0.25)


def test_dora_is_cut_to_a_rank_and_says_what_that_costs(
    converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path
):
    name = QKV[0]
    weight = load_file(tiny_flux / "transformer/diffusion_pytorch_model.safetensors")[
        f"{name}.weight"
    ].float()
    (down, up) = small_lora({name: (128, 128)})[name]
    length = (weight + up @ down).norm(dim=1) * torch.linspace(0.9, 1.1, 128)
    tensors = {**peft({name: (down, up)}), f"transformer.{name}.dora_scale": length}
    lora = saved(tmp_path / "dora.safetensors", tensors)
    (row,) = fold(converted_flux("int4") / "lite", [LoraFile(lora, 1.0)], tmp_path / "out").keys
    assert (row.kind, row.how) == ("DoRA", "applied")
    assert row.error is not None
    assert 0 < row.error < 0.5


# ------------------------------------------------------------------------------------------------- max rank


def test_a_joint_branch_is_compressed_to_a_rank_with_its_error(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    adapter = small_lora(FOUR_BIT, rank=24)
    lora = saved(tmp_path / "lora.safetensors", peft(adapter))
    base = converted_flux("int4") / "nunchaku.safetensors"
    settings = FoldSettings(max_rank=32)
    report = fold(base, [LoraFile(lora, 1.0)], tmp_path / "out", settings=settings)
    assert report.rank == {"before": 16, "after": 32}
    assert report.layer_error.keys() >= FOUR_BIT.keys()
    assert all(0 < report.layer_error[name] < 1 for name in FOUR_BIT)
    old, new = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    for name, (down, up) in adapter.items():
        plans = [next(p for p in ckpt.layers if p.name == name) for ckpt in (old, new)]
        assert all(isinstance(plan, W4A4Plan) for plan in plans)
        before, after = old.branch(plans[0]), new.branch(plans[1])  # type: ignore[arg-type]
        joint = before.up.float() @ before.down.float() + up @ down
        error = relative(after.up.float() @ after.down.float(), joint)
        if name not in (*QKV, f"{SINGLE}.attn.to_v"):  # those are compressed together with their neighbors
            assert error == pytest.approx(report.layer_error[name], rel=0.02, abs=3e-3)


@pytest.mark.parametrize("rank", [0, 8, 20])
def test_a_rank_below_the_base_s_or_between_tiles_is_bad_usage(
    converted_flux: Callable[[str], Path], tmp_path: Path, rank: int
):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora(FOUR_BIT)))
    with pytest.raises(UsageError, match="multiple of 16, and at least 16"):
        fold(
            converted_flux("int4") / "lite",
            [LoraFile(lora, 1.0)],
            tmp_path / "o",
            settings=FoldSettings(max_rank=rank),
        )


def test_ranks_that_no_kernel_reads_are_refused_with_the_cure(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora(FOUR_BIT, rank=128)))
    with pytest.raises(UsageError, match="1024 at most") as caught:
        fold(converted_flux("int4") / "nunchaku.safetensors", [LoraFile(lora, 0.5)] * 3, tmp_path / "out")
    assert "--max-rank" in str(caught.value.hint)


# ------------------------------------------------------------------------------------------------- modulations


def test_a_modulation_without_a_place_is_refused_or_left_as_it_is_and_listed(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    adapter = small_lora({**FOUR_BIT, **MODULATION})
    lora = saved(tmp_path / "lora.safetensors", peft(adapter))
    base = converted_flux("int4") / "nunchaku.safetensors"
    with pytest.raises(UsageError, match="neither a branch nor a 16-bit form") as caught:
        fold(base, [LoraFile(lora, 1.0)], tmp_path / "out.safetensors")
    assert "--skip-w4a16" in str(caught.value.hint)
    report = fold(
        base, [LoraFile(lora, 1.0)], tmp_path / "out.safetensors", settings=FoldSettings(skip_w4a16=True)
    )
    left = [row for row in report.keys if row.how == "not applicable"]
    assert [row.layers for row in left] == [tuple(MODULATION)]
    assert "--skip-w4a16" in str(left[0].why)
    assert "left unchanged" in report.warnings[-1]
    require_folded(base, tmp_path / "out.safetensors", [({n: adapter[n] for n in FOUR_BIT}, 1.0)])


def test_a_modulation_at_16_bits_says_what_it_takes(converted_flux: Callable[[str], Path], tmp_path: Path):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora(MODULATION)))
    report = fold(converted_flux("int4") / "lite", [LoraFile(lora, 1.0)], tmp_path / "out")
    assert "1 W4A16 layers become 16-bit ones" in report.warnings[-1]
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    assert not set(MODULATION) & set(config["awq_w4a16"]["targets"])


# ------------------------------------------------------------------------------------------------- refusals


def refused(base: Path, tmp_path: Path, lora: Path) -> SvdqError:
    """Refused before anything is written."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        fold(base, [LoraFile(lora, 1.0)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return caught.value


def test_what_is_wrong_with_a_lora_is_named_and_nothing_is_written(
    converted_flux: Callable[[str], Path], sd15: object, tmp_path: Path
):
    base = converted_flux("int4") / "lite"
    other = saved(tmp_path / "other.safetensors", kohya_unet(unet_adapter(sd15)))  # type: ignore[arg-type]
    assert "made for a different model" in refused(base, tmp_path, other).message

    spoiled = peft(small_lora(FOUR_BIT))
    spoiled[f"transformer.{QKV[0]}.lora_A.weight"][0, 0] = torch.nan
    assert "NaN" in refused(base, tmp_path, saved(tmp_path / "nan.safetensors", spoiled)).message

    empty = peft({QKV[0]: (torch.zeros(0, 128), torch.zeros(128, 0))})
    assert "rank 0" in refused(base, tmp_path, saved(tmp_path / "empty.safetensors", empty)).message

    cut = saved(tmp_path / "cut.safetensors", peft(small_lora(FOUR_BIT)))
    cut.write_bytes(cut.read_bytes()[:-64])
    assert "truncated" in refused(base, tmp_path, cut).message

    bias = {**peft(small_lora({f"{SINGLE}.proj_mlp": (512, 128)}))}
    bias[f"transformer.{SINGLE}.proj_mlp.lora_B.bias"] = torch.ones(3)
    assert "its bias has 3 values" in refused(base, tmp_path, saved(tmp_path / "b.safetensors", bias)).message


def test_keys_for_text_encoders_are_listed_as_not_applicable(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 2)}
    file = {**kohya_diffusers(small_lora({QKV[0]: (128, 128)})), **text}
    lora = saved(tmp_path / "lora.safetensors", file)
    report: LoraReport = fold(converted_flux("int4") / "lite", [LoraFile(lora, 1.0)], tmp_path / "out")
    assert [row.why for row in report.keys if row.how == "not applicable"] == ["for the text encoders"]
    assert (tmp_path / "out/svdq_report.json").is_file()


def test_the_command_reports_a_table_as_json_and_its_exit_codes(
    converted_flux: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = saved(tmp_path / "lora.safetensors", peft(small_lora({**FOUR_BIT, **MODULATION})))
    base, out = converted_flux("int4") / "nunchaku.safetensors", tmp_path / "out.safetensors"
    command = f"lora {base} --lora {lora}:0.8 -o {out} --json -q"
    assert run(command.split()) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "not-exact"
    assert run([*command.split(), "--skip-w4a16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["command"], report["status"], report["loras"][0]["weight"]) == ("lora", "ok", 0.8)
    assert {row["how"] for row in report["keys"]} == {"applied", "not applicable"}
    assert json.loads(Path(f"{out}.report.json").read_text()) == report
    assert run(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loras"] == ["lora.safetensors:0.8"]
    assert run(f"lora {base} --lora {tmp_path}/none.safetensors -o {tmp_path}/b --json -q".split()) == 3


def test_the_screen_counts_layers_of_the_model(
    converted_flux: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A fused q, k and v is one layer of the file and three of the model; two files on one layer are one layer."""
    adapter = small_lora(dict.fromkeys(QKV, (128, 128)))
    joined = {name: (adapter[QKV[0]][0], up) for name, (_, up) in adapter.items()}
    down, up = joined[QKV[0]][0], torch.cat([up for _, up in joined.values()])
    prefix = "diffusion_model.double_blocks.0.img_attn.qkv.lora"
    one = saved(tmp_path / "one.safetensors", {f"{prefix}_A.weight": down, f"{prefix}_B.weight": up})
    two = saved(tmp_path / "two.safetensors", peft(adapter))
    base = converted_flux("int4") / "nunchaku.safetensors"
    assert run(f"lora {base} --lora {one} --lora {two} -o {tmp_path}/out.safetensors -q".split()) == 0
    assert "     3 layers applied (LoRA)" in capsys.readouterr().out
