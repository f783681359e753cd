"""A process of its own: what diffusers' real nunchaku_lite loader makes of our tensors, as JSON by precision on stdout,
and of a converted pipeline ("card") that is loaded as its model card says.

    python -m tests.formats.loading_in_diffusers FOLDER CONVERTED_PIPELINE

Its own process, because the package called `kernels`, once it is seen, stays seen.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DIFFUSERS_TRUST_REMOTE_KERNELS"] = "true"  # the stand-in comes from this folder, not from the hub

import torch
from torch import Tensor, nn

from svdq_cli.formats import format_named
from svdq_cli.formats.nunchaku_lite import FORMAT
from svdq_cli.records import (
    Int4,
    LayerPlan,
    LayerSolution,
    Linear,
    ModelPlan,
    NvFp4,
    Precision,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.solve.quantizers import QuantizedWeight, dequantize_weight, fake_quantize_activation
from tests.formats import standin_kernels
from tests.formats.solutions import model_plan, random_solution

RANK = 16
# below and above the 16 rows where diffusers changes the W4A16 kernel, and off the tile of 256
ROWS = (1, 17, 257)


def main(folder: Path, pipeline: Path) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    written: dict[str, dict[str, LayerSolution]] = {}
    for precision in (Int4(), NvFp4()):
        (folder / precision.name).mkdir()
        written[precision.name] = write_checkpoint(folder / precision.name, precision)
    standin_kernels.install()
    found = {name: load_and_run(folder / name, solutions) for name, solutions in written.items()}
    return {**found, "card": load_as_the_card_says(pipeline)}


def load_as_the_card_says(folder: Path) -> dict[str, Any]:
    """Runs the first Python of the model card, and the pipeline that it makes."""
    from PIL import Image

    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    os.chdir(folder)
    exec(code, names)
    pipe = names["pipe"]
    (image,) = pipe("a red circle", height=32, width=32, num_inference_steps=1, max_sequence_length=16).images
    assert isinstance(image, Image.Image)
    return {
        "size": image.size,
        "kinds": sorted({type(module).__name__ for module in pipe.transformer.modules()}),
    }


def load_and_run(folder: Path, solutions: dict[str, LayerSolution]) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.quantizers.nunchaku.nunchaku_quantizer import NunchakuLiteQuantizer

    strict = strict_load(folder)
    NunchakuLiteQuantizer.validate_environment = lambda *_, **__: None  # it wants a CUDA device
    loaded: Any = FluxTransformer2DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, output_loading_info=True
    )
    model, info = loaded
    kinds = {name: type(model.get_submodule(name)).__name__ for name in solutions}
    image, in_model = run_model(model, solutions)
    return {
        "strict": strict,
        "loading_info": {key: sorted(map(str, value)) for key, value in info.items()},
        "kinds": kinds,
        "stored_differently": stored_differently(model, folder),
        "model_output_finite": bool(image.isfinite().all()),
        "errors_in_model": in_model,
        "errors_alone": {name: errors_alone(model, name, solution) for name, solution in solutions.items()},
    }


def write_checkpoint(folder: Path, precision: Precision) -> dict[str, LayerSolution]:
    """A tiny FLUX transformer whose block linears are random solutions. Returns them by name."""
    from safetensors.torch import save_file

    from tests.tiny import tiny_flux_transformer

    lite = format_named("nunchaku-lite")
    torch.manual_seed(0)
    source: Any = tiny_flux_transformer()
    source.to(dtype=torch.bfloat16)
    plan = plan_blocks(source, precision)
    solutions = {
        layer.name: random_solution(layer, seed=seed, outer_per_row=seed % 2 == 1)
        for seed, layer in enumerate(plan.layers)
    }
    tensors = {
        key: tensor.contiguous()
        for key, tensor in source.state_dict().items()
        if key.rsplit(".", 1)[0] not in solutions
    }
    for name, solution in solutions.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in lite.encode(solution).items()}
    source.save_config(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = lite.metadata(plan, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return solutions


def plan_blocks(model: nn.Module, precision: Precision) -> ModelPlan:
    """The linears of the blocks: modulations in W4A16, everything else in W4A4."""
    plans: list[LayerPlan] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or "transformer_blocks." not in name:
            continue
        linear = Linear(name, module.in_features, module.out_features, module.bias is not None)
        plan = W4A16Plan(linear) if ".norm" in name else W4A4Plan(linear, precision, RANK)
        assert FORMAT.unsupported_reason(plan) is None
        plans.append(plan)
    return model_plan(*plans)


def strict_load(folder: Path) -> str:
    """diffusers' own replacement of modules, its key check, and torch's strict load: "ok" or what they say."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.quantizers.nunchaku.utils import (
        check_strict_state_dict_match,
        replace_with_nunchaku_linear,
    )
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    model: Any = FluxTransformer2DModel.from_config(config)
    model.to(dtype=torch.bfloat16)
    replaced = replace_with_nunchaku_linear(model, quantization, torch.bfloat16)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    try:
        check_strict_state_dict_match(model, tensors)
        expected = {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()}
        found = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        if expected != found:
            return f"shapes or dtypes differ: {sorted(key for key in found if found[key] != expected[key])}"
        model.load_state_dict(tensors, strict=True, assign=True)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "ok" if replaced == len(targets_of(quantization)) else f"{replaced} modules replaced"


