"""What a pipeline takes on a GPU with its denoiser in 4 bits, with 16-bit and with 4-bit text encoders, from configs.

`python -m tools.encoder_table` rewrites the table of docs/large-models.md; a test compares its lines. Nothing is run or
downloaded: every model is built from its published sizes without memory, planned as a conversion plans it, and counted.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from svdq_cli.checkpoint.text_encoders import EncoderPlan, empty_encoder, plan_encoder
from svdq_cli.checkpoint.writer import target_of
from svdq_cli.families import find_family
from svdq_cli.formats import format_named
from svdq_cli.planning.plan import plan_model, take_inventory
from svdq_cli.records import Int4
from svdq_cli.source import open_source
from svdq_cli.source.tensors import StoredTensor
from svdq_cli.text import table
from tools.layer_table import CONFIGS

PAGE = Path(__file__).parents[1] / "docs" / "large-models.md"
_BLOCK = re.compile(r"(<!-- text encoders -->\n).*?(<!-- end of text encoders -->)", re.DOTALL)
CARD = 16 * 2**30
# Of a card, what weights leave for activations, the autoencoder and CUDA itself, for an image of 1024 x 1024.
SPARED = 2 * 2**30


def _llm(
    width: int, inner: int, layers: int, heads: int, kv: int, words: int, **more: object
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": words,
        **more,
    }


def _clip(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "projection_dim": width}


_T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# class and the sizes in the published config
ENCODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "CLIP-L": ("CLIPTextModel", _clip(768, 3072, 12, 12)),
    "CLIP-G": ("CLIPTextModelWithProjection", _clip(1280, 5120, 32, 20)),
    "T5-XXL": ("T5EncoderModel", {**_T5, "vocab_size": 32128}),
    "Gemma-2-2B": ("Gemma2Model", _llm(2304, 9216, 26, 8, 4, 256000, head_dim=256)),
    "Qwen3-4B": (
        "Qwen3ForCausalLM",
        _llm(2560, 9728, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=True),
    ),
    "Qwen3-8B": (
        "Qwen3ForCausalLM",
        _llm(4096, 12288, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=False),
    ),
    "Llama-3.1-8B": ("LlamaForCausalLM", _llm(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False)),
    "Qwen2.5-VL-7B": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _llm(
                3584,
                18944,
                28,
                28,
                4,
                152064,
                rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
            ),
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
            },
            "tie_word_embeddings": False,
        },
    ),
    "Mistral-Small-3.2-24B": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **_llm(5120, 32768, 40, 32, 8, 131072, head_dim=128)},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "head_dim": 64,
                "image_size": 1540,
                "patch_size": 14,
            },
            "tie_word_embeddings": False,
        },
    ),
}
_KLEIN = {"_class_name": "Flux2Transformer2DModel", "guidance_embeds": False}
# the published config's file, or what it says beside the class's defaults
PIPELINES: Mapping[str, tuple[str | dict[str, Any], tuple[str, ...]]] = {
    "SDXL": ("sdxl-base-unet", ("CLIP-L", "CLIP-G")),
    "SD 3.5 large": ("sd35-large", ("CLIP-L", "CLIP-G", "T5-XXL")),
    "PixArt-Sigma": ("pixart-sigma-xl2-1024", ("T5-XXL",)),
    "SANA 0.6B": ("sana-600m-1024", ("Gemma-2-2B",)),
    "Lumina-Image 2.0": (
        {"_class_name": "Lumina2Transformer2DModel", "cap_feat_dim": 2304},
        ("Gemma-2-2B",),
    ),
    "FLUX.1": ("flux1-dev", ("CLIP-L", "T5-XXL")),
    "FLUX.2 klein 4B": (
        {
            **_KLEIN,
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
        ("Qwen3-4B",),
    ),
    "FLUX.2 klein 9B": (
        {
            **_KLEIN,
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
        ("Qwen3-8B",),
    ),
    "FLUX.2 dev": ("flux2-dev", ("Mistral-Small-3.2-24B",)),
    "Z-Image": ("z-image-turbo", ("Qwen3-4B",)),
    "Qwen-Image": ("qwen-image", ("Qwen2.5-VL-7B",)),
    "HiDream-I1": (
        {
            "_class_name": "HiDreamImageTransformer2DModel",
            "in_channels": 16,
            "patch_size": 2,
            "num_layers": 16,
            "num_single_layers": 32,
            "num_attention_heads": 20,
            "attention_head_dim": 128,
            "caption_channels": [4096, 4096],
            "text_emb_dim": 2048,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": [64, 32, 32],
            "max_resolution": [128, 128],
            "llama_layers": [*range(32), *[31] * 16],
        },
        ("CLIP-L", "CLIP-G", "T5-XXL", "Llama-3.1-8B"),
    ),
}


@dataclass(frozen=True, slots=True)
class PipelineSizes:
    """Bytes of weights: the 4-bit denoiser's, and every encoder's at 16 bits and with 4-bit layers."""

    denoiser: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    def fit(self, encoders: tuple[int, ...]) -> str:
        """Whether weights leave SPARED of a 16 GB card: all at once, or one component at a time."""
        if self.denoiser + sum(encoders) + SPARED <= CARD:
            return "all at once"
        return "one at a time" if max(self.denoiser, *encoders) + SPARED <= CARD else "no"


@cache
def encoder_plan(name: str) -> EncoderPlan:
    """The plan of one of ENCODERS, in bfloat16."""
    class_name, sizes = ENCODERS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        said = {"architectures": [class_name], **sizes}
        (folder / "config.json").write_text(json.dumps(said))
        model: Any = empty_encoder(folder, class_name)
        model.tie_weights()  # what is tied is stored once
        tensors = {
            own: StoredTensor(folder, own, tuple(parameter.shape), "BF16", 0)
            for own, parameter in model.named_parameters()
        }
        plan = plan_encoder(folder, name, dtype=torch.bfloat16, tensors=tensors)
        plan.specs  # noqa: B018  counted while the folder is there
        return plan


def denoiser_bytes(config: str | dict[str, Any]) -> int:
    """The denoiser's weights as nunchaku-lite stores them in int4 at rank 32."""
    with tempfile.TemporaryDirectory() as scratch:
        file = CONFIGS / f"{config}.json" if isinstance(config, str) else Path(scratch) / "config.json"
        if not isinstance(config, str):
            file.write_text(json.dumps(config))
        source, lite = open_source(file), format_named("nunchaku-lite")
        plan = plan_model(source, precision=Int4(), rank=32, supports=lite.unsupported_reason)
        state = take_inventory(source, find_family(source.config)).state
        return target_of(lite, plan, state, torch.bfloat16).bytes(state)


