"""diffusers' own methods on a loaded 4-bit pipeline: they do what they say, or an error names the way that does."""

from __future__ import annotations

import copy
import filecmp
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import svdq_cli
from svdq_cli.checkpoint.nf4_layers import stored_config
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.checkpoint.text_encoders import plan_encoder
from svdq_cli.conversion.encoder_weights import write_encoder
from svdq_cli.errors import InputError, SvdqError, UsageError
from svdq_cli.inference.backend import Backend
from svdq_cli.storage.json_files import read_json
from tests.adapters.test_loras import peft
from tests.lora.layers import QKV, small_lora
from tests.lora.test_fold import saved

FILES = ("config.json", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def checkpoint(converted_flux: Callable[[str], Path]) -> Path:
    return converted_flux("int4") / "lite"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = dict.fromkeys(QKV, (128, 128)) | {"x_embedder": (128, 16)}
    return saved(tmp_path_factory.mktemp("lora") / "style.safetensors", peft(small_lora(layers)))


def load(path: Path, **options: Any) -> Any:
    return svdq_cli.load_pipeline(path, device="cpu", **options)


def image(pipe: Any, **options: Any) -> torch.Tensor:
    """One small image as numbers."""
    found = pipe(
        "a", num_inference_steps=1, height=32, width=32, generator=torch.Generator().manual_seed(0),
        guidance_scale=1.0, max_sequence_length=16, output_type="pt", **options,
    )  # fmt: skip
    return found.images


def same_component(a: Path, b: Path, weights: str = FILES[1]) -> bool:
    names = ["config.json", weights]
    equal = [filecmp.cmp(a / name, b / name, shallow=False) for name in names]
    return sorted(file.name for file in b.iterdir()) == names and all(equal)


# ------------------------------------------------------------------------------------------------- save_pretrained


@pytest.mark.parametrize("backend", ["reference", "kernels' references"])
@pytest.mark.parametrize(
    "change",
    [lambda pipe: pipe, lambda pipe: pipe.to(torch.float16), lambda pipe: pipe.to("cpu")],
    ids=["as loaded", "after to(dtype)", "after to(device)"],
)
def test_a_saved_pipeline_is_the_checkpoint_byte_for_byte(
    checkpoint: Path, tmp_path: Path, change: Callable[[Any], Any], backend: str, monkeypatch: Any
):
    if backend != "reference":
        references = Backend("kernels", "a test")
        monkeypatch.setattr("svdq_cli.inference.load.choose_backend", lambda *_: references)
    change(load(checkpoint)).save_pretrained(tmp_path / "saved")
    assert same_component(checkpoint / "transformer", tmp_path / "saved" / "transformer")
    assert (tmp_path / "saved" / "svdq_report.json").is_file()
    assert open_checkpoint(tmp_path / "saved").provenance == open_checkpoint(checkpoint).provenance


def test_a_saved_pipeline_generates_the_same_image(checkpoint: Path, tmp_path: Path):
    pipe = load(checkpoint)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(image(load(tmp_path)), image(pipe))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_into_its_own_folder_leaves_the_checkpoint_as_it_is(
    checkpoint: Path, tmp_path: Path, dtype: torch.dtype
):
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    load(own, dtype=dtype).save_pretrained(own)
    assert same_component(checkpoint / "transformer", own / "transformer")
    load(own)


def test_the_transformer_alone_is_saved_over_what_another_model_left(checkpoint: Path, tmp_path: Path):
    for stale in (
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ):
        (tmp_path / stale).write_bytes(b"another model's")
    load(checkpoint).transformer.save_pretrained(tmp_path)
    assert same_component(checkpoint / "transformer", tmp_path)


def test_an_image_to_image_sibling_saves_the_checkpoint(checkpoint: Path, tmp_path: Path):
    sibling = diffusers.AutoPipelineForImage2Image.from_pipe(load(checkpoint))
    assert type(sibling) is diffusers.FluxImg2ImgPipeline
    sibling.save_pretrained(tmp_path)
    assert same_component(checkpoint / "transformer", tmp_path / "transformer")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_saves_itself(checkpoint: Path, tmp_path: Path, copied: Callable[[Any], Any]):
    again = copied(load(checkpoint).transformer)
    again.save_pretrained(tmp_path)
    assert same_component(checkpoint / "transformer", tmp_path)
    again.proj_out.weight.data[0] += 1
    with pytest.raises(UsageError, match=r"proj_out\.weight was changed since"):
        again.save_pretrained(tmp_path)


def with_lora(lora: Path, pipe: Any) -> Any:
    pipe.load_lora_weights(lora, adapter_name="style")
    return pipe


def with_other_weights(_: Path, pipe: Any) -> Any:
    pipe.transformer.proj_out.bias.data[0] += 1
    return pipe


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (with_lora, {}, r"LoRAs are active on this model \(style at 1\)"),
        (with_other_weights, {}, r"proj_out\.bias was changed since"),
        (lambda _, pipe: pipe, {"safe_serialization": False}, "safetensors, without variants"),
        (lambda _, pipe: pipe, {"variant": "fp16"}, "safetensors, without variants"),
    ],
    ids=["LoRA", "changed weight", "pickle", "variant"],
)
def test_what_cannot_be_saved_is_refused_before_a_file_is_touched(
    checkpoint: Path, lora: Path, tmp_path: Path, change: Any, options: dict[str, Any], said: str
):
    pipe = change(lora, load(checkpoint))
    for saving in (pipe.save_pretrained, pipe.transformer.save_pretrained):
        with pytest.raises(UsageError, match=said):
            saving(tmp_path / "saved", **options)
        assert not (tmp_path / "saved").exists()


