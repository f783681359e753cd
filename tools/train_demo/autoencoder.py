"""The demo model's AutoencoderKL: 96x96 pictures to 8 x 12 x 12 latents and back."""

# diffusers' and torch's modules are untyped where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.train_demo.schedule import Budget, Clock, learning_rate, share_done

LATENT_CHANNELS = 8
CROP_SHARE = 0.65  # of the budget goes to quarter-size crops: four times the steps while the colors settle
KL_WEIGHT = 1e-4  # per latent value; keeps the latents smooth without blurring edges


def new_autoencoder() -> AutoencoderKL:
    """Untrained weights of the architecture."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=96,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    _start_linear(model)
    with torch.no_grad():
        # the posterior starts narrow (deviation 0.05); at deviation 1 its noise hides the picture for 500 steps
        model.encoder.conv_out.weight[LATENT_CHANNELS:].mul_(0.1)
        model.encoder.conv_out.bias[LATENT_CHANNELS:].fill_(-6.0)
    return model


@torch.no_grad()
def _start_linear(model: AutoencoderKL) -> None:
    """Start as a nearly linear map that keeps the signal's size.

    PyTorch's default convolution shrinks it by sqrt(3), which over this many layers hides the picture for the
    first thousand steps. Residual branches start at zero (Goyal et al. 2017, section 5.1).
    """
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Conv2d):
            part.bias.zero_()
            part.weight.mul_(0.0 if name.endswith("conv2") else 3**0.5)


def to_signal(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    signal = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
    return signal.float().div(127.5).sub(1.0).contiguous(memory_format=torch.channels_last)


def _draw_batch(images: np.ndarray, rng: np.random.Generator, *, crops: bool) -> np.ndarray:
    """8 whole pictures, or 12 crops of half the side."""
    if not crops:
        return images[rng.integers(len(images), size=8)]
    side = images.shape[1] // 2
    corners = rng.integers(side + 1, size=(12, 2))
    chosen = rng.integers(len(images), size=12)
    return np.stack(
        [images[i, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners, strict=True)]
    )


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """L1 + MSE + L1 of the differences between neighbors, which is what keeps edges crisp."""
    gap = drawn - wanted
    edges = gap.diff(dim=2).abs().mean() + gap.diff(dim=3).abs().mean()
    return gap.abs().mean() + 2.0 * gap.square().mean() + 0.5 * edges


def train_autoencoder(
    images: np.ndarray, folder: Path, *, budget: Budget, seed: int, device: torch.device, peak: float = 1e-3
) -> AutoencoderKL:
    """Train on `images`, or load what `folder` holds. The result's latents have mean 0 and deviation 1.

    `folder` keeps a checkpoint of weights and progress; an interrupted run goes on from it with fresh moments.
    """
    torch.manual_seed(seed)
    model, clock = new_autoencoder(), Clock()
    progress = folder / "progress.json"
    if progress.exists():
        model = AutoencoderKL.from_pretrained(folder)
        clock = Clock(**json.loads(progress.read_text(encoding="utf-8")))
    model = model.to(device=device, memory_format=torch.channels_last)
    rng = np.random.default_rng(seed + clock.step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    saved = clock.spent
    clock.start()
    while (share := share_done(clock, budget)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, clock.step, peak=peak, warmup=50)
        wanted = to_signal(_draw_batch(images, rng, crops=share < CROP_SHARE), device)
        loss = _step(model, optimizer, wanted)
        clock.step += 1
        if clock.step % 100 == 0:
            print(f"autoencoder step {clock.step} {clock.seconds:.0f} s loss {loss:.4f}", flush=True)
        if clock.seconds - saved > 120:
            saved = clock.seconds
            _save(model, folder, clock)
    _standardize(model, images[:512], device)
    _save(model, folder, clock)
    return model.eval()


def _step(model: AutoencoderKL, optimizer: torch.optim.Optimizer, wanted: Tensor) -> float:
    latents = model.encode(wanted).latent_dist
    drawn = model.decode(latents.sample()).sample
    # DiagonalGaussianDistribution.kl() sums over (C, H, W) of a picture
    kl = latents.kl().mean() / latents.mean[0].numel()
    loss = reconstruction_loss(drawn, wanted) + KL_WEIGHT * kl
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _save(model: AutoencoderKL, folder: Path, clock: Clock) -> None:
    model.save_pretrained(folder)
    progress = {"step": clock.step, "spent": clock.seconds}
    (folder / "progress.json").write_text(json.dumps(progress), encoding="utf-8")


@torch.no_grad()
def _standardize(model: AutoencoderKL, images: np.ndarray, device: torch.device) -> None:
    """Set scaling_factor and shift_factor so that (latent - shift) * scale has mean 0 and deviation 1."""
    latents = encode_images(model, images, device=device, raw=True)
    model.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1.0 / latents.std().item())


@torch.no_grad()
def encode_images(
    model: AutoencoderKL, images: np.ndarray, *, device: torch.device, raw: bool = False
) -> Tensor:
    """Latent means (count, LATENT_CHANNELS, H/8, W/8) on the CPU, standardized unless `raw`."""
    batches = []
    for start in range(0, len(images), 64):
        latents = model.encode(to_signal(images[start : start + 64], device)).latent_dist.mean
        batches.append(latents.float().cpu())
    latents = torch.cat(batches)
    return latents if raw else (latents - model.config.shift_factor) * model.config.scaling_factor


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: np.ndarray, *, device: torch.device) -> np.ndarray:
    """Pictures through the autoencoder, uint8 (count, H, W, 3)."""
    latents = encode_images(model, images, device=device, raw=True)
    drawn = torch.cat([model.decode(part.to(device)).sample.float().cpu() for part in latents.split(64)])
    return drawn.add(1).mul(127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()


def sharpen_decoder(
    model: AutoencoderKL,
    images: np.ndarray,
    latents: Tensor,
    small_stars: np.ndarray,
    *,
    budget: Budget,
    seed: int,
    device: torch.device,
    peak: float = 8e-4,
) -> None:
    """Train only the decoder, in place, on standardized `latents` of `images` with up to 0.15 of noise.

    The denoiser's latents are not exact, and small stars are where that shows: half of each batch are pictures
    whose row is in `small_stars`, and pixels that differ from their row's background count four times.
    """
    torch.manual_seed(seed)
    rng, clock = np.random.default_rng(seed), Clock()
    model = model.to(device=device, memory_format=torch.channels_last).requires_grad_(False)
    model.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    clock.start()
    while (share := share_done(clock, budget)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, clock.step, peak=peak, warmup=30)
        rows = np.concatenate([rng.choice(small_stars, 4), rng.integers(len(images), size=4)])
        wanted, clean = to_signal(images[rows], device), latents[rows].to(device)
        noisy = clean + 0.15 * torch.rand(len(rows), 1, 1, 1, device=device) * torch.randn_like(clean)
        raw = noisy / model.config.scaling_factor + model.config.shift_factor
        drawn = model.decode(raw.contiguous(memory_format=torch.channels_last)).sample
        on_object = (wanted - wanted[..., :1]).abs().amax(dim=1, keepdim=True) > 0.1
        weight = 1.0 + 3.0 * on_object
        loss = reconstruction_loss(drawn * weight, wanted * weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        clock.step += 1
        if clock.step % 100 == 0:
            print(f"decoder step {clock.step} {clock.seconds:.0f} s loss {loss.item():.4f}", flush=True)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 picture arrays."""
    error = np.square(first.astype(np.float32) - second.astype(np.float32)).mean()
    return float(10 * np.log10(255.0**2 / max(float(error), 1e-12)))
