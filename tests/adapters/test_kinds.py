"""Every kind of adapter that peft 0.21 and lycoris-lora 4.1 make on linear and 1x1 layers: merged, it computes what the
library's own forward does, or it is refused by its name. There is no third outcome."""

# peft's configs are made by name here
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lycoris.modules import get_module, make_module
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.errors import InputError
from svdq_cli.source import Source, open_source, read_tensor
from tests.adapters.kinds import (
    ALPHA,
    LYCORIS,
    LYCORIS_REFUSED,
    LYCORIS_TUCKER,
    PEFT,
    PEFT_CHANGES_BASE,
    PEFT_LINEAR,
    PEFT_WITH_BIAS,
    RANK,
    TrainedAdapter,
    TrainedLayer,
    skeleton,
    train_with_lycoris,
    train_with_peft,
)
from tests.tiny_families import tiny_pipeline

LINEAR = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.ff.net.2",
    "single_transformer_blocks.0.proj_mlp",
)
POINTWISE = ("down_blocks.1.attentions.0.proj_in", "up_blocks.0.attentions.1.proj_out")
# Of the change, a tenth of the weight; both sides are float32
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def flux(tiny_flux: Path) -> Source:
    return open_source(tiny_flux)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(tiny_pipeline("sd15", tmp_path_factory.mktemp("sd15")))


def state_of(source: Source, layers: Sequence[str]) -> Mapping[str, Tensor]:
    names = [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    return {name: read_tensor(source, name) for name in names if name in source.tensors}


def require_same(
    source: Source, adapter: TrainedAdapter, *, weight: float = 1.0, tolerance: float = TOLERANCE
) -> Source:
    """The merged model computes what the library did, in every layer."""
    merged = merge_loras(source, [LoraFile(adapter.path, weight)])
    for name, layer in adapter.layers.items():
        error = layer.error(computed(source, name, layer.x), computed(merged, name, layer.x))
        assert error < tolerance, name
    return merged


def computed(source: Source, name: str, x: Tensor) -> Tensor:
    weight, bias = read_tensor(source, f"{name}.weight").float(), None
    if f"{name}.bias" in source.tensors:
        bias = read_tensor(source, f"{name}.bias").float()
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])


@pytest.mark.parametrize("kind", [*PEFT, *PEFT_WITH_BIAS, *PEFT_LINEAR, *PEFT_CHANGES_BASE])
def test_linear_layers_compute_what_peft_s_do(flux: Source, tmp_path: Path, kind: str):
    config = {**PEFT, **PEFT_WITH_BIAS, **PEFT_LINEAR, **PEFT_CHANGES_BASE}[kind]
    adapter = train_with_peft(config, skeleton(state_of(flux, LINEAR), LINEAR), LINEAR, tmp_path)
    merged = require_same(flux, adapter)
    assert any("its training subtracted a part" in text for text in merged.warnings) == (
        kind in PEFT_CHANGES_BASE
    )
    # the same by the file's own name
    require_same(flux, TrainedAdapter(tmp_path / "adapter_model.safetensors", adapter.layers))


@pytest.mark.parametrize("kind", [*PEFT, *PEFT_WITH_BIAS])
def test_pointwise_convolutions_compute_what_peft_s_do(unet: Source, tmp_path: Path, kind: str):
    config = {**PEFT, **PEFT_WITH_BIAS}[kind]
    model = skeleton(state_of(unet, POINTWISE), POINTWISE)
    require_same(unet, train_with_peft(config, model, POINTWISE, tmp_path))


@pytest.mark.parametrize("kind", LYCORIS)
def test_linear_layers_compute_what_lycoris_do(flux: Source, tmp_path: Path, kind: str):
    model = skeleton(state_of(flux, LINEAR), LINEAR)
    require_same(flux, train_with_lycoris(LYCORIS[kind], model, LINEAR, tmp_path / "l.safetensors"))


