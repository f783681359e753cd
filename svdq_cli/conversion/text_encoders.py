"""The text encoders that a recipe names under `components`, to 4 bits: each one file in the work folder, which every
output gets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

from svdq_cli.checkpoint.nf4_layers import stored_config
from svdq_cli.checkpoint.text_encoders import EncoderPlan
from svdq_cli.conversion.encoder_weights import EncoderFigures, budget_of, write_encoder
from svdq_cli.conversion.memory import free_ram, free_vram
from svdq_cli.conversion.needs import Needs
from svdq_cli.conversion.work_folder import ENCODERS, WorkFolder
from svdq_cli.errors import SvdqError, first_line
from svdq_cli.pipelines.encoder_calls import record_call
from svdq_cli.prepare.facts import encoder_facts
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared, prompts_of
from svdq_cli.records import Observer
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
    needs: Needs,
    device: torch.device,
    options: RunOptions,
    observe: Observer,
    warn: Callable[[tuple[str, ...]], None],
) -> tuple[FourBitEncoder, ...]:
    """All text encoders of the recipe, rounded for the prompts that it needs; to nearest without.

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
                plan,
                file,
                prepared,
                needs=needs,
                device=device,
                options=options,
                observe=observe,
                warn=warn,
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
    needs: Needs,
    device: torch.device,
    options: RunOptions,
    observe: Observer,
    warn: Callable[[tuple[str, ...]], None],
) -> EncoderFigures:
    def nearest(why: str) -> EncoderFigures:
        warn((f"{plan.component} is rounded to nearest, without calibration: {why}",))
        return write_encoder(file, plan, None, device=device, observe=observe)

    if needs.data_free:
        return write_encoder(file, plan, None, device=device, observe=observe)
    if needs.encoders is None:
        return nearest("there are no prompts; name them with --prompts or in the recipe")
    budget = budget_of(plan, free_ram(options) if device.type == "cpu" else free_vram(device, options))
    if budget is None:
        return nearest("there is too little memory for a block and its inputs")
    prompts = prompts_of(prepared, options, observe).texts
    call = record_call(prepared.source, plan.component, prompts, needs.encoders.settings)
    if isinstance(call, str):
        return nearest(call)
    try:
        return write_encoder(file, plan, call, device=device, budget=budget, observe=observe)
    except SvdqError:
        raise
    except Exception as error:  # a model of any class, run in a way that its authors did not foresee
        why = f"it could not be run block by block ({type(error).__name__}: {first_line(error)})"
    return nearest(why)


def _facts(plan: EncoderPlan, figures: EncoderFigures) -> TextEncoderFacts:
    layers, hidden = figures.layers, figures.hidden
    sqnr = LayerSqnr(fmean(layers.values()), min(layers.values()), layers)
    states = HiddenSqnr(fmean(hidden), hidden[-1]) if hidden else None
    return encoder_facts(plan, calibrated=figures.calibrated, layer_sqnr_db=sqnr, hidden_sqnr_db=states)
