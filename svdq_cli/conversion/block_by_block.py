"""The 4-bit model, block by block, once all layers are solved.

Only the block whose turn it is needs weights. What the blocks before it hand over waits in host memory, or on the disk
where there is too little of that.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from svdq_cli.conversion.block_forecast import block_forecast, hidden_state_bytes, room_for_blocks
from svdq_cli.conversion.memory_backoff import return_device_memory
from svdq_cli.conversion.record import Sample, record_blocks
from svdq_cli.conversion.work_folder import SolvedLayers
from svdq_cli.inference.load import load_beside
from svdq_cli.planning.joint import plan_of
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.reconstruct import Reconstruction, Recording, TensorCache
from svdq_cli.records import LayerSolution, Observer
from svdq_cli.source import denoisers_of, prefix_of


@dataclass(frozen=True, slots=True)
class Way:
    """What goes through the blocks: `sample` images of the recipe's prompts, sampled as `sampling` says, and the layers
    as they are solved. `tuned`: the blocks on the way, which takes memory."""

    prepared: Prepared
    sampling: Sampling
    sample: Sample
    solved: SolvedLayers
    options: RunOptions
    device: torch.device
    observe: Observer
    tuned: bool


def reconstructions(
    way: Way, wanted: Callable[[str, Recording], bool]
) -> Iterator[tuple[str, Reconstruction]]:
    """Every denoiser that is `wanted(component, recording)`, one after the other, and the prefix of its joint names."""
    prepared, device = way.prepared, way.device
    recordings = record_blocks(
        prepared, way.sampling, way.sample, options=way.options, device=device, observe=way.observe
    )
    for denoiser in denoisers_of(prepared.source):
        gc.collect()  # the pipeline, or the denoiser before, is done; modules with hooks refer to themselves
        return_device_memory()
        recording = recordings.pop(denoiser.component)
        if not wanted(denoiser.component, recording):
            continue
        prefix = prefix_of(prepared.source.components, denoiser.component)
        model, weights = load_beside(
            denoiser, recording.block_graph.order, class_name=prepared.plan.model_class, device=device
        )
        folder = way.solved.work.passages
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        forecast = block_forecast(prepared, way.sampling, way.sample, device, tuned=way.tuned)
        plan = plan_of(prepared.plan, denoiser.component)
        held = hidden_state_bytes(forecast, way.options, device)
        tensor_cache = TensorCache(folder, host_bytes=held)
        room = room_for_blocks(forecast, way.options, device)
        yield (
            prefix,
            Reconstruction(model, weights, plan, _Own(way.solved, prefix), recording, tensor_cache, room),
        )


@dataclass(frozen=True, slots=True)
class _Own(Mapping[str, LayerSolution]):
    """The solved layers of one denoiser, under its own names."""

    solved: SolvedLayers
    prefix: str

    def __getitem__(self, name: str) -> LayerSolution:
        return self.solved[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.solved if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
