"""Calibration: prompts through the pipeline, statistics of every shared input, kept in a folder.

The door of this room. diffusers and datasets are imported where they are used, so that opening an artefact stays light.
"""

from svdq_cli.calibration.artefact import (
    Calibration,
    CalibrationFacts,
    CalibrationManifest,
    open_calibration,
    save_calibration,
)
from svdq_cli.calibration.collect import collect_stats
from svdq_cli.calibration.prompts import choose_prompts, dataset_prompts, prompts_digest, read_prompts
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.pipelines.settings import SamplingSettings

__all__ = [
    "Calibration",
    "CalibrationFacts",
    "CalibrationManifest",
    "SamplingSettings",
    "choose_prompts",
    "collect_stats",
    "dataset_prompts",
    "generate_images",
    "load_source_pipeline",
    "open_calibration",
    "prompts_digest",
    "read_prompts",
    "save_calibration",
]
