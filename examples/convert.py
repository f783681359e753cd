"""Converts a model, checks the result, and generates an image with it: `python examples/convert.py FOLDER [MODEL]`."""
# diffusers' base class of all pipelines declares no call.
# pyright: reportCallIssue=false

from __future__ import annotations

import sys
from pathlib import Path

import svdq_cli

PROMPT = "a large red circle in the center on white"


def main(folder: Path, model: str = "demo") -> None:
    # Data-free takes seconds. With prompts= it calibrates first, which is what makes 4 bits look like 16.
    report = svdq_cli.convert(model, folder / "int4", effort="datafree")
    print(f"{report.bytes.ratio:.2f} times smaller, layers at {report.layer_sqnr_db.mean:.1f} dB on average")

    checked = svdq_cli.check(folder / "int4", against=model)
    print(f"{checked.layers} layers checked: {checked.status}")

    pipe = svdq_cli.load_pipeline(folder / "int4")
    pipe(PROMPT).images[0].save(folder / "image.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
