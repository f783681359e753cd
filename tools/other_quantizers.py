"""Models saved, and weights rounded, by other libraries: what `tools.compatibility` runs in their environment.

    python tools/other_quantizers.py save NAME FOLDER
    python tools/other_quantizers.py round NAME

`save` writes a small FLUX.1 transformer in the way that NAME does. `round` prints (JSON) what large weights among
Gaussian numbers become in symmetric int4: 10 and -10, each in a group of its own, and -9.9 beside a 10. A library that
is missing, or raises, ends it with code 1.
"""

# The libraries are in an environment of their own.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

GROUP = 64


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    ).to(torch.bfloat16)


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """What `flux` reads, in the order of its arguments."""
    sizes = ((1, 16, 64), (1, 8, 256), (1, 256))
    numbers = (torch.tensor([0.5]), torch.zeros(16, 3), torch.zeros(8, 3), torch.tensor([3.5]))
    return (*(torch.randn(size, dtype=dtype) for size in sizes), *(number.to(dtype) for number in numbers))


# ------------------------------------------------------------------------------------------------- saving


def through_diffusers(config: Callable[[], Any]) -> Callable[[Path], None]:
    """Quantized by diffusers' `from_pretrained`, saved by its `save_pretrained`."""

    def save(folder: Path) -> None:
        from diffusers import FluxTransformer2DModel

        plain = folder.parent / "16-bit"
        flux().save_pretrained(plain)
        quantized = FluxTransformer2DModel.from_pretrained(
            plain, quantization_config=config(), torch_dtype=torch.bfloat16
        )
        quantized.save_pretrained(folder)

    return save


def quanto(dtype: str) -> Any:
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype=dtype)


def torchao() -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def sdnq(**said: Any) -> Any:
    from sdnq import SDNQConfig

    return SDNQConfig(**said)


def modelopt(config: str) -> Callable[[Path], None]:
    """Calibrated on one input and exported in ModelOpt's own form for diffusers."""

    def save(folder: Path) -> None:
        import modelopt.torch.quantization as own
        from modelopt.torch.export import export_hf_checkpoint

        model = flux()
        with torch.no_grad():
            own.quantize(model, getattr(own, config), lambda each: each(*inputs()))
        export_hf_checkpoint(model, export_dir=folder)

    return save


def hqq(folder: Path) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, state = flux(), {}
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in linears.items():
        how = BaseQuantizeConfig(nbits=4, group_size=GROUP)
        codes = HQQLinear(layer, how, compute_dtype=torch.bfloat16, device="cpu").state_dict()
        state |= {f"{name}.{key}": value for key, value in codes.items() if isinstance(value, Tensor)}
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")


def mlx(**how: Any) -> Callable[[Path], None]:
    """By MLX's own writer; `how` is for its `quantize`, nothing for 16 bits."""

    def save(folder: Path) -> None:
        import mlx.core as own

        tensors = {}
        for key, value in flux().state_dict().items():
            array = own.array(value.float().numpy()).astype(own.bfloat16)
            if not how or value.ndim != 2:
                tensors[key] = array
                continue
            parts = own.quantize(array, **how)
            names = (key, *(f"{key.removesuffix('.weight')}.{part}" for part in ("scales", "biases")))
            tensors |= dict(zip(names, parts, strict=False))
        folder.mkdir()
        own.save_safetensors(str(folder / "model.safetensors"), tensors)

    return save


