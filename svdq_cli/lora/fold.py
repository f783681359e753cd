"""`svdq lora`: LoRAs folded into a checkpoint. Nothing is quantized again, and what no LoRA touches is copied."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.adapters.denoiser import LoraFile, denoisers_left
from svdq_cli.checkpoint.check import (
    WEIGHT_ERROR,
    WEIGHT_ERROR_AT_MOST,
    noted_prefix,
    structure_problems,
)
from svdq_cli.checkpoint.reader import NEEDS_METADATA, PROVENANCE, Checkpoint, layer_of, open_checkpoint
from svdq_cli.checkpoint.writer import (
    WEIGHT_FILE,
    Target,
    copy_pipeline,
    output_file,
    report_path,
    write_report,
)
from svdq_cli.conversion.card import CARD_FILE, DerivedFacts, card_path, derived_card
from svdq_cli.errors import InputError
from svdq_cli.lora.check import require_folded
from svdq_cli.lora.edits import Edits, GivenLora, lora_facts, plan_edits, read_loras, table_of
from svdq_cli.lora.factor import APPROXIMATE_RANK
from svdq_cli.lora.join import JoinedBranches, join_loras
from svdq_cli.lora.means import with_means
from svdq_cli.lora.rewrite import header_of, new_target, write_changed
from svdq_cli.prepare.facts import other_components_bytes
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.origin import held_already
from svdq_cli.records import Event, Observer, W4A4Plan, ignore_events
from svdq_cli.reports import LoraFacts, LoraReport
from svdq_cli.storage.atomic import refuse_existing, require_disk, whole_output, write_text
from svdq_cli.storage.headers import header_metadata
from svdq_cli.storage.output_paths import distinct_names, name_warnings, require_places
from svdq_cli.system.machine import peak_memory


@dataclass(frozen=True, slots=True)
class FoldSettings:
    """`max_rank`: compress branches to it. `approximate_rank`: of changes without exact low-rank factors.
    `skip_w4a16`: leave W4A16 layers as they are, whatever a LoRA says of them."""

    max_rank: int | None = None
    approximate_rank: int = APPROXIMATE_RANK
    skip_w4a16: bool = False


DEFAULT_SETTINGS = FoldSettings()


def fold(
    path: Path,
    loras: Sequence[LoraFile],
    out: Path,
    *,
    settings: FoldSettings = DEFAULT_SETTINGS,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> LoraReport:
    """Fold LoRAs into a checkpoint of the same format, each into the denoiser that it is for where there are several.
    InputError or UsageError, before anything is written, where one does not fit or the format has no place for it."""
    started = time.monotonic()
    refuse_existing(out, overwrite=options.overwrite)
    checkpoint = open_sound(path)
    require_places(
        [out],
        folders=[not checkpoint.format.single_file],
        inputs=[path, *(lora.path for lora in loras)],
        overwrite=options.overwrite,
    )
    given = read_loras(checkpoint, loras)
    edits = plan_edits(checkpoint, given, w4a16="skip" if settings.skip_w4a16 else "dense")
    joined = join_loras(
        checkpoint,
        edits,
        max_rank=settings.max_rank,
        approximate_rank=settings.approximate_rank,
        one_rank=checkpoint.format.one_rank,
    )
    edits = with_means(checkpoint, edits, joined)
    target = new_target(checkpoint, edits, joined)
    others = 0 if target.format.single_file else other_components_bytes(checkpoint.source)
    require_disk({out: target.bytes(checkpoint.state) + others})
    facts = facts_of(given)
    observe(Event("start", "fold", 0, 1))
    with whole_output(out, overwrite=options.overwrite) as partial:
        weights = _write(partial, checkpoint, target, edits, joined, facts)
        require_folded(checkpoint, open_checkpoint(partial), edits, joined)
        written = output_file(target.format, out, weights)
        report = LoraReport(
            source_format=checkpoint.format.name,
            outputs=(written,),
            loras=facts,
            keys=table_of(checkpoint, given, edits, joined.cut),
            rank={"before": _rank(checkpoint.layers), "after": _rank(target.plan.layers)},
            bytes={"before": checkpoint.source.file_bytes, "after": written.bytes},
            layer_error=dict(sorted(joined.layer_error.items())),
            warnings=(*held_already(checkpoint, loras), *_warnings(given, edits, checkpoint, out)),
            seconds=time.monotonic() - started,
            peak=peak_memory(),
            next=_next(checkpoint, out),
        )
        card = derived_card(checkpoint, _derived(checkpoint, out, written.bytes, facts))
        if not target.format.single_file:
            _write_papers(partial, target, report, card)
    if target.format.single_file:
        _write_papers(out, target, report, card)
    observe(Event("end", "fold", 1, 1, seconds=report.seconds))
    return report


def _write_papers(path: Path, target: Target, report: LoraReport, card: str) -> None:
    """Report and model card: in a folder, or next to a file."""
    write_report(report_path(path, target.format), report)
    write_text(card_path(path) if target.format.single_file else path / CARD_FILE, card)


def _derived(checkpoint: Checkpoint, out: Path, size: int, loras: tuple[LoraFacts, ...]) -> DerivedFacts:
    """What the card says of the output, which is stored as the checkpoint is."""
    file = out.name if checkpoint.format.single_file else None
    whole = checkpoint.source.pipeline is not None
    return DerivedFacts(checkpoint.format.name, file, whole, size, loras)


def facts_of(given: Sequence[GivenLora]) -> tuple[LoraFacts, ...]:
    """What the report says of the LoRAs."""
    return tuple(lora_facts(lora.adapter.path, lora.weight, lora.adapter.component) for lora in given)


def _next(checkpoint: Checkpoint, out: Path) -> str:
    """The command that generates with the folded checkpoint."""
    base = [] if checkpoint.source.pipeline is not None else ["--base", "PIPELINE"]
    return shlex.join(["svdq", "generate", str(out), *base, "--prompt", "TEXT", "-o", "FILE"])


def open_sound(path: Path) -> Checkpoint:
    """A checkpoint with every tensor that it should have. InputError otherwise."""
    checkpoint = open_checkpoint(path, hint=NEEDS_METADATA)
    if problems := structure_problems(checkpoint):
        first = problems[0]
        raise InputError(
            f"{path}: {first.layer}: {first.what}",
            hint="svdq check lists what is wrong; convert the model again",
            where=first.layer,
        )
    return checkpoint


def _write(
    partial: Path,
    checkpoint: Checkpoint,
    target: Target,
    edits: Edits,
    joined: JoinedBranches,
    facts: tuple[LoraFacts, ...],
) -> list[Path]:
    """The new checkpoint at a partial path. Returns its weight files."""
    made = json.dumps(_provenance(checkpoint, edits, joined, facts), sort_keys=True)
    if target.format.single_file:
        metadata = header_of(checkpoint, target, edits, header_metadata(checkpoint.source.files[0]))
        component = checkpoint.source.component
        write_changed(partial, checkpoint, component, target, edits, joined, {**metadata, PROVENANCE: made})
        return [partial]
    partial.mkdir()
    pipeline, denoisers = checkpoint.source.pipeline, target.denoisers()
    if pipeline is not None:
        copy_pipeline(pipeline, partial, skip=denoisers)
    written: list[Path] = []
    for component, denoiser in denoisers.items():
        folder = partial if pipeline is None else partial / component
        folder.mkdir(exist_ok=True)
        alone = next(each for each in checkpoint.denoisers if each.source.component == component)
        config = {**alone.source.config, "quantization_config": denoiser.metadata()}
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        metadata = {**header_metadata(alone.source.files[0]), PROVENANCE: made}
        written.append(folder / WEIGHT_FILE)
        write_changed(written[-1], checkpoint, component, denoiser, edits, joined, metadata)
    return written


def _provenance(
    checkpoint: Checkpoint, edits: Edits, joined: JoinedBranches, facts: tuple[LoraFacts, ...]
) -> dict[str, object]:
    """The record of how the checkpoint was made, and the LoRAs that it has had folded in.

    The weight errors that the conversion noted stay for the layers that are what they were. Of a changed layer they are
    the most that is expected, for the same error is a smaller part of a larger weight, and nothing where its LoRA was
    cut or left out.
    """
    said = dict(checkpoint.provenance or {})
    earlier = said.get("folded_loras")
    changed = {*edits.branches, *map(layer_of, edits.weights)}
    cut = {name for _, name in joined.cut} if joined.max_rank is None else changed
    inexact = {*edits.skipped, *edits.dense, *cut}
    noted, at_most = _noted(said, WEIGHT_ERROR), _noted(said, WEIGHT_ERROR_AT_MOST)
    prefix = noted_prefix(checkpoint, noted)
    changed, inexact = ({prefix + name for name in names} for names in (changed, inexact))
    return {
        **said,
        WEIGHT_ERROR: {name: error for name, error in noted.items() if name not in changed | inexact},
        WEIGHT_ERROR_AT_MOST: {
            **{name: error for name, error in at_most.items() if name not in inexact},
            **{name: error for name, error in noted.items() if name in changed - inexact},
        },
        "folded_loras": [*(earlier if isinstance(earlier, list) else []), *without_folders(facts)],
    }


def _noted(provenance: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = provenance.get(key)
    return found if isinstance(found, Mapping) else {}


def without_folders(facts: Sequence[LoraFacts]) -> list[dict[str, object]]:
    """LoRAs as the header of a file names them: no path of this machine."""
    names = distinct_names([lora.path for lora in facts])
    return [
        {
            "name": name,
            "weight": lora.weight,
            "sha256": lora.sha256,
            **({"component": lora.component} if lora.component else {}),
        }
        for name, lora in zip(names, facts, strict=True)
    ]


def _rank(layers: Sequence[object]) -> int:
    return max((layer.rank for layer in layers if isinstance(layer, W4A4Plan)), default=0)


def _warnings(
    given: tuple[GivenLora, ...], edits: Edits, checkpoint: Checkpoint, out: Path
) -> tuple[str, ...]:
    found = [warning for lora in given for warning in lora.adapter.warnings]
    found += denoisers_left(checkpoint.source.components, [lora.adapter for lora in given])
    if edits.dense:
        # 16 bits instead of a code, and a scale and a zero for a group
        more = sum(
            layer.linear.in_features * layer.linear.out_features * (2 - 0.5 - 4 / layer.group)
            for layer in checkpoint.plan().w4a16
            if layer.name in edits.dense
        )
        found.append(
            f"{len(edits.dense)} W4A16 layers become 16-bit ones, which takes {more / 1e6:.1f} MB more; "
            "--skip-w4a16 leaves them unchanged"
        )
    if edits.skipped:
        found.append(f"{len(edits.skipped)} W4A16 layers were left unchanged, without their LoRA")
    return (*found, *name_warnings([out], folders=[not checkpoint.format.single_file]))
