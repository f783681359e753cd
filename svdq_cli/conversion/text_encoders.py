"""The text encoders that a recipe names under `components`, to 4 bits: each one file in the work folder, which every
output gets."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

from svdq_cli.checkpoint.nf4_layers import stored_config
from svdq_cli.checkpoint.text_encoders import EncoderPlan
from svdq_cli.conversion.encoder_weights import UNLIMITED, EncoderFigures, budget_of, write_encoder
from svdq_cli.conversion.memory import free_ram, free_vram
from svdq_cli.conversion.work_folder import ENCODERS, WorkFolder
from svdq_cli.pipelines.encoder_calls import EncoderCall, record_call
from svdq_cli.prepare.facts import encoder_facts
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared, prompts_of
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.records import Event, Observer
from svdq_cli.reports import HiddenSqnr, LayerSqnr, TextEncoderFacts
from svdq_cli.storage.json_files import read_json

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class FourBitEncoder:
    """A text encoder that was quantized: its plan, its file in the work folder, and what the report says of it."""

    plan: EncoderPlan
    file: Path
    facts: TextEncoderFacts

    def put_into(self, folder: Path) -> None:
        """Gives a copy of the component's folder, without weights, its 4-bit ones."""
        shutil.copyfile(self.file, folder / WEIGHTS)
        config = stored_config(read_json(self.plan.folder / "config.json"), self.plan.dtype, self.plan.kept)
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def quantize_encoders(
    prepared: Prepared,
    work: WorkFolder,
    *,
    sampling: Sampling | None,
    device: torch.device,
    options: RunOptions,
    observe: Observer,
) -> tuple[FourBitEncoder, ...]:
    """All text encoders of the recipe, rounded for its prompts as `sampling` encodes them; to nearest without.

    One that an earlier run had finished is taken over. What could not be calibrated is rounded to nearest, with a
    warning.
    """
    folder = work.encoders
    made: list[FourBitEncoder] = []
    for plan in prepared.encoders:
        folder.mkdir(exist_ok=True)
        file = folder / f"{plan.component}.safetensors"
        # written last: it is there when the weights are whole
        kept = f"{ENCODERS}/{plan.component}.json"
        if work.read_json(kept) is None:
            figures = _quantize(
                plan, file, prepared, sampling=sampling, device=device, options=options, observe=observe
            )
            work.keep_json(kept, asdict(figures))
        figures = EncoderFigures(**cast("dict[str, Any]", work.read_json(kept)))
        made.append(FourBitEncoder(plan, file, _facts(plan, figures)))
    return tuple(made)


def _quantize(
    plan: EncoderPlan,
    file: Path,
    prepared: Prepared,
    *,
    sampling: Sampling | None,
    device: torch.device,
    options: RunOptions,
    observe: Observer,
) -> EncoderFigures:
    call: EncoderCall | None = None
    budget = budget_of(plan, free_ram(options) if device.type == "cpu" else free_vram(device, options))
    if sampling is not None:
        why = "there is too little memory for a block and its inputs"
        if budget is not None:
            prompts = prompts_of(prepared, options, observe).texts
            found = record_call(prepared.source, plan.component, prompts, sampling.settings)
            call, why = (found, "") if isinstance(found, EncoderCall) else (None, found)
        if call is None:
            detail = f"{plan.component} is rounded to nearest, without calibration: {why}"
            observe(Event("warning", "encoder", detail=detail))
    return write_encoder(file, plan, call, device=device, budget=budget or UNLIMITED, observe=observe)


def _facts(plan: EncoderPlan, figures: EncoderFigures) -> TextEncoderFacts:
    layers, hidden = figures.layers, figures.hidden
    sqnr = LayerSqnr(fmean(layers.values()), min(layers.values()), layers)
    states = HiddenSqnr(fmean(hidden), hidden[-1]) if hidden else None
    return encoder_facts(plan, calibrated=figures.calibrated, layer_sqnr_db=sqnr, hidden_sqnr_db=states)
