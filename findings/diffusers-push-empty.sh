#!/bin/sh
# diffusers makes a repository on the Hub for a model that it then refuses to save.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_TELEMETRY=1
unset HF_HUB_OFFLINE
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import json
import os
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

warnings.filterwarnings("ignore")
asked = []


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does when a repository is made, and notes what it was asked for."""

    def do_POST(self):
        asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")))
        answer = json.dumps({"url": "http://127.0.0.1/someone/model", "name": "someone/model"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


server = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

import gguf
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from diffusers.utils import logging
from gguf.quants import quantize

logging.set_verbosity(logging.CRITICAL)
print("software:   diffusers", version("diffusers"))
print("behavior:   a model whose quantizer can't save (GGUF here, nunchaku_lite too) is refused by push_to_hub only after the")
print("            repository was made: an empty one stays, public unless private=True was given")
print("most guess: what can't be saved is refused before anything is made")


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


def write(model: FluxTransformer2DModel) -> None:
    """A GGUF file with diffusers' names: matrices in Q8_0, everything else in BF16."""
    writer = gguf.GGUFWriter("flux.gguf", "flux")
    kinds = gguf.GGMLQuantizationType
    for key, tensor in model.state_dict().items():
        kind = kinds.Q8_0 if tensor.ndim == 2 else kinds.BF16
        writer.add_tensor(key, quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


plain = flux()
plain.save_config("config")
write(plain)
model = FluxTransformer2DModel.from_single_file(
    "flux.gguf",
    config="config",
    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
    dtype=torch.bfloat16,
)
try:
    model.push_to_hub("someone/model", token="none")
    said = None
except ValueError as error:
    said = error
print("seen:       asked of the Hub:", [path for path, _ in asked], "private:", asked[0][1].get("private") if asked else "-")
print("seen:       then:", type(said).__name__, "not serializable" if "not serializable" in str(said) else said)
raise SystemExit(0 if said is not None and any("repos/create" in path for path, _ in asked) else 1)
END
