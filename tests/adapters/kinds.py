"""Adapters of every kind that peft and LyCORIS make, trained on nothing: random numbers in the libraries' own modules,
saved by the libraries, and what the libraries' own forward computes with them.

The forward is the authority: lycoris-lora 4.1.3 merges LoHa and LoKr with alpha / rank applied twice.
"""

# The annotations of peft and lycoris are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.tlora import TLoraModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

logging.getLogger("LyCORIS").setLevel(logging.ERROR)

RANK = 4
ALPHA = 6  # not the rank, so that a forgotten scale is seen


@dataclass(frozen=True, slots=True, eq=False)
class TrainedLayer:
    """An input of a layer, and what the library makes of it without the adapter and with it."""

    x: Tensor
    before: Tensor
    after: Tensor

    def as_rows(self) -> TrainedLayer:
        """A convolution's pixels as the rows that a linear layer reads."""
        if self.x.ndim == 2:
            return self
        rows = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (self.x, self.before, self.after))
        return TrainedLayer(*rows)

    def error(self, before: Tensor, after: Tensor) -> float:
        """Of another model's change from `before` to `after`, relative to the library's."""
        change = self.after - self.before
        return float((after - before - change).norm() / change.norm())


@dataclass(frozen=True, slots=True, eq=False)
class TrainedAdapter:
    path: Path
    layers: Mapping[str, TrainedLayer]


# --------------------------------------------------------------------------------------------------- kinds

PeftKind = Callable[[Sequence[str]], PeftConfig]


def _lora(**said: Any) -> PeftKind:
    return lambda layers: LoraConfig(
        **{"r": RANK, "lora_alpha": ALPHA, "target_modules": list(layers), **said}
    )


def _loha(**said: Any) -> PeftKind:
    return lambda layers: LoHaConfig(**{"r": RANK, "alpha": ALPHA, "target_modules": list(layers), **said})


def _lokr(**said: Any) -> PeftKind:
    return lambda layers: LoKrConfig(**{"r": RANK, "alpha": ALPHA, "target_modules": list(layers), **said})


# Patterns that are regular expressions, one that is a name, one that only a whole name's beginning fits
_PATTERNS = {r"to_[qk]": 16, r"^proj_i.": 9, "net.2": 3, r".*\.to_out\.\d+": 12, "never": 100}
PEFT: dict[str, PeftKind] = {
    "LoRA": _lora(),
    "rsLoRA": _lora(use_rslora=True),
    "DoRA": _lora(use_dora=True),
    "DoRA, rsLoRA": _lora(use_dora=True, use_rslora=True),
    "LoRA with patterns": _lora(alpha_pattern=_PATTERNS, rank_pattern={"to_.": 8, "proj_in": 2}),
    "LoRA, gaussian": _lora(init_lora_weights="gaussian"),
    "LoHa": _loha(),
    "LoHa with patterns": _loha(alpha_pattern=_PATTERNS, rank_pattern={"to_.": 8, "proj_in": 2}),
    "LoKr": _lokr(),
    "LoKr, both factored": _lokr(r=2, decompose_both=True),
    "LoKr, whole": _lokr(r=64, alpha=200),
    "LoKr, whole with patterns": _lokr(
        r=64, alpha_pattern=_PATTERNS, rank_pattern={"to_.": 80, "proj_in": 90}
    ),
}
PEFT_WITH_BIAS: dict[str, PeftKind] = {"LoRA with bias": _lora(lora_bias=True)}
PEFT_LINEAR: dict[str, PeftKind] = {
    "LoRA, orthogonal": _lora(init_lora_weights="orthogonal"),
    "LoRA, MiCA": _lora(init_lora_weights="mica"),
    "LoRA, EVA": _lora(init_lora_weights="eva"),
}
PEFT_CHANGES_BASE: dict[str, PeftKind] = {
    "PiSSA": _lora(init_lora_weights="pissa"),
    "PiSSA, DoRA": _lora(init_lora_weights="pissa", use_dora=True),
    "OLoRA": _lora(init_lora_weights="olora"),
}