def targets_of(quantization: dict[str, Any]) -> list[str]:
    return quantization["svdq_w4a4"]["targets"] + quantization["awq_w4a16"]["targets"]


def stored_differently(model: nn.Module, folder: Path) -> list[str]:
    """Tensors that the loaded model holds in other bytes than the file."""
    from safetensors.torch import load_file

    tensors, loaded = load_file(folder / "diffusion_pytorch_model.safetensors"), model.state_dict()
    assert tensors.keys() == loaded.keys()

    def raw(tensor: Tensor) -> bytes:
        return tensor.contiguous().view(torch.uint8).numpy().tobytes()

    return [key for key in tensors if raw(tensors[key]) != raw(loaded[key])]


def run_model(model: nn.Module, solutions: dict[str, LayerSolution]) -> tuple[Tensor, dict[str, float]]:
    """One forward pass of the whole model; the error of each layer on what it really received."""
    errors: dict[str, float] = {}

    def compare(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            errors[name] = relative_error(output, formula(solutions[name], inputs[0]))

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(compare(name)) for name in solutions]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    with torch.no_grad():
        (image,) = model(
            hidden_states=normal(1, 16, 16),
            encoder_hidden_states=normal(1, 5, 128),
            pooled_projections=normal(1, 128),
            timestep=torch.tensor([0.5], dtype=torch.bfloat16),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )
    for hook in hooks:
        hook.remove()
    return image, errors


def errors_alone(model: nn.Module, name: str, solution: LayerSolution) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    found: list[float] = []
    for rows in ROWS:
        x = torch.randn(rows, solution.plan.linear.in_features, generator=generator).to(torch.bfloat16)
        with torch.no_grad():
            found.append(relative_error(model.get_submodule(name)(x), formula(solution, x)))
    return found


def formula(solution: LayerSolution, x: Tensor) -> Tensor:
    """What `records` says the layer computes, from the solution alone. float32."""
    if isinstance(solution, W4A16Solution):
        grouped = solution.codes.float().unflatten(1, (-1, 64)) * solution.scales.float().unsqueeze(-1)
        weight = (grouped + solution.zeros.float().unsqueeze(-1)).flatten(1)
        y = x.float() @ weight.T
    else:
        assert isinstance(solution, W4A4Solution)
        precision = solution.plan.precision
        quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
        activation = fake_quantize_activation(x / solution.smooth, precision)
        y = activation @ dequantize_weight(quantized, precision).T
        y = y + x.float() @ solution.down.float().T @ solution.up.float().T
    return y if solution.bias is None else y + solution.bias.float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((found.float() - expected).norm() / expected.norm())


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
