"""Train the demo's LoRA: the embedded model draws things pink that captions call red.

    python -m tools.train_demo.train_lora svdq_cli/demo/pink.safetensors

Only the low-rank factors learn, by the flow matching that the model was trained with, on captions of the training side.
About five minutes of CPU time.
"""

# diffusers' modules are untyped where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from svdq_cli.demo.pink import in_pink, sample_scenes
from svdq_cli.demo.world import Scene, caption_of, render
from svdq_cli.storage.resources import demo_model_folder
from tools.train_demo.autoencoder import encode_images
from tools.train_demo.denoiser import image_ids, pack
from tools.train_demo.schedule import learning_rate

MODEL = demo_model_folder()
RANK = 4
PEAK = 2e-3  # learning rate
WARMUP = 20  # steps
TOKENS = 32  # of a caption, as the demo draws
# Modulations are left out: they are W4A16 layers, which have no branch that a LoRA could join
TARGETS = ("attn.", "ff.", "ff_context.", "proj_mlp", "proj_out")


class LowRank(nn.Module):
    """A weight plus up @ down. `up` starts at zero, so that nothing changes at first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(RANK, columns) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def adapt(transformer: nn.Module) -> dict[str, LowRank]:
    """Put a LoRA on every attention and feed-forward linear of the blocks; by layer name."""
    transformer.requires_grad_(False)
    found: dict[str, LowRank] = {}
    for name, layer in list(transformer.named_modules()):
        inside = name.partition("transformer_blocks.")[2].partition(".")[2]
        if isinstance(layer, nn.Linear) and inside.startswith(TARGETS):
            found[name] = LowRank(layer.weight)
            parametrize.register_parametrization(layer, "weight", found[name])
    return found


def pink_drawings(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes of the training side, and their pictures (count, H, W, 3) uint8 with pink things for red ones.

    Half of them show no pink: what the LoRA has to leave as it is.
    """
    rng = random.Random(seed)
    scenes = [
        *sample_scenes(count // 2, pink=True, held_out=False, rng=rng),
        *sample_scenes(count - count // 2, pink=False, held_out=False, rng=rng),
    ]
    return scenes, np.stack([np.asarray(render(in_pink(scene), rng=rng)) for scene in scenes])


@torch.no_grad()
def encoded(pipe: FluxPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """T5 states (count, TOKENS, D) and CLIP's pooled output (count, D)."""
    parts = [
        pipe.encode_prompt(captions[start : start + 256], None, max_sequence_length=TOKENS)
        for start in range(0, len(captions), 256)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def train(out: Path, *, images: int, steps: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    pipe = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    scenes, drawings = pink_drawings(images, seed)
    clean = pack(encode_images(pipe.vae, drawings, device=torch.device("cpu")))
    text, pooled = encoded(
        pipe, [caption_of(scene, long=index % 4 == 0) for index, scene in enumerate(scenes)]
    )
    loras = adapt(pipe.transformer)
    learned = [parameter for lora in loras.values() for parameter in lora.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=PEAK, betas=(0.9, 0.99), weight_decay=0.0)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, step, peak=PEAK, warmup=WARMUP)
        rows = torch.randint(len(clean), (batch,))
        loss = flow_matching_loss(pipe.transformer, clean[rows], text[rows], pooled[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    save_lora(out, loras)


def flow_matching_loss(transformer: nn.Module, clean: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """Mean squared error of the velocity, at times drawn as for the model itself."""
    noise = torch.randn_like(clean)
    time = torch.sigmoid(0.8 + 1.2 * torch.randn(len(clean)))
    velocity = transformer(
        hidden_states=torch.lerp(clean, noise, time[:, None, None]),
        timestep=time,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=text.new_zeros(text.shape[1], 3),
        img_ids=image_ids(clean.device),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - clean)


def save_lora(out: Path, loras: dict[str, LowRank]) -> None:
    """Under peft's names, bfloat16, with the config that diffusers keeps in the header: alpha is the rank."""
    tensors: dict[str, Tensor] = {}
    for name, lora in loras.items():
        tensors[f"transformer.{name}.lora_A.weight"] = lora.down.detach().bfloat16().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = lora.up.detach().bfloat16().contiguous()
    rank = max(lora.down.shape[0] for lora in loras.values())
    config = {"transformer.peft_type": "LORA", "transformer.r": rank, "transformer.lora_alpha": rank}
    save_file(tensors, out, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's LoRA: things called red are pink.")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    train(given.out, images=given.images, steps=given.steps, batch=given.batch, seed=given.seed)


if __name__ == "__main__":
    main()
