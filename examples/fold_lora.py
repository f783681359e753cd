"""A LoRA in the checkpoint and at run time: `python examples/fold_lora.py FOLDER CHECKPOINT LORA.safetensors`."""
# diffusers' base class of all pipelines declares no call.
# pyright: reportCallIssue=false

from __future__ import annotations

import sys
from pathlib import Path

import svdq_cli

PROMPT = "a large red circle in the center on white"


def main(folder: Path, checkpoint: Path, lora: Path) -> None:
    # In the file: the LoRA joins the low-rank branch, nothing is quantized again, and any runtime sees it.
    report = svdq_cli.fold_lora(checkpoint, {lora: 0.8}, folder / "folded")
    print(f"rank {report.rank['before']} -> {report.rank['after']}")
    folded = svdq_cli.load_pipeline(folder / "folded")
    folded(PROMPT).images[0].save(folder / "folded.png")

    # At run time: the same layers, at any strength, and off again.
    pipe = svdq_cli.load_pipeline(checkpoint)
    svdq_cli.load_lora(pipe, lora, "style")
    for strength in (0.0, 0.8):
        svdq_cli.set_adapters(pipe, {"style": strength})
        pipe(PROMPT).images[0].save(folder / f"strength-{strength}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
