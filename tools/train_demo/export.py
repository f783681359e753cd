"""Write the trained parts as a plain diffusers FLUX.1 folder that FluxPipeline.from_pretrained reads."""

# diffusers' and torch's modules are untyped where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from tools.train_demo.denoiser import Denoiser


def assemble(model: Denoiser, vae: AutoencoderKL) -> FluxPipeline:
    """The pipeline in memory. Time runs evenly from 1 to 0 (shift 1), as in training."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.tokenizer_2,
        transformer=model.transformer,
    )


def export_pipeline(model: Denoiser, vae: AutoencoderKL, folder: Path) -> None:
    """Write bfloat16 weights and configurations to `folder`. Converts `model` and `vae` in place."""
    pipeline = assemble(model, vae.to(memory_format=torch.contiguous_format)).to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    for part in ("text_encoder", "text_encoder_2"):
        _load_as_float32(folder / part / "config.json")
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]  # the name that transformers 4 and 5 both know
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_bpe_files(model, folder / "tokenizer")
    for tokenizer in ("tokenizer", "tokenizer_2"):
        path = folder / tokenizer / "tokenizer.json"
        compact = json.dumps(json.loads(path.read_text(encoding="utf-8")), separators=(",", ":"))
        path.write_text(compact, encoding="utf-8")


def _load_as_float32(config_file: Path) -> None:
    """transformers 5 loads in the dtype the config names, diffusers in float32: name float32 so that they agree."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_bpe_files(model: Denoiser, folder: Path) -> None:
    """vocab.json and merges.txt, which CLIPTokenizer of transformers 4 reads in place of tokenizer.json."""
    bpe = json.loads(model.tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"], separators=(",", ":")), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