@pytest.mark.parametrize("kind", LYCORIS)
def test_pointwise_convolutions_compute_what_lycoris_do(unet: Source, tmp_path: Path, kind: str):
    model = skeleton(state_of(unet, POINTWISE), POINTWISE)
    require_same(unet, train_with_lycoris(LYCORIS[kind], model, POINTWISE, tmp_path / "l.safetensors"))


KERNELS = ("down_blocks.0.resnets.0.conv1", "conv_in")


# Of whole matrices here, of a rank whose root is whole: nothing in the file tells that it was trained with rs_lora
UNTOLD = {"LoKr, rs_lora"}


@pytest.mark.parametrize("kind", sorted({*LYCORIS, *LYCORIS_TUCKER} - UNTOLD))
def test_convolutions_with_kernels_compute_what_lycoris_do(unet: Source, tmp_path: Path, kind: str):
    model = skeleton(state_of(unet, KERNELS), KERNELS)
    said = {**LYCORIS, **LYCORIS_TUCKER}[kind]
    require_same(unet, train_with_lycoris(said, model, KERNELS, tmp_path / "l.safetensors"))


@pytest.mark.parametrize("missing", ["hada_t1", "hada_t2"])
def test_a_tucker_core_without_the_other_is_half_of_an_adapter(unet: Source, tmp_path: Path, missing: str):
    model = skeleton(state_of(unet, KERNELS), KERNELS)
    file = tmp_path / "l.safetensors"
    train_with_lycoris(LYCORIS_TUCKER["LoHa, Tucker"], model, KERNELS, file)
    save_file({key: t for key, t in load_file(file).items() if not key.endswith(missing)}, file)
    with pytest.raises(InputError, match="only half of their LoRA"):
        merge_loras(unet, [LoraFile(file, 1.0)])


def test_a_tucker_core_that_does_not_fit_is_refused_by_its_layer(unet: Source, tmp_path: Path):
    file = tmp_path / "l.safetensors"
    tensors = {"lora_up.weight": torch.ones(32, 2, 1, 1), "lora_down.weight": torch.ones(2, 4, 1, 1)}
    for core in (torch.ones(2, 3, 3, 3), torch.ones(2, 2, 400), torch.ones(2, 2, 3, 1)):
        save_file(
            {f"lora_unet_conv_in.{k}": t for k, t in (tensors | {"lora_mid.weight": core}).items()}, file
        )
        with pytest.raises(InputError, match="conv_in"):
            merge_loras(unet, [LoraFile(file, 1.0)])


@pytest.mark.parametrize("kind", ["DoRA by rows", "DoRA by columns"])
def test_depthwise_convolutions_compute_what_lycoris_do(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, kind: str
):
    """Each of their rows has one input, so that DoRA by columns has one length for all of them."""
    source = open_source(tiny_pipeline("sana", tmp_path_factory.mktemp("sana")))
    layers = ["transformer_blocks.0.ff.conv_depth"]
    model = skeleton(state_of(source, layers), layers)
    require_same(source, train_with_lycoris(LYCORIS[kind], model, layers, tmp_path / "l.safetensors"))


@pytest.mark.parametrize("kind", ["DoRA by rows", "DoRA by columns", "LoKr, DoRA by columns", "full"])
def test_a_fused_layer_is_measured_as_the_one_layer_that_it_was(flux: Source, tmp_path: Path, kind: str):
    """Under BFL's names q, k and v are one matrix, and so are their columns."""
    parts = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    fused = {
        f"double_blocks.0.img_attn.qkv.{leaf}": torch.cat(
            [read_tensor(flux, f"{part}.{leaf}").float() for part in parts]
        )
        for leaf in ("weight", "bias")
    }
    layers = ["double_blocks.0.img_attn.qkv"]
    adapter = train_with_lycoris(LYCORIS[kind], skeleton(fused, layers), layers, tmp_path / "l.safetensors")
    merged = merge_loras(flux, [LoraFile(adapter.path, 1.0)])
    run = adapter.layers[layers[0]]
    before, after = (torch.cat([computed(s, part, run.x) for part in parts], dim=1) for s in (flux, merged))
    assert run.error(before, after) < TOLERANCE


