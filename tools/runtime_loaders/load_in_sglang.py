# pyright: reportMissingImports=false
"""SGLang's own models and loader of Nunchaku files, on one file.

    python load_in_sglang.py FAMILY FILE.safetensors

Precision and rank come from the file's name, as SGLang takes them. Replaced are the check of the GPU, the server's
arguments, and the package `nunchaku`, which is on no package index: of its modules only the parameters are made, as
docs/formats/nunchaku.md has them. NUNCHAKU=FOLDER names a checkout of it to be used instead. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn


class SVDQW4A4Linear(nn.Module):
    """The parameters of Nunchaku's W4A4 linear."""

    def __init__(self, linear: nn.Linear, *, precision: str, rank: int, act_unsigned: bool) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        group, scales = (16, torch.float8_e4m3fn) if precision == "nvfp4" else (64, torch.bfloat16)
        shapes = {
            "qweight": ((rows, columns // 2), torch.int8),
            "wscales": ((columns // group, rows), scales),
            "smooth_factor": ((columns,), torch.bfloat16),
            "smooth_factor_orig": ((columns,), torch.bfloat16),
            "proj_down": ((columns, rank), torch.bfloat16),
            "proj_up": ((rows, rank), torch.bfloat16),
        }
        if linear.bias is not None:
            shapes["bias"] = ((rows,), torch.bfloat16)
        if precision == "nvfp4":
            shapes["wcscales"] = ((rows,), torch.bfloat16)
            self.wtscale: Any = 1.0
        for name, (shape, dtype) in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device=linear.weight.device)
            setattr(self, name, nn.Parameter(empty, requires_grad=False))
        self.precision, self.act_unsigned = precision, act_unsigned


class NunchakuFeedForward(nn.Module):
    """A feed-forward network whose linears are W4A4."""

    def __init__(self, network: nn.Module, **kinds: Any) -> None:
        super().__init__()
        self.net: Any = network.net
        for name, linear in list(self.net.named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(self.net.get_submodule(parent), own, SVDQW4A4Linear(linear, **kinds))


def install_nunchaku() -> None:
    if folder := os.environ.get("NUNCHAKU"):
        sys.path.insert(0, folder)
        for name in ("nunchaku._C", "nunchaku._C.ops"):
            sys.modules[name] = MagicMock(__path__=[])
        return
    contents = {
        "nunchaku": {},
        "nunchaku.models": {},
        "nunchaku.models.linear": {"SVDQW4A4Linear": SVDQW4A4Linear},
        "nunchaku.models.attention": {"NunchakuFeedForward": NunchakuFeedForward},
        "nunchaku.models.normalization": dict.fromkeys(
            ("NunchakuAdaLayerNormZero", "NunchakuAdaLayerNormZeroSingle"), lambda norm, **_: norm
        ),
        "nunchaku.ops": {},
        "nunchaku.ops.gemm": {"svdq_gemm_w4a4_cuda": None},
        "nunchaku.ops.gemv": {"awq_gemv_w4a16_cuda": None},
        "nunchaku.ops.quantize": {"svdq_quantize_w4a4_act_fuse_lora_cuda": None},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        for key, value in values.items():
            setattr(module, key, value)
        sys.modules[name] = module


def without_image_processors() -> None:
    """SGLang registers image processors of language models, for which transformers wants torchvision."""
    from transformers.utils import import_utils

    plain = import_utils.DummyObject.__getattribute__
    import_utils.DummyObject.__getattribute__ = lambda cls, key: (
        (lambda *_, **__: None) if key == "register" else plain(cls, key)
    )


def main(family: str, file: str) -> dict[str, object]:
    without_image_processors()
    install_nunchaku()
    from safetensors import safe_open
    from safetensors.torch import load_file
    from sglang.multimodal_gen.configs.quantization.nunchaku import NunchakuSVDQuantArgs
    from sglang.multimodal_gen.runtime import server_args
    from sglang.multimodal_gen.runtime.distributed import parallel_state
    from sglang.multimodal_gen.runtime.loader import fsdp_load
    from sglang.multimodal_gen.runtime.loader.transformer_load_utils import _NunchakuQuantAdapter

    model_class, config = parts_of(family)
    NunchakuSVDQuantArgs._validate = lambda self: None
    quantization = (
        NunchakuSVDQuantArgs(transformer_weights_path=file).resolve_runtime_config().nunchaku_config
    )
    if quantization is None:
        return {"loads": False, "said": "not taken for a 4-bit file: its name says no precision and rank"}
    with safe_open(file, "pt") as opened:
        sizes = json.loads(opened.metadata()["config"])
    # a served pipeline's config names these sizes as SGLang does; a small model's has to be told
    renamed = {"n_heads": "num_attention_heads", "n_layers": "num_layers"} if family == "z-image" else {}
    told = {renamed.get(key, key): value for key, value in sizes.items() if not key.startswith("_")}
    config.update_model_arch({**told, "out_channels": told.get("out_channels") or told["in_channels"]})
    ones = dict.fromkeys(
        ("kv_gather_degree", "ulysses_degree", "ring_degree", "sp_degree", "tp_size", "num_gpus"), 1
    )
    server_args.set_global_server_args(MagicMock(attention_backend="torch_sdpa", **ones))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29591", "RANK": "0", "LOCAL_RANK": "0"}
    parallel_state.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=1)
    adapter = _NunchakuQuantAdapter(
        nunchaku_config=quantization, model_cls=model_class, safetensors_list=[file]
    )
    try:
        adapter.prepare()
        model = fsdp_load.maybe_load_fsdp_model(
            model_class,
            {"config": config, "hf_config": sizes, "quant_config": quantization},
            [file],
            torch.device("cpu"),
            hsdp_replicate_dim=1,
            hsdp_shard_dim=1,
            param_dtype=None,  # type: ignore[arg-type]
            reduce_dtype=torch.float32,
            strict=False,
        )
    except Exception as error:
        return {"loads": False, "said": f"{type(error).__name__}: {error}"}
    for hook in adapter.get_post_load_hooks():
        hook(model)
    return {"loads": True, "lost": lost_tensors(model, load_file(file))}


def lost_tensors(model: nn.Module, stored: dict[str, torch.Tensor]) -> list[str]:
    """Names in the file whose numbers are not in the model."""
    lost: list[str] = []
    for name, tensor in stored.items():
        module, _, own = name.rpartition(".")
        try:
            found: Any = getattr(model.get_submodule(module), own)
        except AttributeError:
            lost.append(name)
            continue
        if not torch.equal(torch.as_tensor(found).double().reshape(-1), tensor.double().reshape(-1)):
            lost.append(name)
    return lost


def parts_of(family: str) -> tuple[Any, Any]:
    """SGLang's model class and config of a family."""
    match family:
        case "z-image":
            from sglang.multimodal_gen.configs.models.dits.zimage import ZImageDitConfig
            from sglang.multimodal_gen.runtime.models.dits.zimage import ZImageTransformer2DModel

            return ZImageTransformer2DModel, ZImageDitConfig()
        case "qwen-image":
            from sglang.multimodal_gen.configs.models.dits.qwenimage import QwenImageDitConfig
            from sglang.multimodal_gen.runtime.models.dits.qwen_image import QwenImageTransformer2DModel

            return QwenImageTransformer2DModel, QwenImageDitConfig()
        case _:
            from sglang.multimodal_gen.configs.models.dits.flux import FluxConfig
            from sglang.multimodal_gen.runtime.models.dits.flux import FluxTransformer2DModel

            return FluxTransformer2DModel, FluxConfig()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