def sizes_of(pipeline: str) -> PipelineSizes:
    """Of one of PIPELINES."""
    config, encoders = PIPELINES[pipeline]
    plans = [encoder_plan(name) for name in encoders]
    return PipelineSizes(
        denoiser_bytes(config),
        tuple(plan.bytes_before for plan in plans),
        tuple(plan.bytes_after for plan in plans),
    )


def line(pipeline: str) -> tuple[str, ...]:
    """The table's cells for a pipeline."""
    sizes = sizes_of(pipeline)
    figures = (sizes.denoiser, sum(sizes.before), sum(sizes.after), sizes.denoiser + sum(sizes.after))
    return (
        pipeline,
        " + ".join(PIPELINES[pipeline][1]),
        *(f"{size / 1e9:.2f}" for size in figures),
        sizes.fit(sizes.before),
        sizes.fit(sizes.after),
    )


def markdown() -> Iterator[str]:
    heads = (
        "pipeline",
        "text encoders",
        "denoiser, 4 bits",
        "encoders, 16 bits",
        "encoders, 4 bits",
        "both in 4 bits",
        "in 16 GB, encoders at 16 bits",
        "in 16 GB, at 4 bits",
    )
    yield from table(heads, [line(pipeline) for pipeline in PIPELINES])


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    body = "\n".join(markdown()) + "\n"
    PAGE.write_text(_BLOCK.sub(lambda found: f"{found[1]}{body}{found[2]}", page), encoding="utf-8")
    print(body)


if __name__ == "__main__":
    main()
