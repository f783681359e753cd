"""Train the embedded demo model from nothing: pictures, autoencoder, text encoders, denoiser, export.

    python -m tools.train_demo.train --out DIR [--work DIR] [--minutes 77] [--vae-minutes 15] [--device cpu]

With --steps and --vae-steps in place of minutes a run is reproducible on one machine; with minutes the number of
steps follows the machine. The work folder holds checkpoints: the same command goes on where it was stopped.
"""

# diffusers' and torch's modules are untyped where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.train_demo.autoencoder import (
    encode_images,
    psnr,
    reconstruct,
    sharpen_decoder,
    train_autoencoder,
)
from tools.train_demo.denoiser import Recipe, train_denoiser
from tools.train_demo.export import export_pipeline
from tools.train_demo.images import TrainingSet, training_set
from tools.train_demo.schedule import Budget, Seconds, Steps


def train(
    out: Path,
    *,
    work: Path,
    images: int,
    vae_budget: Budget,
    decoder_budget: Budget,
    budget: Budget,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> None:
    """Run every stage that `work` does not hold yet and write the pipeline to `out`."""
    data = training_set(work, count=images, seed=seed)
    vae = train_autoencoder(data.images, work / "vae", budget=vae_budget, seed=seed, device=device)
    latents = _latents(work / "latents.safetensors", vae, data.images, device)
    vae = _sharpened(work / "vae-sharp", vae, data, latents, budget=decoder_budget, seed=seed, device=device)
    crispness = psnr(reconstruct(vae, data.images[:256], device=device), data.images[:256])
    print(f"autoencoder {crispness:.1f} dB on 256 pictures", flush=True)
    model = train_denoiser(
        latents, data.scenes, work / "denoiser", budget=budget, recipe=recipe, seed=seed, device=device
    )
    export_pipeline(model.cpu(), vae.cpu(), out)
    print(json.dumps({"out": str(out), "seed": seed, "pictures": images, **asdict(recipe)}))


def _sharpened(
    folder: Path,
    vae: AutoencoderKL,
    data: TrainingSet,
    latents: Tensor,
    *,
    budget: Budget,
    seed: int,
    device: torch.device,
) -> AutoencoderKL:
    if not folder.exists():
        stars = [any((t.size, t.shape) == ("small", "star") for t in scene.things) for scene in data.scenes]
        small_stars = np.flatnonzero(stars)
        sharpen_decoder(vae, data.images, latents, small_stars, budget=budget, seed=seed, device=device)
        vae.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).to(device).eval()


def _latents(path: Path, vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> Tensor:
    if not path.exists():
        save_file({"latents": encode_images(vae, images, device=device).contiguous()}, path)
    return load_file(path)["latents"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "svdq-demo",
        help="checkpoints and pictures",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--batch", type=int, default=64)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=77.0, help="of the denoiser")
    length.add_argument("--steps", type=int, help="of the denoiser, in place of minutes (cuda: 20000)")
    parser.add_argument("--vae-minutes", type=float, default=15.0)
    parser.add_argument("--vae-steps", type=int, help="of the autoencoder, in place of minutes")
    parser.add_argument("--reading-steps", type=int, default=500, help="of the text encoders alone")
    arguments = parser.parse_args()
    steps = arguments.steps or (20_000 if arguments.device == "cuda" else None)
    vae_steps = arguments.vae_steps or (6_000 if arguments.device == "cuda" else None)
    train(
        arguments.out,
        work=arguments.work,
        images=arguments.images,
        vae_budget=Steps(vae_steps) if vae_steps else Seconds(60 * arguments.vae_minutes),
        decoder_budget=Steps(max(1, vae_steps // 2)) if vae_steps else Seconds(24 * arguments.vae_minutes),
        budget=Steps(steps) if steps else Seconds(60 * arguments.minutes),
        recipe=Recipe(batch=arguments.batch, reading_steps=arguments.reading_steps),
        seed=arguments.seed,
        device=torch.device(arguments.device),
    )


if __name__ == "__main__":
    main()
