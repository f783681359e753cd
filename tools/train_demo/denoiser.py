"""The demo model's FLUX.1 transformer and text encoders, trained together by flow matching."""

# diffusers' and torch's modules are untyped where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from svdq_cli.demo.world import Scene
from tools.train_demo.autoencoder import LATENT_CHANNELS
from tools.train_demo.muon import Muon
from tools.train_demo.reading import teach_reading
from tools.train_demo.schedule import Budget, Clock, learning_rate, share_done
from tools.train_demo.text import (
    WIDTH,
    Captions,
    new_clip_encoder,
    new_clip_tokenizer,
    new_t5_encoder,
    new_t5_tokenizer,
    tokenize,
)

HIDDEN = 256  # every linear of a block has K and N in multiples of 128
SIDE = 6  # packed latents a side: 96 pixels / 8 (autoencoder) / 2 (packing)
CAPTION_DROPOUT = 0.06


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the denoiser is trained."""

    reading_steps: int = 500  # of the text encoders, before anything is drawn
    batch: int = 64
    peak: float = 1e-3  # learning rate of AdamW
    text_peak: float = 3e-4  # of the text encoders, which can read already
    muon_peak: float = 2e-3  # learning rate of Muon on the block matrices; 0 leaves them to AdamW
    warmup: int = 100  # steps
    noise_mean: float = 0.8  # of the logit-normal time; above 0 favors noise, where the caption decides
    noise_deviation: float = 1.2
    average: float = 0.999  # decay of the exponential moving average of the weights


class Denoiser(nn.Module):
    """Everything that trains together, under the names FluxPipeline gives the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: CLIPTokenizer = new_clip_tokenizer()
        self.tokenizer_2: T5TokenizerFast = new_t5_tokenizer()
        self.text_encoder: CLIPTextModel = new_clip_encoder(self.tokenizer)
        self.text_encoder_2: T5EncoderModel = new_t5_encoder(self.tokenizer_2)
        self.transformer = new_transformer()

    def forward(self, latents: Tensor, time: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity (B, SIDE * SIDE, 4 * LATENT_CHANNELS) at `latents` of that shape and `time` (B,) in [0, 1].

        Calls the parts exactly as FluxPipeline does: T5 states without a mask, CLIP's pooled output, zero text ids.
        """
        text = self.text_encoder_2(t5_ids)[0]
        return self.transformer(
            hidden_states=latents,
            timestep=time,
            guidance=None,
            pooled_projections=self.text_encoder(clip_ids).pooler_output,
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=image_ids(latents.device),
            return_dict=False,
        )[0]


def new_transformer() -> FluxTransformer2DModel:
    """Untrained transformer; blocks start as the identity (DiT, section 3.2, adaLN-Zero)."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=HIDDEN // 64,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    modulations = [block.norm.linear for block in model.single_transformer_blocks]
    for block in model.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for linear in [*modulations, model.norm_out.linear, model.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def image_ids(device: torch.device) -> Tensor:
    """(SIDE * SIDE, 3) position ids as FluxPipeline makes them."""
    return FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, device, torch.float32)


def pack(latents: Tensor) -> Tensor:
    """(B, C, 2 * SIDE, 2 * SIDE) to (B, SIDE * SIDE, 4 * C)."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def padded_length(rng: random.Random, batch: int) -> tuple[int, int]:
    """T5 length and batch size of one step: mostly short, a few percent long with as many tokens in all."""
    draw = rng.random()
    if draw < 0.03:
        length = rng.choice((64, 128, 256, 512))
        return length, max(4, batch * 56 // (length + SIDE * SIDE))
    return (32, batch) if draw < 0.35 else (rng.randint(18, 24), batch)


def train_denoiser(
    latents: Tensor,
    scenes: tuple[Scene, ...],
    folder: Path,
    *,
    budget: Budget,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> Denoiser:
    """Train on standardized `latents` (count, C, H, W). Returns the averaged weights.

    `folder` holds a checkpoint every three minutes; an interrupted run goes on from it.
    """
    torch.manual_seed(seed)
    model = Denoiser().to(device)
    captions, packed = tokenize(model.tokenizer, model.tokenizer_2, scenes), pack(latents)
    clock, average = _resume(model, folder)
    if not average:
        teach_reading(model.text_encoder, model.text_encoder_2, captions, scenes, steps=recipe.reading_steps)
        average = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(seed + clock.step)
    rng = random.Random(seed + clock.step)
    optimizers = _optimizers(model, recipe)
    begun, saved, losses = clock.step, clock.spent, []
    clock.start()
    while (share := share_done(clock, budget)) < 1.0:
        # a resumed run starts with fresh moments, so it warms up again
        scale = learning_rate(share, clock.step - begun, peak=1.0, warmup=recipe.warmup)
        losses.append(_step(model, optimizers, packed, captions, rng=rng, recipe=recipe, scale=scale))
        clock.step += 1
        _move_average(average, model, decay=min(recipe.average, (1 + clock.step) / (10 + clock.step)))
        if clock.step % 50 == 0:
            print(
                f"denoiser step {clock.step} {clock.seconds:.0f} s loss {sum(losses) / len(losses):.4f}",
                flush=True,
            )
            losses.clear()
        if clock.seconds - saved > 180:
            saved = clock.seconds
            _save(model, average, folder, clock)
    _save(model, average, folder, clock)
    model.load_state_dict(average)
    return model.eval()


def _step(
    model: Denoiser,
    optimizers: list[torch.optim.Optimizer],
    packed: Tensor,
    captions: Captions,
    *,
    rng: random.Random,
    recipe: Recipe,
    scale: float,
) -> float:
    device = next(model.parameters()).device
    length, batch = padded_length(rng, recipe.batch)
    chosen = torch.randint(len(packed), (batch,))
    rows = 2 * chosen + (torch.rand(batch) < 0.3).long()
    rows[torch.rand(batch) < CAPTION_DROPOUT] = 2 * len(packed)
    clip_ids, t5_ids = captions.batch(rows, length=length)
    clean = packed[chosen].to(device)
    noise = torch.randn_like(clean)
    time = torch.sigmoid(recipe.noise_mean + recipe.noise_deviation * torch.randn(batch)).to(device)
    noisy = torch.lerp(clean, noise, time[:, None, None])
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        velocity = model(noisy, time, clip_ids.to(device), t5_ids.to(device))
    loss = F.mse_loss(velocity.float(), noise - clean)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def _optimizers(model: Denoiser, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices of the transformer blocks and AdamW for the rest."""
    blocks, rest = [], []
    text = [*model.text_encoder.parameters(), *model.text_encoder_2.parameters()]
    for name, value in model.transformer.named_parameters():
        is_block_matrix = value.ndim == 2 and "transformer_blocks" in name and "norm" not in name
        (blocks if recipe.muon_peak and is_block_matrix else rest).append(value)
    groups = [{"params": rest, "lr": recipe.peak}, {"params": text, "lr": recipe.text_peak}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adam]
    if blocks:
        optimizers.append(Muon(blocks, lr=recipe.muon_peak))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@torch.no_grad()
def _move_average(average: dict[str, Tensor], model: Denoiser, *, decay: float) -> None:
    current = model.state_dict()
    floats = [name for name, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in floats], [current[name] for name in floats], 1 - decay)


