"""A LoRA file for Nunchaku's FLUX.1 engine, instead of a folded checkpoint.

It holds the joined branch of *every* W4A4 module, the base's ranks included, so it belongs to the one base file that it
was made for. Modulations (W4A16) have a branch of their own in it: in natural order, but for the rows of `lora_up`,
which are interleaved as those of the weight. Layers outside of the blocks keep their matrices under diffusers' names,
and the engine's Python side merges them.

Source: nunchaku/lora/flux/nunchaku_converter.py and models/transformers/transformer_flux.py of nunchaku.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.checkpoint.branches import join_branches, stored_rows
from svdq_cli.checkpoint.file_layout import StoredModule
from svdq_cli.checkpoint.lossless import same_bits, take_rows
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.checkpoint.writer import report_path, write_report, written_file
from svdq_cli.errors import CheckFailedError, UsageError
from svdq_cli.formats.contract import Branch
from svdq_cli.formats.nunchaku import FORMAT
from svdq_cli.lora.branch_ops import additions, extended, padded, whole_tiles
from svdq_cli.lora.edits import Contribution, Edits, plan_edits, read_loras, table_of
from svdq_cli.lora.factor import factored
from svdq_cli.lora.fold import DEFAULT_SETTINGS, FoldSettings, facts_of, open_sound, without_folders
from svdq_cli.lora.join import join_loras
from svdq_cli.lora.means import require_no_means
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.records import W4A4Plan, W4A16Plan
from svdq_cli.reports import LoraReport
from svdq_cli.solve.rebuild import rebuilt_weight
from svdq_cli.source import file_sha256
from svdq_cli.storage.atomic import refuse_existing, whole_output
from svdq_cli.storage.output_paths import require_places
from svdq_cli.storage.tensor_file import save_tensors
from svdq_cli.system.machine import peak_memory

ENGINE_RANK = 32  # ranks that the engine takes for the base's when it scales the others by a strength
_OF_MLP = re.compile(r"_fc[12]$")  # the engine sizes the buffer of fc2 by the rank of fc1


def write_nunchaku_lora(
    path: Path,
    loras: Sequence[LoraFile],
    out: Path,
    *,
    settings: FoldSettings = DEFAULT_SETTINGS,
    options: RunOptions = DEFAULT_OPTIONS,
) -> LoraReport:
    """Write LoRAs as one file for the engine, to be used with `path`, a `nunchaku` checkpoint of FLUX.1.

    Raises as `fold` does, and UsageError for another checkpoint.
    """
    started = time.monotonic()
    refuse_existing(out, overwrite=options.overwrite)
    checkpoint = open_sound(path)
    files = [path, *(lora.path for lora in loras)]
    require_places([out], folders=[False], inputs=files, overwrite=options.overwrite)
    _require_flux_file(checkpoint)
    given = read_loras(checkpoint, loras)
    edits = plan_edits(checkpoint, given, w4a16="skip" if settings.skip_w4a16 else "branch")
    _require_no_vectors(edits)
    require_no_means(checkpoint, edits)
    joined = join_loras(
        checkpoint,
        edits,
        max_rank=settings.max_rank,
        approximate_rank=settings.approximate_rank,
        one_rank=False,
    )
    stored = {
        module.name: join_branches(module, {layer.name: joined[layer.name] for layer in module.layers})
        for module in checkpoint.file.modules
        if isinstance(module.plan, W4A4Plan)
    }
    tensors = {
        **block_tensors(checkpoint.file.modules, stored),
        **modulation_tensors(checkpoint.file.modules, _modulations(checkpoint, edits, settings)),
        **_outer_tensors(checkpoint, edits, settings),
    }
    facts = facts_of(given)
    said = {"base_sha256": file_sha256(path), "loras": without_folders(facts)}
    with whole_output(out, overwrite=options.overwrite) as unfinished:
        save_tensors(unfinished, tensors, {"svdq_lora": json.dumps(said, sort_keys=True)})
        _require_same(tensors, unfinished)
        written = written_file("nunchaku-lora", out, [unfinished])
    ranks = [layer.rank for layer in checkpoint.layers if isinstance(layer, W4A4Plan)]
    report = LoraReport(
        source_format=checkpoint.format.name,
        outputs=(written,),
        loras=facts,
        keys=table_of(checkpoint, given, edits, joined.cut),
        rank={"before": max(ranks), "after": max(joined.ranks.values())},
        bytes={"before": path.stat().st_size, "after": written.bytes},
        layer_error=dict(sorted(joined.layer_error.items())),
        warnings=_warnings(max(ranks), [w for lora in given for w in lora.adapter.warnings]),
        seconds=time.monotonic() - started,
        peak=peak_memory(),
    )
    write_report(report_path(out, checkpoint.format), report)
    return report


def block_tensors(modules: Sequence[StoredModule], stored: Mapping[str, Branch]) -> dict[str, Tensor]:
    """The branches of all W4A4 modules as stored tensors. `stored`: by module, of whole rank tiles."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        if isinstance(module.plan, W4A4Plan):
            rank = max(branch.rank for branch in _same_mlp(module.name, stored))
            branch = padded({module.name: stored[module.name]}, rank=rank)[module.name]
            for suffix, tensor in FORMAT.encode_branch(branch, module.traits).items():
                tensors[f"{module.name}.{suffix}"] = tensor.contiguous()
    return tensors


