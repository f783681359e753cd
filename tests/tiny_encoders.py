"""Tiny text encoders with random weights, of the real classes that pipelines have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as t
from torch import Tensor

from svdq_cli.pipelines.encoder_calls import EncoderCall

_WORDS = 120
_IMAGE, _START_OF_IMAGE = 130, 131  # token numbers
_LLM: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}


def _t5() -> Any:
    config = t.T5Config(
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        vocab_size=160,
        feed_forward_proj="gated-gelu",
    )
    return t.T5EncoderModel(config)


def _clip() -> Any:
    config = t.CLIPTextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=160,
        projection_dim=128,
    )
    return t.CLIPTextModelWithProjection(config)


def _qwen_vl() -> Any:
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
    }
    config = t.Qwen2_5_VLConfig(
        text_config={**_LLM, "rope_scaling": rope},
        vision_config=vision,
        image_token_id=_IMAGE,
        vision_start_token_id=_START_OF_IMAGE,
    )
    return t.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "deepstack_visual_indexes": [0],
    }
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    config = t.Qwen3VLConfig(
        text_config={**_LLM, "head_dim": 32, "rope_scaling": rope},
        vision_config=vision,
        image_token_id=_IMAGE,
        vision_start_token_id=_START_OF_IMAGE,
    )
    return t.Qwen3VLForConditionalGeneration(config)


def _umt5() -> Any:
    config = t.UMT5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=160)
    return t.UMT5EncoderModel(config)


def _gemma3() -> Any:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {**_LLM, "head_dim": 32, "sliding_window": 8}
    config = t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return t.Gemma3ForConditionalGeneration(config)


def _mistral() -> Any:
    vision = t.PixtralVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    config = t.Mistral3Config(text_config=t.MistralConfig(**_LLM, head_dim=32), vision_config=vision)
    return t.Mistral3ForConditionalGeneration(config)


ENCODERS: Mapping[str, Callable[[], Any]] = {
    "T5EncoderModel": _t5,
    "CLIPTextModelWithProjection": _clip,
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl,
    "Qwen3ForCausalLM": lambda: t.Qwen3ForCausalLM(
        t.Qwen3Config(**_LLM, head_dim=32, tie_word_embeddings=True)
    ),
    "Gemma2Model": lambda: t.Gemma2Model(t.Gemma2Config(**_LLM, head_dim=32)),
    "Qwen3VLForConditionalGeneration": _qwen3_vl,
    "UMT5EncoderModel": _umt5,
    "Gemma3ForConditionalGeneration": _gemma3,
    "LlamaForCausalLM": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_LLM)),
    "Mistral3ForConditionalGeneration": _mistral,
}


def tiny_encoder(name: str, folder: Path) -> Path:
    """Writes one, in bfloat16; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ENCODERS[name]()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def tokens(prompts: int, *, seed: int = 0) -> Tensor:
    """(prompts, 12) token numbers; the last few only fill the prompt up."""
    ids = torch.randint(3, _WORDS, (prompts, 12), generator=torch.Generator().manual_seed(seed))
    ids[:, 9:] = 0
    return ids


def tiny_call(prompts: int = 40, *, masked: bool = True) -> EncoderCall:
    """What a pipeline would give an encoder; not every pipeline gives its mask."""
    ids = tokens(prompts)
    return EncoderCall({"input_ids": ids, **({"attention_mask": (ids != 0).long()} if masked else {})})


def tiny_call_with_images(prompts: int = 40) -> EncoderCall:
    """What a pipeline that edits gives a Qwen-VL: in every prompt an image of 4 by 4 patches, or of 4 by 8, which are 4
    or 8 tokens."""
    seeded = torch.Generator().manual_seed(2)
    grids = torch.tensor([[1, 4, 4 * (1 + number % 2)] for number in range(prompts)])
    ids = tokens(prompts)
    places = torch.full((prompts, 8), _IMAGE)
    places[::2, 4:] = 0
    ids = torch.cat([torch.full((prompts, 1), _START_OF_IMAGE), places, ids], 1)
    patches = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 14 * 14, generator=seeded)
    given = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == _IMAGE).long(),
    }
    return EncoderCall({**given, "pixel_values": patches, "image_grid_thw": grids})