def _save(model: Denoiser, average: dict[str, Tensor], folder: Path, clock: Clock) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    weights |= {f"average.{name}": value for name, value in average.items()}
    # T5 ties its embedding to shared.weight; safetensors refuses two names for one storage
    weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
    metadata = {"progress": json.dumps({"step": clock.step, "spent": clock.seconds})}
    partial = folder / "denoiser.partial"
    save_file(weights, partial, metadata=metadata)
    partial.replace(folder / "denoiser.safetensors")


def _resume(model: Denoiser, folder: Path) -> tuple[Clock, dict[str, Tensor]]:
    """Load a checkpoint of `folder` into `model`. Returns its progress and averaged weights, empty without one."""
    path = folder / "denoiser.safetensors"
    if not path.exists():
        return Clock(), {}
    names, device = list(model.state_dict()), next(model.parameters()).device
    weights = load_file(path, device=str(device))
    model.load_state_dict({name: weights[f"model.{name}"] for name in names})
    with safe_open(path, framework="pt") as file:
        clock = Clock(**json.loads(file.metadata()["progress"]))
    return clock, {name: weights[f"average.{name}"] for name in names}


def averaged(folder: Path) -> Denoiser:
    """The averaged weights of a checkpoint, to look at while training goes on."""
    model = Denoiser()
    weights = load_file(folder / "denoiser.safetensors")
    model.load_state_dict({name: weights[f"average.{name}"] for name in model.state_dict()})
    return model.eval()
