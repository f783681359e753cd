#!/bin/sh
# DiffusionPipeline.from_pretrained ignores the transformer that it is given for Wan.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

from diffusers import DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

print("software:   diffusers", version("diffusers"))
print("behavior:   DiffusionPipeline.from_pretrained(folder, transformer=mine) loads the folder's transformer where the pipeline's")
print("            class takes its denoiser as an optional argument (WanPipeline); WanPipeline.from_pretrained keeps mine. Both")
print("            return a WanPipeline, and neither says anything.")
print("most guess: a component that is passed replaces the folder's, whichever of the two classes it is passed to")

transformer = WanTransformer3DModel(
    num_attention_heads=2,
    attention_head_dim=12,
    text_dim=8,
    freq_dim=16,
    ffn_dim=16,
    num_layers=1,
)
nothing = {"tokenizer": None, "text_encoder": None, "vae": None}
WanPipeline(scheduler=UniPCMultistepScheduler(), transformer=transformer, **nothing).save_pretrained("wan")
kept = {}
for kind in (DiffusionPipeline, WanPipeline):
    pipe = kind.from_pretrained("wan", transformer=transformer, **nothing)
    kept[kind.__name__] = (type(pipe).__name__, pipe.transformer is transformer)
print("seen:      ", "; ".join(f"{kind}: a {made}, mine is kept: {mine}" for kind, (made, mine) in kept.items()))
wanted = {"DiffusionPipeline": ("WanPipeline", False), "WanPipeline": ("WanPipeline", True)}
raise SystemExit(0 if kept == wanted else 1)
END
