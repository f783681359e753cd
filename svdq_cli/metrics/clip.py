"""CLIP score (Hessel et al. 2021): how well an image fits its prompt; 0 to 100, higher is better."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.metrics.metric import Measure, Measured, Metric
from svdq_cli.system.quiet import quiet_loading

if TYPE_CHECKING:
    import torch

MODEL = "openai/clip-vit-large-patch14"  # torchmetrics' default, and that of published figures


def load_clip(device: torch.device, *, model: str = MODEL) -> Measure:
    """100 max(0, cosine) of the image's and the prompt's embedding, as torchmetrics defines it.

    `model`: a Hub id in the cache, or a folder. Raises EnvironmentLacksError where its weights are not there.
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    try:
        with quiet_loading():
            network = CLIPModel.from_pretrained(model, local_files_only=True)
            processor = CLIPProcessor.from_pretrained(model, local_files_only=True)
    except OSError as error:
        raise EnvironmentLacksError(
            f"CLIP score needs the weights of {model}", hint=f"hf download {model}", where=model
        ) from error
    network = network.to(device).eval()  # pyright: ignore[reportArgumentType]
    tokens = network.text_model.config.max_position_embeddings

    @torch.no_grad()
    def clip_score(batch: Measured) -> list[float]:
        inputs = processor(
            text=list(batch.prompts),
            images=[image.convert("RGB") for image in batch.images],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=tokens,
        ).to(device)
        found = network(**inputs)
        cosine = (found.image_embeds * found.text_embeds).sum(-1)  # both are of length 1
        return (100 * cosine).clamp(min=0).tolist()

    return lambda batches: [figure for batch in batches for figure in clip_score(batch)]


METRIC = Metric(
    key="clip",
    title="CLIP score",
    kind="image",
    better="higher",
    load=lambda device, images: load_clip(device),
    place=3,
    digits=2,
)