def nncf(folder: Path) -> None:
    import nncf as own

    model = flux().float().eval()
    names = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
    )
    example = dict(zip(names, inputs(torch.float32), strict=True))
    codes = own.compress_weights(model, mode=own.CompressWeightsMode.INT8_SYM, dataset=own.Dataset([example]))
    folder.mkdir()
    state = {key: value.contiguous().clone() for key, value in codes.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def openvino(folder: Path) -> None:
    import openvino as own

    class Plain(nn.Module):
        """The model as one that takes and gives tensors alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = flux().float().eval()

        def forward(self, *tensors: Tensor) -> Tensor:
            return self.model(*tensors, return_dict=False)[0]

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    own.save_model(
        own.convert_model(Plain(), example_input=inputs(torch.float32)), folder / "openvino_model.xml"
    )


SAVES: dict[str, Callable[[Path], None]] = {
    **{f"quanto {kind}": through_diffusers(lambda kind=kind: quanto(kind)) for kind in ("int4", "float8")},
    "torchao int8": through_diffusers(torchao),
    "sdnq int4": through_diffusers(lambda: sdnq(weights_dtype="int4")),
    "sdnq int4 with SVD": through_diffusers(lambda: sdnq(weights_dtype="int4", use_svd=True)),
    "modelopt FP8": modelopt("FP8_DEFAULT_CFG"),
    "modelopt NVFP4": modelopt("NVFP4_DEFAULT_CFG"),
    "modelopt MXFP8": modelopt("MXFP8_DEFAULT_CFG"),
    "hqq int4": hqq,
    "mlx int4": mlx(mode="affine", bits=4, group_size=GROUP),
    "mlx mxfp4": mlx(mode="mxfp4", bits=4, group_size=32),
    "mlx 16 bits": mlx(),
    "nncf int8": nncf,
    "openvino": openvino,
}


# ------------------------------------------------------------------------------------------------- rounding


def weight() -> Tensor:
    """(GROUP, GROUP) float32, one group a row: 10 in the first row, -10 in the second, 10 and -9.9 in the third."""
    torch.manual_seed(0)
    numbers = torch.randn(GROUP, GROUP)
    numbers[0, 0], numbers[1, 0] = 10.0, -10.0
    numbers[2, 0], numbers[2, 1] = 10.0, -9.9
    return numbers


def by_sdnq() -> Tensor:
    from sdnq.quantizer import sdnq_quantize_layer_weight

    decode, parts = sdnq_quantize_layer_weight(
        weight(), layer_class_name="Linear", weights_dtype="int4", group_size=GROUP, torch_dtype=torch.float32
    )
    return decode(**{key: value for key, value in parts.items() if value is not None}, skip_compile=True)


def by_modelopt() -> Tensor:
    from modelopt.torch.quantization.qtensor import INT4QTensor

    codes, scale, *_ = INT4QTensor.quantize(weight(), GROUP)
    return codes.dequantize(dtype=torch.float32, scale=scale, block_sizes={-1: GROUP})


def by_torchao() -> Tensor:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layer = nn.Sequential(nn.Linear(GROUP, GROUP, bias=False))
    layer[0].weight.data = weight()
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))
    found: Any = layer[0].weight
    return found.dequantize()


def by_auto_round() -> Tensor:
    from auto_round.algorithms.transforms.svdquant.residual import ResidualQuantScheme, rtn_qdq_residual

    return rtn_qdq_residual(
        weight(), ResidualQuantScheme(data_type="int", bits=4, group_size=GROUP, sym=True)
    )


def by_gguf() -> Tensor:
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import dequantize, quantize

    return torch.from_numpy(dequantize(quantize(weight().numpy(), Kind.Q4_0), Kind.Q4_0))


def by_cache_dit() -> Tensor:
    from cache_dit.quantization.svdquant import quantizer

    exact = {"math_dtype": torch.float32, "torch_dtype": torch.float32}
    return quantizer._fake_quantize_dequantize_residual(weight(), precision="int4", **exact)


ROUNDS: dict[str, Callable[[], Tensor]] = {
    "sdnq": by_sdnq,
    "nvidia-modelopt": by_modelopt,
    "cache-dit": by_cache_dit,
    "torchao": by_torchao,
    "auto-round": by_auto_round,
    "gguf": by_gguf,
}


def main(verb: str, name: str, *folder: str) -> None:
    if verb == "save":
        SAVES[name](Path(*folder))
    else:
        found = ROUNDS[name]().float()
        print(json.dumps([round(float(found[place]), 2) for place in ((0, 0), (1, 0), (2, 1))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