def test_norms_compute_what_lycoris_do(unet: Source, tmp_path: Path):
    name = "mid_block.attentions.0.norm"
    norm = torch.nn.GroupNorm(8, 128)
    weight, bias = (read_tensor(unet, f"{name}.{leaf}").float() for leaf in ("weight", "bias"))
    norm.load_state_dict({"weight": weight, "bias": bias})
    module = NormModule("", norm)
    torch.manual_seed(0)
    torch.nn.init.normal_(module.w_norm)
    torch.nn.init.normal_(module.b_norm)
    file, flat = tmp_path / "l.safetensors", f"lycoris_{name.replace('.', '_')}"
    save_file({f"{flat}.{key}": tensor for key, tensor in module.state_dict().items()}, file)
    merged = merge_loras(unet, [LoraFile(file, 1.0)])
    x = torch.randn(2, 128, 4, 4)
    expected = module.eval()(x).detach()
    weight, bias = (read_tensor(merged, f"{name}.{leaf}") for leaf in ("weight", "bias"))
    found = F.group_norm(x, 8, weight, bias, eps=norm.eps)
    assert float((found - expected).norm() / (expected - norm(x)).norm()) < TOLERANCE


def test_dylora_is_read_as_lycoris_reads_its_file(flux: Source, tmp_path: Path):
    """Its forward takes another rank at every call; what it saves is a LoRA, for LyCORIS too."""
    name = LINEAR[0]
    layer = skeleton(state_of(flux, [name]), [name]).get_submodule(name)
    trained = DyLoraModule("", layer, lora_dim=8, alpha=ALPHA, block_size=4)
    torch.manual_seed(0)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    saved = {
        f"lycoris_{name.replace('.', '_')}.{k}": v.detach().clone() for k, v in trained.state_dict().items()
    }
    save_file(saved, tmp_path / "l.safetensors")
    cls, parts = get_module(saved, f"lycoris_{name.replace('.', '_')}")
    read = make_module(cls, parts, "", layer)
    assert read is not None
    x = torch.randn(4, 128)
    adapter = TrainedAdapter(tmp_path / "l.safetensors", {name: TrainedLayer(x, layer(x), read(x))})
    require_same(flux, adapter)


@pytest.mark.parametrize("kind", LYCORIS_REFUSED)
def test_other_algorithms_of_lycoris_are_refused_by_name(flux: Source, tmp_path: Path, kind: str):
    cls, said, name = LYCORIS_REFUSED[kind]
    model = skeleton(state_of(flux, LINEAR), LINEAR)
    adapter = train_with_lycoris((cls, said), model, LINEAR, tmp_path / "l.safetensors")
    assert name in refused(flux, adapter.path)


