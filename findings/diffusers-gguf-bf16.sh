#!/bin/sh
# diffusers loads a GGUF file with BF16 biases, and can't run it.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from importlib.metadata import version

import gguf
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from diffusers.utils import logging
from gguf.quants import quantize

warnings.filterwarnings("ignore")
logging.set_verbosity(logging.CRITICAL)
print("software:   diffusers", version("diffusers"))
print("behavior:   of a GGUF file whose vectors are BF16 (as stable-diffusion.cpp writes them), biases are held as bytes and never")
print("            made numbers: the model loads, says that its dtype is uint8, and fails at its first layer. With F32 vectors it runs")
print("most guess: BF16 is the plainest type of such a file: what loads Q8_0 loads it too")


def flux() -> FluxTransformer2DModel:
    """FLUX.1's transformer, small, with random weights."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).to(torch.bfloat16)


def loaded(vectors: gguf.GGMLQuantizationType) -> FluxTransformer2DModel:
    """From a GGUF file with diffusers' names: matrices in Q8_0, everything else in the type `vectors`."""
    plain = flux()
    plain.save_config("config")
    writer = gguf.GGUFWriter(f"{vectors.name}.gguf", "flux")
    for key, tensor in plain.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else vectors
        writer.add_tensor(key, quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return FluxTransformer2DModel.from_single_file(
        f"{vectors.name}.gguf",
        config="config",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        dtype=torch.bfloat16,
    )


@torch.no_grad()
def run(model: FluxTransformer2DModel) -> str:
    try:
        output = model(
            hidden_states=torch.randn(1, 4, 32, dtype=torch.bfloat16),
            encoder_hidden_states=torch.randn(1, 3, 32, dtype=torch.bfloat16),
            pooled_projections=torch.randn(1, 32, dtype=torch.bfloat16),
            timestep=torch.tensor([0.5], dtype=torch.bfloat16),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return f"finite output: {bool(output.isfinite().all())}"


seen = {}
for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16):
    model = loaded(kind)
    seen[kind.name] = (model.dtype, run(model))
    print(f"seen:       vectors {kind.name}: dtype {seen[kind.name][0]}, {seen[kind.name][1]}")
works, fails = seen["F32"], seen["BF16"]
good = works[1] == "finite output: True" and fails[0] == torch.uint8 and "RuntimeError" in fails[1]
raise SystemExit(0 if good else 1)
END
