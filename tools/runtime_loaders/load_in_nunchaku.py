# pyright: reportMissingImports=false
"""The loaders of Nunchaku's Python classes, on one file, without its kernels.

    NUNCHAKU=FOLDER python load_in_nunchaku.py FAMILY PRECISION FILE.safetensors

FOLDER is a checkout of nunchaku, which is on no package index. Prints JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any
from unittest.mock import MagicMock

CLASSES = {
    "flux": ("transformers.transformer_flux_v2", "NunchakuFluxTransformer2DModelV2"),
    "qwen-image": ("transformers.transformer_qwenimage", "NunchakuQwenImageTransformer2DModel"),
    "z-image": ("transformers.transformer_zimage", "NunchakuZImageTransformer2DModel"),
    "sdxl": ("unets.unet_sdxl", "NunchakuSDXLUNet2DConditionModel"),
}


def main(family: str, precision: str, file: str) -> dict[str, object]:
    sys.path.insert(0, os.environ["NUNCHAKU"])
    for name in ("nunchaku._C", "nunchaku._C.ops"):
        sys.modules[name] = MagicMock(__path__=[])
    import torch
    from safetensors import safe_open

    module, name = CLASSES[family]
    package: Any = importlib.import_module(f"nunchaku.models.{module}")
    model_class: Any = getattr(package, name)
    package.get_precision = lambda *_, **__: "fp4" if precision == "nvfp4" else precision  # it asks the GPU
    torch.cuda.current_device = lambda: 0
    if family == "qwen-image":
        # its signature hides the sizes from diffusers, so that it is built with the defaults, the released model's
        with safe_open(file, "pt") as opened:
            sizes = {k: v for k, v in json.loads(opened.metadata()["config"]).items() if k[0] != "_"}
        model_class.from_config = classmethod(lambda cls, *_, **__: cls(**sizes))
    try:
        model = model_class.from_pretrained(file, device="cpu")
    except Exception as error:
        return {"loads": False, "said": f"{type(error).__name__}: {error}"[:400]}
    return {"loads": True, "lost": [name for name, p in model.named_parameters() if p.is_meta]}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