def refused(source: Source, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        merge_loras(source, [LoraFile(path, 1.0)])
    assert caught.value.kind == "lora"
    assert "merge" in str(caught.value.hint)
    return caught.value.message


# ------------------------------------------------------------------------------------------------- other tuners

_READ = ("LORA", "LOHA", "LOKR")
_NEEDS = {
    "ADALORA": {"total_step": 10},
    "IA3": {"feedforward_modules": []},
    "VBLORA": {"vector_length": 32},
    "FOURIERFT": {"n_frequency": 50},
    "WAVEFT": {"n_frequency": 50},
    "C3A": {"block_size": 32},
    "OFT": {"oft_block_size": 32},
}
# Those of language models, which have no layers to adapt, or need more than a layer: never on a denoiser
_NOT_OF_LAYERS = (
    *(
        "ADAPTION_PROMPT",
        "CARTRIDGE",
        "CPT",
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
    ),
    *("SHADOW", "XLORA", "TRAINABLE_TOKENS"),
    "ADAMSS",  # needs scikit-learn
)
_TUNERS = sorted(str(getattr(tuner, "value", tuner)) for tuner in PEFT_TYPE_TO_CONFIG_MAPPING)


@pytest.mark.parametrize("tuner", [t for t in _TUNERS if t not in (*_READ, *_NOT_OF_LAYERS)])
def test_other_tuners_of_peft_are_refused_by_name_with_their_config_and_without(
    flux: Source, tmp_path: Path, tuner: str
):
    config = next(c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if getattr(t, "value", t) == tuner)
    layers = LINEAR[:1]
    model = skeleton(state_of(flux, layers), layers)
    get_peft_model(model, config(target_modules=["to_q"], **_NEEDS.get(tuner, {}))).save_pretrained(tmp_path)
    assert f"adapter type {tuner}" in refused(flux, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    alone = refused(flux, tmp_path)
    plain = alone.split(": ")[2].lower()  # file: key: kind
    assert plain.translate(str.maketrans("", "", "-^() ")).startswith(tuner.lower().replace("_", "")), alone


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
        ({"init_lora_weights": "of next year"}, "'of next year'"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"velora_config": {"num_groups": 2}}, "VeLoRA"),
        ({"monteclora_config": {"num_samples": 2}}, "MonteCLoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"layer_replication": [[0, 1]]}, "repeated layers"),
        ({"target_parameters": ["to_q.weight"]}, "bare parameters"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    ],
)
def test_what_peft_computes_otherwise_or_from_another_base_is_refused_by_name(
    flux: Source, tmp_path: Path, said: dict[str, object], words: str
):
    train_with_peft(PEFT["LoRA"], skeleton(state_of(flux, LINEAR), LINEAR), LINEAR, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
    assert words in refused(flux, tmp_path)


@pytest.mark.parametrize("said", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["to_k"]}])
def test_what_peft_trains_whole_beside_a_lora_is_refused_by_name(
    flux: Source, tmp_path: Path, said: dict[str, object]
):
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
    model = skeleton(state_of(flux, layers), layers)
    get_peft_model(model, LoraConfig(target_modules=["to_q"], **said)).save_pretrained(tmp_path)
    assert "modules_to_save" in refused(flux, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "trained alongside the LoRA" in refused(flux, tmp_path)


def test_every_kind_of_lora_that_peft_has_is_among_these():
    """A new option of peft's wants a decision: whether it changes what is computed."""
    seen = {
        *("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
        *("init_lora_weights", "init_weights", "bias", "modules_to_save", "use_qalora", "use_bdlora"),
        *("alora_invocation_tokens", "monteclora_config", "kasa_config", "arrow_config", "layer_replication"),
        *("target_parameters", "trainable_token_indices", "decompose_both", "decompose_factor"),
        # of the training alone, or of what the refused ones need; VeLoRA's forward is LoRA's
        *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config"),
        *(
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "ensure_weight_tying",
        ),
        *("megatron_config", "megatron_core", "inference_mode", "task_type", "peft_type", "revision"),
        *("base_model_name_or_path", "auto_mapping", "peft_version"),
        # of no linear or 1x1 layer: GPT-2's Conv1D, cores of larger kernels
        *("fan_in_fan_out", "use_effective_conv2d"),
    }
    for config in (LoraConfig, LoHaConfig, LoKrConfig):
        assert set(config.__dataclass_fields__) <= seen


def test_a_peft_folder_without_its_config_says_that_alpha_is_taken_as_the_rank(flux: Source, tmp_path: Path):
    adapter = train_with_peft(PEFT["LoRA"], skeleton(state_of(flux, LINEAR), LINEAR), LINEAR, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    # with the weight that the warning names, it is the adapter
    merged = require_same(flux, adapter, weight=ALPHA / RANK)
    assert ["alpha, so it is taken as the rank" in text for text in merged.warnings] == [True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_renamed_peft_file_beside_its_config_is_read_with_it_whatever_its_dtype(
    flux: Source, tmp_path: Path, dtype: torch.dtype
):
    adapter = train_with_peft(PEFT["LoRA"], skeleton(state_of(flux, LINEAR), LINEAR), LINEAR, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, tmp_path / "style.safetensors")
    # bfloat16 rounds the factors to 0.2 %
    renamed = TrainedAdapter(tmp_path / "style.safetensors", adapter.layers)
    assert require_same(flux, renamed, tolerance=5e-3).warnings == flux.warnings
