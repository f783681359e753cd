"""bitsandbytes' NF4 layers: 4-bit weights, 16-bit activations. The baseline that most users already have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svdq_cli.errors import EnvironmentLacksError


def require_nf4(device: torch.device) -> None:
    """Raises EnvironmentLacksError where bitsandbytes is missing or does not compute on the device."""
    try:
        layer = nf4_linear(torch.ones(64, 64, dtype=torch.float32), None, dtype=torch.bfloat16).to(device)
        layer(torch.ones(1, 64, device=device, dtype=torch.bfloat16))
    except ModuleNotFoundError as error:
        raise EnvironmentLacksError(
            "NF4 needs the package bitsandbytes", hint="pip install bitsandbytes", where="bitsandbytes"
        ) from error
    except Exception as error:  # its native library raises whatever it meets
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentLacksError(
            f"bitsandbytes can't compute NF4 on {device}: {reason}",
            hint="run on a CUDA GPU, with a bitsandbytes for its CUDA version",
            where="bitsandbytes",
        ) from error


def nf4_linear(weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> nn.Module:
    """A layer that quantizes when it is moved to its device. `weight` (N, K), `bias` (N,); computes in `dtype`."""
    import bitsandbytes  # type: ignore[import-not-found]

    out_features, in_features = weight.shape
    library: Any = bitsandbytes.nn  # whose types do not name `quant_type`
    module = library.Linear4bit(
        in_features, out_features, bias=bias is not None, compute_dtype=dtype, quant_type="nf4", device="cpu"
    )
    module.weight = library.Params4bit(weight.to(dtype).cpu(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return module