def modulation_tensors(modules: Sequence[StoredModule], branches: Mapping[str, Branch]) -> dict[str, Tensor]:
    """The branches of W4A16 modules as stored tensors. `branches`: by layer, for those that have one."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        if isinstance(module.plan, W4A4Plan) or module.layers[0].name not in branches:
            continue
        branch = branches[module.layers[0].name]
        whole = padded({"": branch}, rank=whole_tiles(branch.rank))[""]
        rows = stored_rows(module)
        tensors[f"{module.name}.lora_down"] = whole.down.contiguous()
        tensors[f"{module.name}.lora_up"] = whole.up if rows is None else take_rows(whole.up, rows)
    return tensors


# ------------------------------------------------------------------------------------------------- pieces


def _same_mlp(name: str, stored: Mapping[str, Branch]) -> list[Branch]:
    """The branches of both modules of the MLP that a module belongs to; its own alone elsewhere."""
    names = {_OF_MLP.sub(suffix, name) for suffix in ("_fc1", "_fc2")}
    return [stored[other] for other in names if other in stored]


def _modulations(checkpoint: Checkpoint, edits: Edits, settings: FoldSettings) -> dict[str, Branch]:
    """What the LoRAs add to W4A16 layers, as branches."""
    found: dict[str, Branch] = {}
    for layer in checkpoint.layers:
        if isinstance(layer, W4A16Plan) and (parts := edits.weights.get(f"{layer.name}.weight")):
            weight = partial(_dequantized, checkpoint, layer)
            found[layer.name] = _branch_of(layer.name, parts, weight, checkpoint.dtype, settings)
    return found


def _outer_tensors(checkpoint: Checkpoint, edits: Edits, settings: FoldSettings) -> dict[str, Tensor]:
    """What the LoRAs add to 16-bit layers, under diffusers' names, their scale in `lora_A`."""
    planned = {layer.name for layer in checkpoint.layers}
    tensors: dict[str, Tensor] = {}
    for name, parts in edits.weights.items():
        layer = name.removesuffix(".weight")
        if layer not in planned:
            weight = partial(checkpoint.kept_tensor, name)
            branch = _branch_of(layer, parts, weight, checkpoint.dtype, settings)
            tensors[f"{layer}.lora_A.weight"] = branch.down.contiguous()
            tensors[f"{layer}.lora_B.weight"] = branch.up.contiguous()
    return tensors


def _branch_of(
    layer: str,
    parts: Sequence[Contribution],
    weight: Callable[[], Tensor],
    dtype: torch.dtype,
    settings: FoldSettings,
) -> Branch:
    """What the LoRAs add to a layer that has no branch of its own."""
    rank = settings.approximate_rank
    updates = [factored(p.read(), weight, strength=p.lora.weight, rank=rank).update for p in parts]
    first, *others = additions([{layer: update} for update in updates], dtype)
    return extended({layer: Branch(first.down, first.ups[layer])}, others)[layer]


def _dequantized(checkpoint: Checkpoint, layer: W4A16Plan) -> Tensor:
    return rebuilt_weight(checkpoint.solution(layer))


def _require_flux_file(checkpoint: Checkpoint) -> None:
    if checkpoint.format.name == "nunchaku" and checkpoint.family == "flux":
        return
    raise UsageError(
        f"{checkpoint.source.path}: a {checkpoint.format.name} checkpoint of family {checkpoint.family}; LoRA files "
        "are for FLUX.1 in the nunchaku format",
        hint="make the base with svdq export --to nunchaku, or leave --format out to fold the LoRA in",
        where=str(checkpoint.source.path),
    )


def _require_no_vectors(edits: Edits) -> None:
    if edits.vectors:
        name = min(edits.vectors)
        raise UsageError(
            f"{name}: the LoRA changes a bias or a norm, which svdq does not write into LoRA files",
            hint="leave --format out to fold the LoRA into the checkpoint",
            where=name,
            kind="not-exact",
        )


def _require_same(tensors: Mapping[str, Tensor], written: Path) -> None:
    """CheckFailedError unless the file holds these tensors, bit for bit."""
    found = load_file(written)
    wrong = [name for name in tensors if not same_bits(tensors[name], found.get(name))]
    if wrong or len(found) != len(tensors):
        raise CheckFailedError(
            f"the LoRA file differs from what was written: {wrong[:1] or 'other tensors'}",
            hint="no output was written under the final name; please report this",
        )


def _warnings(rank: int, found: list[str]) -> tuple[str, ...]:
    if rank != ENGINE_RANK:
        found = [
            *found,
            f"the base has rank {rank}: the engine scales all ranks after the first {ENGINE_RANK} by the strength, so "
            "use this file at strength 1",
        ]
    return tuple(found)