def test_a_pipeline_of_a_single_file_names_the_command_that_makes_a_folder(
    converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path
):
    pipe = load(converted_flux("int4") / "nunchaku.safetensors", base=tiny_flux)
    with pytest.raises(UsageError, match="a single file of format nunchaku") as refused:
        pipe.save_pretrained(tmp_path / "saved")
    assert "--to nunchaku-lite" in str(refused.value.hint)
    assert not (tmp_path / "saved").exists()


def test_a_checkpoint_that_was_replaced_meanwhile_is_not_taken_for_the_loaded_one(
    checkpoint: Path, tmp_path: Path
):
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    pipe = load(own)
    weights = own / "transformer" / FILES[1]
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="changed since the model was loaded"):
        pipe.save_pretrained(tmp_path / "saved")


def test_a_quantized_text_encoder_is_saved_as_it_is_stored(checkpoint: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    encoder = own / "text_encoder_2"
    plan = plan_encoder(encoder, "text_encoder_2", dtype=torch.bfloat16)
    write_encoder(tmp_path / "packed", plan, None, device=torch.device("cpu"))
    config = stored_config(read_json(encoder / "config.json"), plan.dtype, plan.kept)
    for file in encoder.iterdir():
        file.unlink()
    shutil.copyfile(tmp_path / "packed", encoder / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps(config))
    pipe = load(own)
    pipe.save_pretrained(tmp_path / "saved")
    assert same_component(own / "text_encoder_2", tmp_path / "saved" / "text_encoder_2", "model.safetensors")
    assert torch.equal(image(load(tmp_path / "saved")), image(pipe))


def test_push_to_hub_refuses_before_a_repository_is_made(checkpoint: Path, lora: Path):
    pipe = with_lora(lora, load(checkpoint))
    for owner in (pipe, pipe.transformer):
        with pytest.raises(UsageError, match="LoRAs are active on this model"):
            owner.push_to_hub("owner/name")


# ------------------------------------------------------------------------------------------------- LoRAs


def test_load_lora_weights_is_svdqs_own_way(checkpoint: Path, lora: Path):
    by_diffusers, own = load(checkpoint), load(checkpoint)
    plain = image(own)
    by_diffusers.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="style")
    svdq_cli.load_lora(own, lora, "style")
    svdq_cli.set_adapters(own, {"style": 1.0})
    assert torch.equal(image(by_diffusers), image(own))
    assert not torch.equal(image(own), plain)
    by_diffusers.set_adapters(["style"], [0.5])
    svdq_cli.set_adapters(own, {"style": 0.5})
    assert torch.equal(image(by_diffusers), image(own))
    by_diffusers.disable_lora()
    assert torch.equal(image(by_diffusers), plain)
    by_diffusers.enable_lora()
    assert torch.equal(image(by_diffusers), image(own))
    by_diffusers.unload_lora_weights()
    assert torch.equal(image(by_diffusers), plain)
    assert by_diffusers.get_list_adapters() == {}


def names_after(pipe: Any, lora: Path) -> list[object]:
    """What diffusers tells of three LoRAs, loaded one after another."""
    said: list[object] = []
    for name in ("a", "b", None):
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name=name)
        said += [pipe.get_active_adapters(), pipe.get_list_adapters()]
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    return [*said, pipe.get_active_adapters()]


def test_loras_are_named_and_switched_on_as_diffusers_does(checkpoint: Path, tiny_flux: Path, lora: Path):
    expected = names_after(diffusers.FluxPipeline.from_pretrained(tiny_flux), lora)
    found = names_after(load(checkpoint), lora)
    # diffusers counts the LoRAs that have names, too
    as_text = str(expected).replace("default_2", "default_0")
    assert str(found) == as_text


def test_a_sibling_switches_the_loras_of_the_model(checkpoint: Path, lora: Path):
    pipe = with_lora(lora, load(checkpoint))
    sibling = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    assert sibling.get_list_adapters() == {"transformer": ["style"]}
    sibling.set_adapters("style", 0.25)
    assert pipe.transformer.svdq_loras.strengths == {"style": 0.25}
    sibling.unload_lora_weights()
    assert pipe.get_list_adapters() == {}


def test_a_sibling_that_loads_a_lora_is_told_the_way(checkpoint: Path, lora: Path):
    sibling = diffusers.FluxImg2ImgPipeline.from_pipe(load(checkpoint))
    with pytest.raises(UsageError) as refused:
        sibling.load_lora_weights(str(lora))
    assert "svdq_cli.load_lora(pipe, FILE, NAME)" in str(refused.value.hint)
    svdq_cli.load_lora(sibling, lora, "style")


