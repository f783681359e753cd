# pyright: reportMissingImports=false
"""vLLM-Omni's own Z-Image model, quantization config, `load_weights` and check of what was loaded, on one file.

    python load_in_vllm_omni.py FILE.safetensors EXPECTED.safetensors

Only what asks for a GPU is replaced: the check of its capability, the choice of an attention, and the nvfp4 kernel, for
which vLLM's own emulation stands. EXPECTED holds an input and svdq's output of every module. Prints JSON.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from typing import Any

import torch
import vllm_omni.quantization.svdquant_config as svdquant
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.device import DeviceConfig
from vllm.distributed import parallel_state
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.models.z_image.z_image_transformer import ZImageTransformer2DModel
from vllm_omni.platforms import current_omni_platform
from vllm_omni.quantization.factory import build_quant_config

ATTENTION = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"


class Kernel(EmulationNvFp4LinearKernel):
    """The emulation, which calls the scale of the whole weight by another name than SVDQuant's layers do."""

    def __init__(self) -> None: ...

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None):
        layer.weight_global_scale = layer.alpha
        return super().apply_weights(layer, x, bias)


class Pipeline(nn.Module):
    """What a pipeline does with weights: hands them to the component that their prefix names."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def load_weights(self, weights: Any) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


def main(file: str, expected: str) -> dict[str, object]:
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    quantization = build_quant_config(json.loads(said["quantization_config"]))
    known = inspect.signature(ZImageTransformer2DModel.__init__).parameters
    sizes = {key: value for key, value in json.loads(said["config"]).items() if key in known}
    svdquant._assert_supported = lambda: None
    svdquant._nvfp4_kernel = Kernel
    type(current_omni_platform).get_diffusion_attn_backend_cls = lambda *_, **__: ATTENTION
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        parallel_state.init_distributed_environment(1, 0, "tcp://127.0.0.1:29578", 0, backend="gloo")
        parallel_state.initialize_model_parallel(1, 1)
        pipeline = Pipeline(ZImageTransformer2DModel(**sizes, quant_config=quantization))
        loader: Any = object.__new__(DiffusersPipelineLoader)
        loader.quant_config = quantization
        loader.counter_before_loading_weights = 0.0
        loader.get_all_weights = lambda model: iter(
            (f"transformer.{name}", tensor) for name, tensor in load_file(file).items()
        )
        try:
            loader.load_weights(pipeline)
        except Exception as error:
            return {"loads": False, "said": f"{type(error).__name__}: {error}"}
        return {"loads": True, "db": worst_agreement(pipeline.transformer, load_file(expected))}


def worst_agreement(model: nn.Module, expected: dict[str, torch.Tensor]) -> float:
    """Of all quantized modules, the least ratio of svdq's output to its difference from the runtime's, in dB."""
    worst = math.inf
    for name in sorted({key.rpartition(".")[0] for key in expected}):
        layer: Any = model.get_submodule(name)
        layer.quant_method.process_weights_after_loading(layer)
        wanted = expected[f"{name}.y"].double()
        found = layer.quant_method.apply(layer, expected[f"{name}.x"]).double()
        worst = min(worst, 10 * math.log10(float(wanted.pow(2).sum() / (found - wanted).pow(2).sum())))
    return worst


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
