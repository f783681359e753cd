"""How an output was made, as its header says it, and all else that the outputs hold besides the solved layers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence

from svdq_cli import __version__
from svdq_cli.checkpoint.check import WEIGHT_ERROR
from svdq_cli.checkpoint.reader import MOVED_MEANS
from svdq_cli.checkpoint.writer import Contents
from svdq_cli.conversion.read_weights import finite_tensor
from svdq_cli.prepare.locate import portable_name
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.sources import lora_files
from svdq_cli.recipe import embedded
from svdq_cli.records import LayerSolution
from svdq_cli.source import file_sha256, needed_settings
from svdq_cli.source.means import moved_json
from svdq_cli.storage.output_paths import distinct_names

REPORTED = ("svdq_version", "versions", "source_sha256", "calibration_sha256", "loras_sha256")
FITTED = "fitted"  # key of the provenance
_DIGITS = 5  # of a weight's error
UNKNOWN_DIGEST = 64 * "0"
_UNKNOWN = 1000 + 10**-_DIGITS  # in place of an error that is not known yet: none has more digits


def contents_of(
    prepared: Prepared,
    options: RunOptions,
    *,
    digest: str,
    calibration: str | None,
    solutions: Mapping[str, LayerSolution],
    weight_errors: Mapping[str, float] | None,
    fitted: Sequence[str] = (),
) -> Contents:
    """The numbers of the outputs, and how they were made. `digest`: of the source's weights; `calibration`: of the
    statistics; `weight_errors`: by layer, None where they are to come, for which room is left; `fitted`: the linears at
    16 bits whose numbers are not the source's."""
    source, recipe = prepared.source, prepared.recipe
    names = distinct_names([lora.path for lora in recipe.model.loras])
    provenance: dict[str, object] = {
        "svdq_version": __version__,
        "recipe": embedded(recipe, source=portable_name(recipe.model.source, digest, beside=options.beside)),
        "source_sha256": digest,
        "calibration_sha256": calibration,
    }
    if weight_errors is None:
        weight_errors = {layer.name: _UNKNOWN for layer in prepared.plan.layers}
    return Contents(
        configs=source.configs,
        state=prepared.inventory.state,
        solutions=solutions,
        kept=lambda name: finite_tensor(source, name),
        scheduler=needed_settings(source),
        provenance={
            **provenance,
            "fingerprint": hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest(),
            "versions": _versions(),
            "loras_sha256": {
                name: file_sha256(lora.path)
                for name, lora in zip(names, lora_files(recipe, options), strict=True)
                if lora.path.is_file()  # a folder of peft's is in the digest of the source
            },
            **({MOVED_MEANS: moved_json(source.moved)} if source.moved else {}),
            **({FITTED: list(fitted)} if fitted else {}),
            WEIGHT_ERROR: {name: round(error, _DIGITS) for name, error in weight_errors.items()},
        },
    )


def contents_before(
    prepared: Prepared,
    options: RunOptions,
    *,
    digest: str = UNKNOWN_DIGEST,
    calibration: str = UNKNOWN_DIGEST,
) -> Contents:
    """`contents_of` before a layer is solved, by which sizes are known: as many bytes as there will be."""
    return contents_of(
        prepared, options, digest=digest, calibration=calibration, solutions={}, weight_errors=None
    )


def _versions() -> dict[str, str]:
    """What the numbers depend on besides svdq; outside of the fingerprint, which names the intent."""
    return {
        name: importlib.metadata.version(name)
        for name in ("torch", "diffusers", "transformers", "safetensors")
    }