LyCORISKind = tuple[type[nn.Module], Mapping[str, Any]]
_COLUMNS = {"weight_decompose": True, "wd_on_out": False}
LYCORIS: dict[str, LyCORISKind] = {
    "LoCon": (LoConModule, {}),
    "LoCon, rs_lora": (LoConModule, {"rs_lora": True}),
    "LoCon, scalar": (LoConModule, {"use_scalar": True}),
    "DoRA by rows": (LoConModule, {"weight_decompose": True}),
    "DoRA by columns": (LoConModule, _COLUMNS),
    "LoHa": (LohaModule, {}),
    "LoHa, rs_lora": (LohaModule, {"rs_lora": True}),
    "LoHa, scalar": (LohaModule, {"use_scalar": True}),
    "LoHa, DoRA by rows": (LohaModule, {"weight_decompose": True}),
    "LoHa, DoRA by columns": (LohaModule, _COLUMNS),
    "LoKr": (LokrModule, {}),
    "LoKr, rs_lora": (LokrModule, {"rs_lora": True}),
    "LoKr, both factored": (LokrModule, {"decompose_both": True, "lora_dim": 2}),
    "LoKr, whole": (LokrModule, {"full_matrix": True}),
    "LoKr, factor 4": (LokrModule, {"factor": 4}),
    "LoKr, unbalanced": (LokrModule, {"unbalanced_factorization": True}),
    "LoKr, DoRA by rows": (LokrModule, {"weight_decompose": True}),
    "LoKr, DoRA by columns": (LokrModule, _COLUMNS),
    "full": (FullModule, {}),
}
# Of convolutions with kernels above 1x1 alone
LYCORIS_TUCKER: dict[str, LyCORISKind] = {
    "LoCon, Tucker": (LoConModule, {"use_tucker": True}),
    "LoCon, Tucker, DoRA by rows": (LoConModule, {"use_tucker": True, "weight_decompose": True}),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}),
    "LoKr, Tucker": (LokrModule, {"use_tucker": True}),
    "LoKr, Tucker, both factored": (
        LokrModule,
        {"use_tucker": True, "decompose_both": True, "lora_dim": 2},
    ),
}
# By what svdq calls them
LYCORIS_REFUSED: dict[str, tuple[type[nn.Module], Mapping[str, Any], str]] = {
    "OFT": (DiagOFTModule, {"lora_dim": 8}, "OFT or BOFT"),
    "OFT, rescaled": (DiagOFTModule, {"lora_dim": 8, "rescaled": True}, "OFT or BOFT"),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 8}, "OFT or BOFT"),
    "GLoRA": (GLoRAModule, {}, "GLoRA"),
    "(IA)^3": (IA3Module, {}, "(IA)^3"),
    "T-LoRA": (TLoraModule, {}, "T-LoRA"),
    "LoKr, whole, rs_lora": (LokrModule, {"full_matrix": True, "rs_lora": True, "lora_dim": 8}, "rs_lora"),
}


# --------------------------------------------------------------------------------------------------- making


def skeleton(state: Mapping[str, Tensor], layers: Sequence[str]) -> nn.Module:
    """Only these layers of a model, with its weights in float32, under their names."""
    root = nn.Module()
    for name in layers:
        weight = state[f"{name}.weight"].float()
        bias = state.get(f"{name}.bias")
        rows, columns = weight.shape[:2]
        if weight.ndim == 2:
            layer = nn.Linear(columns, rows)
        else:
            # as in every model here: of one input per row (depthwise), or of all
            groups, size = rows if columns == 1 else 1, weight.shape[-1]
            layer = nn.Conv2d(columns * groups, rows, size, padding=size // 2, groups=groups)
        layer.weight.data = weight.clone()
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.float().clone()))
        parent = root
        *above, leaf = name.split(".")
        for part in above:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, layer)
    return root


def train_with_peft(kind: PeftKind, model: nn.Module, layers: Sequence[str], folder: Path) -> TrainedAdapter:
    """`model` is used up."""
    torch.manual_seed(0)
    inputs = _inputs(model, layers)
    adapted: Any = get_peft_model(model, kind(layers))
    _shake({name: p for name, p in adapted.base_model.model.named_parameters() if _is_adapter_s(name)})
    adapted.eval()
    adapted.save_pretrained(folder)
    return TrainedAdapter(folder, {name: _run(adapted.base_model.model, name, inputs) for name in layers})


def train_with_lycoris(
    kind: LyCORISKind, model: nn.Module, layers: Sequence[str], file: Path
) -> TrainedAdapter:
    """`model` is used up."""
    torch.manual_seed(0)
    cls, said = kind
    inputs = _inputs(model, layers)
    tensors: dict[str, Tensor] = {}
    outputs: dict[str, TrainedLayer] = {}
    for name in layers:
        flat = f"lycoris_{name.replace('.', '_')}"
        module: Any = cls(flat, model.get_submodule(name), **{"lora_dim": RANK, "alpha": ALPHA, **said})
        module.apply_to()
        _shake(dict(module.named_parameters()))
        module.eval()
        outputs[name] = _run(model, name, inputs)
        tensors |= {f"{flat}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return TrainedAdapter(file, outputs)


def _is_adapter_s(name: str) -> bool:
    return any(part.startswith(("lora_", "hada_", "lokr_")) for part in name.split("."))


def _shake(parameters: Mapping[str, nn.Parameter]) -> None:
    """Other numbers, of a size that the change is seen beside the weight and does not drown it."""
    for name, parameter in parameters.items():
        size = float(parameter.detach().abs().mean())
        # a Kronecker product of two whole matrices has no ranks to add up
        least = 0.25 if re.search(r"\blokr_w[12]\b", name) else 0.05
        parameter.data += (0.3 * size + least) * torch.randn_like(parameter)


@torch.no_grad()
def _run(model: nn.Module, name: str, inputs: Mapping[str, tuple[Tensor, Tensor]]) -> TrainedLayer:
    x, before = inputs[name]
    return TrainedLayer(x, before, model.get_submodule(name).forward(x).detach())


@torch.no_grad()
def _inputs(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random inputs, and what the layers make of them as they are."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in layers:
        layer: Any = model.get_submodule(name)
        is_linear = isinstance(layer, nn.Linear)
        x = torch.randn(4, layer.in_features) if is_linear else torch.randn(2, layer.in_channels, 3, 3)
        found[name] = x, layer(x)
    return found