def test_a_scale_at_the_call_is_not_passed_over(checkpoint: Path, lora: Path):
    pipe = with_lora(lora, load(checkpoint))
    with pytest.raises(UsageError, match="does not reach the LoRAs"):
        image(pipe, joint_attention_kwargs={"scale": 0.5})
    image(pipe, joint_attention_kwargs={"scale": 1.0})


def test_a_lora_is_loaded_after_compiling(checkpoint: Path, lora: Path):
    pipe = load(checkpoint)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.load_lora_weights(lora, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    assert torch.equal(image(pipe), image(with_lora(lora, load(checkpoint))))


def test_a_lora_for_weights_that_are_offloaded_is_refused_and_changes_nothing(checkpoint: Path, lora: Path):
    from accelerate import cpu_offload

    pipe = load(checkpoint)
    plain = image(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert torch.equal(image(pipe), plain)
    with pytest.raises(UsageError, match=r"x_embedder\.weight: its weights were moved away"):
        pipe.load_lora_weights(lora, adapter_name="style")
    assert torch.equal(image(pipe), plain)


def test_text_encoder_tensors_that_a_lora_has_are_said(checkpoint: Path, tmp_path: Path):
    layers = peft(small_lora({QKV[0]: (128, 128)}))
    extra = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 128)}
    with pytest.warns(UserWarning, match="left out 1 tensor for the text encoders"):
        svdq_cli.load_lora(
            load(checkpoint), saved(tmp_path / "both.safetensors", {**layers, **extra}), "both"
        )


# ------------------------------------------------------------------------------------------------- the rest


REFUSED = {
    "fuse_qkv_projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "fuse_projections": lambda pipe: pipe.transformer.transformer_blocks[0].attn.fuse_projections(),
    "dequantize": lambda pipe: pipe.transformer.dequantize(),
    "fuse_lora": lambda pipe: pipe.fuse_lora(),
    "fuse_lora of the model": lambda pipe: pipe.transformer.fuse_lora(0.5),
    "add_adapter": lambda pipe: pipe.transformer.add_adapter(None),
    "hotswap": lambda pipe: pipe.load_lora_weights("x", hotswap=True),
    "enable_lora_hotswap": lambda pipe: pipe.enable_lora_hotswap(target_rank=8),
    "tensors": lambda pipe: pipe.load_lora_weights({"transformer.x.lora_A.weight": torch.ones(1)}),
    "no such LoRA": lambda pipe: pipe.load_lora_weights("nowhere/at-all"),
    "strength by block": lambda pipe: pipe.set_adapters("a", {"transformer": {"block": 1}}),
    "a 16-bit weight": lambda pipe: pipe.transformer.state_dict()["transformer_blocks.0.attn.to_q.weight"],
}


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint)


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_4_bit_layers_cannot_do_is_an_error_in_words(loaded: Any, call: Callable[[Any], object]):
    with pytest.raises(SvdqError) as refused:
        call(loaded)
    assert refused.value.hint


WORKING = {
    "enable_model_cpu_offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "enable_group_offload": lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
    "to": lambda pipe: pipe.to("cpu"),
    "deepcopy": lambda pipe: setattr(pipe, "transformer", copy.deepcopy(pipe.transformer)),
    "load_state_dict": lambda pipe: pipe.transformer.load_state_dict(pipe.transformer.state_dict()),
    "set_attention_backend": lambda pipe: pipe.transformer.set_attention_backend("native"),
    "torch.compile": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")),
    "train and eval": lambda pipe: pipe.transformer.train().eval(),
}  # fmt: skip


@pytest.mark.parametrize("call", WORKING.values(), ids=WORKING.keys())
def test_what_moves_or_compiles_a_model_changes_no_number(
    checkpoint: Path, loaded: Any, call: Callable[[Any], object]
):
    pipe = load(checkpoint)
    call(pipe)
    assert torch.equal(image(pipe), image(loaded))


def test_float_changes_no_number_of_a_float32_model(checkpoint: Path):
    pipe = load(checkpoint, dtype=torch.float32)
    before = image(pipe)
    pipe.transformer.float()
    assert torch.equal(image(pipe), before)


def test_a_pipeline_of_its_components_generates_the_same(loaded: Any):
    assert torch.equal(image(diffusers.FluxPipeline(**loaded.components)), image(loaded))
    assert torch.equal(image(diffusers.FluxPipeline.from_pipe(loaded)), image(loaded))


def test_parameters_are_counted_as_those_of_the_16_bit_model(loaded: Any, tiny_flux: Path):
    model: Any = diffusers.FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer")
    assert loaded.transformer.num_parameters() == model.num_parameters()
    assert loaded.transformer.num_parameters(exclude_embeddings=True) == model.num_parameters(
        exclude_embeddings=True
    )
    assert loaded.transformer.num_parameters(only_trainable=True) == 0
