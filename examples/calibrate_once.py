"""One calibration for two precisions, compared by their images: `python examples/calibrate_once.py FOLDER [MODEL]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import svdq_cli

PRECISIONS: tuple[Literal["int4", "nvfp4"], ...] = ("int4", "nvfp4")


def main(folder: Path, model: str = "demo", *, samples: int = 16, steps: int | None = None) -> None:
    # The model runs once for all conversions; its statistics are kept on disk.
    svdq_cli.calibrate(model, folder / "calib", samples=samples, steps=steps)

    for precision in PRECISIONS:
        out = folder / precision
        svdq_cli.convert(model, out, calibration=folder / "calib", precision=precision, effort="fast")
        # The passes that are left out measure what the figures mean; keep them when a figure decides something.
        figures = svdq_cli.evaluate(
            out, model, samples=4, steps=steps, without=["naive", "floor", "own-noise", "outputs"]
        )
        print(f"{precision}: PSNR {figures.psnr_db.mean:.1f} dB, SSIM {figures.ssim.mean:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
