# pyright: reportMissingImports=false
"""Files in a checkout of ComfyUI: its own loader, one call of the model, and what its nodes do next, on a CPU.

    PYTHONPATH=CHECKOUT python load_in_comfyui.py JOB.json [OPTION OF COMFYUI ...]

JOB holds "inputs" (a safetensors file: `x`, `sigma`, and the conditioning by the names of ComfyUI's model), "numbers"
(more conditioning) and "steps". A step has a "name", a "file", and where wanted: "dtype" (as UNETLoader's
`weight_dtype`), "lora" (a file, at strength 1; with "bypass", by the
node that adds its products to outputs), "merge" (a second model's file, half and half), "save" (where ModelSave
writes) and "out" (where the output goes). Prints JSON: the version, and what became of every step.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import logging
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

MOST_SAID = 400


class _Absent(types.ModuleType):
    """A package that ComfyUI imports and a model needs nothing of: of its attributes, all are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that can't be imported, as torchvision without the CUDA that it was built for."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object, target: object = None) -> Any:
        if fullname.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


class _Warnings(logging.Handler):
    """What ComfyUI logs of a load, "unet missing" and "unet unexpected" among it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        marks = ("missing", "unexpected", "left over", "NOT LOADED", "ERROR")
        if record.levelno >= logging.WARNING or any(mark in line for mark in marks):
            self.lines.append(line[:MOST_SAID])


def main(job: dict[str, Any], options: list[str]) -> dict[str, Any]:
    import transformers  # noqa: F401 # asks which packages there are before some are stubbed

    unusable: set[str] = set()
    for name in ("torchvision", "torchaudio"):
        try:
            importlib.import_module(name)
        except Exception:
            unusable.add(name)
            for module in [each for each in sys.modules if each.partition(".")[0] == name]:
                del sys.modules[module]
    sys.meta_path.insert(0, _Stubs(unusable))
    sys.argv = ["main.py", "--cpu", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfyui_version
    import torch
    from comfy.quant_ops import QUANT_ALGOS

    with torch.inference_mode():
        steps = {step["name"]: run(step, job) for step in job["steps"]}
    return {
        "version": comfyui_version.__version__,
        "kitchen": importlib.metadata.version("comfy-kitchen"),
        "formats": sorted(QUANT_ALGOS),
        "steps": steps,
    }


def run(step: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """One step: what was loaded, or the error that stopped it."""
    import comfy.model_management

    said = _Warnings()
    logger = logging.getLogger()
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        found = {"loads": True, **loaded(step, job)}
    except Exception as error:
        found = {"loads": False, "said": f"{type(error).__name__}: {error}"[:MOST_SAID]}
    finally:
        logger.removeHandler(said)
        comfy.model_management.unload_all_models()
        gc.collect()
    return {**found, "log": said.lines}


def loaded(step: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import load_file, save_file

    options = {"dtype": getattr(torch, step["dtype"])} if "dtype" in step else {}
    patcher = comfy.sd.load_diffusion_model(step["file"], model_options=options)
    model = patcher.model
    layouts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for module in model.diffusion_model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            layouts[getattr(weight, "_layout_cls", "16 bits")] += 1
            dtypes[str(weight.dtype).removeprefix("torch.")] += 1
    if "lora" in step:
        lora = comfy.utils.load_torch_file(step["lora"], safe_load=True)
        add = comfy.sd.load_bypass_lora_for_models if "bypass" in step else comfy.sd.load_lora_for_models
        patcher, _ = add(patcher, None, lora, 1.0, 0.0)
    if "merge" in step:
        other = comfy.sd.load_diffusion_model(step["merge"])
        patches = other.get_key_patches("diffusion_model.")
        patcher = patcher.clone()
        for key, patch in patches.items():
            patcher.add_patches({key: patch}, 0.5, 0.5)
    comfy.model_management.load_models_gpu([patcher])
    patcher.inject_model()  # as samplers do
    if "out" in step:
        given = load_file(job["inputs"])
        x, sigma = given.pop("x"), given.pop("sigma")
        context = given.pop("context")
        denoised = patcher.model.apply_model(x, sigma, c_crossattn=context, **given, **job["numbers"])
        save_file({"denoised": denoised.float().contiguous()}, step["out"])
    if "save" in step:
        comfy.sd.save_checkpoint(step["save"], patcher)
    return {
        "model": type(model).__name__,
        "computes": str(model.get_dtype_inference()).removeprefix("torch."),
        "layouts": dict(layouts),
        "dtypes": dict(dtypes),
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:])
    print(json.dumps(result))
