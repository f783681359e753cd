"""Calibrated quantization by svdq's peers, each by its own library, on the same layers and rows: what
`tools.bench_calibrated` runs in the peers' environments, one process a peer.

    python -m tools.calibrated_methods PEER INPUT OUTPUT PRECISION...

INPUT holds SOURCE.safetensors (weights NAME.weight (N, K), calibration rows INPUT.rows (M, K)) and SOURCE.json (the
inputs and who reads them) of every source. OUTPUT gets PEER.json, a list of what each method took, and of each the
layers as a file would hold them (PEER-INDEX.safetensors: NAME.weight in smoothed coordinates, NAME.smooth, NAME.up, and
NAME.down for the raw input). A method that raises is an entry that says why.
"""

# The peers are in environments of their own.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.peer_methods import GROUP, RANK, SEED, Taken

STORED = torch.bfloat16
ROWS_A_CALL = 512


@dataclass(frozen=True)
class Problem:
    """Layers that read one input, and the calibration rows of it."""

    source: str
    name: str
    branches: Sequence[Sequence[str]]  # layers whose down projection is one
    weights: Mapping[str, Tensor]  # (N, K) float32
    rows: Tensor  # (M, K) float32

    @property
    def own(self) -> list[list[str]]:
        """Branches where every layer has one of its own."""
        return [[name] for name in self.weights]

    @property
    def calls(self) -> list[Tensor]:
        """The rows as so many inputs of a call."""
        return list(self.rows.split(ROWS_A_CALL))


@dataclass(frozen=True)
class Layer:
    """y = qa(x / smooth) . weight^T + (x . down^T) . up^T, as a file would hold it."""

    weight: Tensor  # (N, K), dequantized
    smooth: Tensor  # (K,)
    up: Tensor  # (N, R)
    down: Tensor  # (R, K)


@dataclass(frozen=True)
class Method:
    """`solve` makes the layers of one input."""

    name: str
    precision: str
    solve: Callable[[Problem], Mapping[str, Layer]]


def layer(weight: Tensor, smooth: Tensor, up: Tensor, down: Tensor) -> Layer:
    """`down` (R, K) reads the smoothed input; files hold one that reads the raw input."""
    stored = smooth.to(STORED)
    return Layer(weight, stored, up.to(STORED), (down.float() / stored.float()).to(STORED))


class Remembered:
    """Results that several methods share: computed once, and the processor seconds are owed by each that asks."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, ...], tuple[Tensor, float]] = {}
        self.owed = 0.0

    def __call__(self, key: tuple[str, ...], make: Callable[[], Tensor]) -> Tensor:
        """The result for `key`, of any shape."""
        if key in self.results:
            self.owed += self.results[key][1]
        else:
            started = time.process_time()
            result = make()
            self.results[key] = (result, time.process_time() - started)
        return self.results[key][0]


remembered = Remembered()


class Readers(nn.Module):
    """Layers of one input as a model: its output is theirs, side by side."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights.values():
            linear = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=dtype)
            linear.weight.data = weight.to(dtype, copy=True)
            self.layers.append(linear)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([each(x) for each in self.layers], -1)


# ------------------------------------------------------------------------------------------------- peers


def svdq() -> Iterator[Method]:
    """This project's own solver, layer by layer; the step `output` needs the model and is left out."""
    from svdq_cli.recipe.schema import Quantization
    from svdq_cli.records import ActivationStats, Int4, Linear, NvFp4, SharedInput, SolveSettings, W4A4Plan
    from svdq_cli.solve.forward import LinearWeights, dequantized_weight
    from svdq_cli.solve.linear import solve_input

    def solve(problem: Problem, precision: Int4 | NvFp4, effort: str, own: bool) -> dict[str, Layer]:
        recipe = Quantization.model_validate({"effort": effort})
        settings = SolveSettings(
            recipe.chosen_smoothing, SEED, STORED, recipe.chosen_search, recipe.refinements
        )
        x = problem.rows
        stats = ActivationStats(problem.name, x.abs().amax(0), x.square().mean(0), x.bfloat16(), len(x))
        plans = {
            name: W4A4Plan(Linear(name, weight.shape[1], len(weight), False), precision, RANK)
            for name, weight in problem.weights.items()
        }
        branches = tuple(tuple(each) for each in (problem.own if own else problem.branches))
        shared = SharedInput(problem.name, tuple(plans), branches)
        weights = {name: LinearWeights(weight, None) for name, weight in problem.weights.items()}
        return {
            each.plan.name: Layer(dequantized_weight(each), each.smooth, each.up, each.down)
            for each in solve_input(shared, plans, weights, stats, settings).w4a4
        }

    for precision in (Int4(), NvFp4()):
        for effort in ("fast", "balanced"):
            for own in (False, True):
                yield Method(
                    f"{effort}{_branches(own)}",
                    precision.name,
                    lambda problem, p=precision, effort=effort, own=own: solve(problem, p, effort, own),
                )


def _branches(own: bool) -> str:
    return ", own branches" if own else ""


def deepcompressor() -> Iterator[Method]:
    """The paper's own tool, with the numbers of its `svdquant` configurations: smoothing by its grid of 39 with the
    branch in the loop, the branch fitted for up to 100 rounds while the layers' output gains, then nearest or its GPTQ.

    Its only compiled function, which it builds with CUDA when it is imported, rounds to a list of values (nvfp4): here
    in torch.
    """
    stub: Any = types.ModuleType("deepcompressor.csrc.load")
    stub._C = types.SimpleNamespace(round_to_nearest_in_codebook_cuda=_nearest)
    sys.modules[stub.__name__] = stub
    from deepcompressor.calib import config as own_config
    from deepcompressor.calib.config.search import SearchBasedCalibStrategy
    from deepcompressor.calib.config.smooth import SmoothSpanMode
    from deepcompressor.calib.lowrank import QuantLowRankCalibrator
    from deepcompressor.calib.smooth import smooth_linear_modules
    from deepcompressor.data.cache import TensorCache, TensorsCache
    from deepcompressor.data.dtype import QuantDataType
    from deepcompressor.data.utils.reshape import LinearReshapeFn
    from deepcompressor.quantizer import Quantizer
    from deepcompressor.quantizer.config import QuantizerConfig
    from deepcompressor.quantizer.kernel import QuantGptqConfig

    int4 = {"dtype": QuantDataType.from_str("sint4"), "zero_point": None}
    e2m1 = {"dtype": QuantDataType.from_str("sfp4_e2m1_all"), "zero_point": None}
    e4m3 = QuantDataType.from_str("sfp8_e4m3_nan")
    formats = {
        "int4": (
            QuantizerConfig(**int4, group_shapes=((1, 64),), scale_dtypes=(None,)),
            QuantizerConfig(**int4, group_shapes=((1, 64),), scale_dtypes=(None,)),
        ),
        "nvfp4": (
            QuantizerConfig(**e2m1, group_shapes=((-1, -1), (1, 16)), scale_dtypes=(None, e4m3)),
            QuantizerConfig(**e2m1, group_shapes=((1, 16),), scale_dtypes=(e4m3,)),
        ),
    }
    span = SmoothSpanMode.AbsMax
    smoothing = own_config.SmoothCalibConfig(
        strategy=SearchBasedCalibStrategy.GridSearch,
        spans=[(span, span)],
        alpha=0.5,
        beta=-2,
        num_grids=20,
        allow_low_rank=True,
        fuse_when_possible=False,
    )
    gptq = QuantGptqConfig(damp_percentage=0.01, block_size=128, num_inv_tries=250, hessian_block_size=512)

    def cache(x: Tensor) -> Any:
        parts = list(x.split(ROWS_A_CALL))
        count = {"num_cached": len(parts), "num_total": len(parts), "num_samples": len(parts)}
        return TensorsCache(TensorCache(parts, channels_dim=-1, reshape=LinearReshapeFn(), **count))

    def solve(problem: Problem, precision: str, own: bool, kernel: Any) -> dict[str, Layer]:
        of_weights, of_inputs = formats[precision]
        branch = own_config.QuantLowRankCalibConfig(
            rank=RANK, exclusive=own, early_stop=True, num_iters=100, degree=2
        )
        weights = Quantizer(of_weights, low_rank=branch, default_dtype=STORED)
        inputs = Quantizer(of_inputs, channels_dim=-1, default_dtype=STORED)
        model = Readers(problem.weights)

        def search() -> Tensor:
            return smooth_linear_modules(
                None,
                list(model.layers),
                scale=None,
                config=smoothing,
                weight_quantizer=weights,
                input_quantizer=inputs,
                inputs=cache(problem.rows),
                eval_inputs=cache(problem.rows),
                eval_module=model,
            )

        smooth = remembered((problem.source, problem.name, precision), search)
        smoothed = cache(problem.rows / smooth)
        scaled = {name: weight * smooth for name, weight in problem.weights.items()}
        found: dict[str, Layer] = {}
        for names in problem.own if own else problem.branches:
            part = Readers({name: scaled[name] for name in names})
            split = QuantLowRankCalibrator(branch, weights, inputs).calibrate(
                x_wgts=[each.weight for each in part.layers],
                x_acts=smoothed,
                x_mods=list(part.layers),
                eval_inputs=smoothed,
                eval_module=part,
            )
            down, ups = split.a.weight, split.b.weight.split([len(scaled[name]) for name in names])
            for name, up in zip(names, ups, strict=True):
                rest = scaled[name] - up.to(STORED).float() @ down.to(STORED).float()
                four_bit = weights.quantize(rest, kernel=kernel, inputs=smoothed.front() if kernel else None)
                found[name] = layer(four_bit.data, smooth, up, down)
        return found

    for precision in formats:
        for name, kernel in (("svdquant", None), ("svdquant, GPTQ", gptq)):
            for own in (False, True):
                yield Method(
                    f"{name}{_branches(own)}",
                    precision,
                    lambda problem, p=precision, own=own, kernel=kernel: solve(problem, p, own, kernel),
                )


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """Each of `x` (any shape) as the nearest of `values` (V,), which ascend."""
    return values[torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2)]


def modelopt() -> Iterator[Method]:
    """Its AWQ smoothing, layer by layer and for the weights' rounding alone, and the SVD. Its quantizers for
    activations, and nvfp4 throughout, want CUDA."""
    import modelopt.torch.quantization as own

    def chosen(precision: str) -> dict[str, Any]:
        if precision == "nvfp4":
            return own.NVFP4_SVDQUANT_DEFAULT_CFG
        weights = {"num_bits": 4, "block_sizes": {-1: GROUP["int4"]}}
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": weights},
            ],
            "algorithm": {"method": "svdquant", "lowrank": RANK},
        }

    def solve(problem: Problem, precision: str) -> dict[str, Layer]:
        model: Any = Readers(problem.weights)
        own.quantize(model, chosen(precision), lambda each: [each(x) for x in problem.calls])
        found: dict[str, Layer] = {}
        for name, linear in zip(problem.weights, model.layers, strict=True):
            factor = getattr(linear.input_quantizer, "_pre_quant_scale", None)
            smooth = torch.ones(linear.in_features) if factor is None else 1 / factor.float()
            rounder = linear.weight_quantizer
            found[name] = layer(
                rounder(linear.weight), smooth, rounder.svdquant_lora_b, rounder.svdquant_lora_a
            )
        return found

    for precision in GROUP:
        yield Method("SVDQuant, own branches", precision, lambda problem, p=precision: solve(problem, p))


def auto_round() -> Iterator[Method]:
    """Its smoothing search and its branch, fitted in turns with the codes, and then rounding to nearest (`iters` 0)."""
    from auto_round.algorithms.transforms.svdquant.apply import (
        CapturedEvaluation,
        SmoothGroupCalibration,
        SVDQuantTransform,
    )
    from auto_round.algorithms.transforms.svdquant.config import SVDQuantConfig
    from auto_round.algorithms.transforms.svdquant.residual import ResidualQuantScheme, rtn_qdq_residual
    from auto_round.algorithms.transforms.svdquant.smooth_adapters import SmoothSearchGroup

    scheme = {"data_type": "int", "bits": 4, "group_size": GROUP["int4"], "sym": True}

    def solve(problem: Problem, rounds: int) -> dict[str, Layer]:
        found: dict[str, Layer] = {}
        transform: Any = SVDQuantTransform(
            SVDQuantConfig(rank=RANK, smooth_enabled=True, residual_iters=rounds, residual_early_stop=True)
        )
        for names in problem.branches:
            # in bfloat16, as its branch is: of another dtype no candidate runs
            block = Readers({name: problem.weights[name] for name in names}, STORED)
            for linear in block.layers:
                for key, value in scheme.items():
                    setattr(linear, key, value)
                    setattr(linear, f"act_{key}", value)
            group = SmoothSearchGroup(
                problem.name, tuple(names), tuple(block.layers), problem.name, block, problem.name, block
            )
            inputs = [x.to(STORED) for x in problem.calls]
            calls = [CapturedEvaluation((x,), {}, block(x)) for x in inputs]
            seen = SmoothGroupCalibration(group, len(calls), inputs, calls)
            local = {id(each): f"layers.{index}" for index, each in enumerate(block.layers)}
            smooth = transform._search_group_scale(seen, block, local)
            for name, each in zip(
                names, transform._decompose_smoothed_group(seen, smooth, block, local), strict=True
            ):
                rest = each.residual_linear.weight.float()
                four_bit = rtn_qdq_residual(rest, ResidualQuantScheme(**scheme))
                found[name] = layer(four_bit, smooth, each.lora_up.weight, each.lora_down.weight)
        return found

    for rounds in (1, 10):
        yield Method(
            f"svdquant, smooth, residual_iters {rounds}", "int4", lambda problem, n=rounds: solve(problem, n)
        )


def cache_dit() -> Iterator[Method]:
    """What its `svdq_*_ptq` types do before packing, with its own simulation of what the kernel reads."""
    from cache_dit.quantization.svdquant import quantizer as own

    exact = {"math_dtype": torch.bfloat16, "torch_dtype": torch.bfloat16}

    def solve(problem: Problem, precision: str, rounds: int) -> dict[str, Layer]:
        found: dict[str, Layer] = {}
        peaks = problem.rows.abs().amax(0)
        for name, weight in problem.weights.items():
            smooth = own._resolve_svdq_smooth_scale(
                weight.bfloat16(),
                peaks,
                quant_mode="ptq",
                smooth_strategy="activation",
                in_features=weight.shape[1],
                alpha=0.5,
                device=weight.device,
                **exact,
            )
            down, up, rest = own._refine_lowrank_split(
                weight.bfloat16() * smooth,
                RANK,
                refine_iters=rounds,
                precision=precision,
                calibrate_precision="low",
                **exact,
            )
            four_bit = own._fake_quantize_dequantize_residual(rest, precision=precision, **exact)
            found[name] = layer(four_bit, smooth, up, down)
        return found

    for precision in GROUP:
        for rounds in (0, 4):
            yield Method(
                f"ptq, svd_refine_iters {rounds}, own branches",
                precision,
                lambda problem, p=precision, n=rounds: solve(problem, p, n),
            )


def quark() -> Iterator[Method]:
    """Its SVDQuant, which takes its smoothing out again (findings/quark-svdquant-smoothing.sh)."""
    from quark.torch import ModelQuantizer
    from quark.torch.algorithm.svdquant.svdquant import build_quant_layer_config
    from quark.torch.quantization.config.config import QConfig, SVDQuantConfig

    modes = {"int4": "w4a4", "nvfp4": "nvfp4"}

    def solve(problem: Problem, precision: str, gptq: bool) -> dict[str, Layer]:
        how = SVDQuantConfig(svd_rank=RANK, use_gptq=gptq, gptq_group_size=GROUP[precision])
        config = QConfig(global_quant_config=build_quant_layer_config(modes[precision]), algo_config=[how])
        calls: Any = [x.bfloat16() for x in problem.calls]
        model: Any = ModelQuantizer(config).quantize_model(Readers(problem.weights, torch.bfloat16), calls)
        found: dict[str, Layer] = {}
        for name, each in zip(problem.weights, model.layers, strict=True):
            four_bit = each.layer.get_quant_weight(each.layer.weight)
            smooth = torch.ones(each.in_features)
            found[name] = layer(four_bit, smooth, each.correction.l2.weight, each.correction.l1.weight)
        return found

    for precision in GROUP:
        for gptq in (False, True):
            if gptq and precision != "int4":
                continue
            yield Method(
                f"SVDQuant{', GPTQ' if gptq else ''}, own branches",
                precision,
                lambda problem, p=precision, gptq=gptq: solve(problem, p, gptq),
            )


PEERS: dict[str, Callable[[], Iterator[Method]]] = {
    "svdq": svdq,
    "deepcompressor-toolkit": deepcompressor,
    "auto-round": auto_round,
    "cache-dit": cache_dit,
    "nvidia-modelopt": modelopt,
    "amd-quark": quark,
}


# ------------------------------------------------------------------------------------------------- running


def problems_of(path: Path) -> list[Problem]:
    """Those of one source, by its file of tensors."""
    tensors = load_file(path)
    return [
        Problem(
            path.stem,
            each["name"],
            each["branches"],
            {name: tensors[f"{name}.weight"].float() for name in each["layers"]},
            tensors[f"{each['name']}.rows"].float(),
        )
        for each in json.loads(path.with_suffix(".json").read_text())
    ]


def bytes_of(found: Layer, precision: str) -> int:
    """What a file takes for a layer: codes, scales, smoothing factors, branch."""
    rows, width = found.weight.shape
    # a 16-bit scale for 64 inputs, or one in e4m3 for 16 and one in 16 bits for all
    scales = rows * width // GROUP[precision] * (2 if precision == "int4" else 1) + (
        0 if precision == "int4" else 2
    )
    return rows * width // 2 + scales + 2 * (found.smooth.numel() + found.up.numel() + found.down.numel())


def main() -> None:
    peer, inputs, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    # svdq learns smoothing by gradient; the others' modules need none
    torch.set_grad_enabled(peer == "svdq")
    found = version(peer)
    taken: list[Taken] = []
    for method in PEERS[peer]():
        if method.precision not in sys.argv[4:]:
            continue
        for path in sorted(inputs.glob("*.safetensors")):
            entry = Taken(peer, found, method.name, method.precision, path.stem)
            file = output / f"{peer}-{len(taken)}.safetensors"
            try:
                taken.append(_solved(method, problems_of(path), entry, file))
            except Exception as error:  # a peer's fault is a row of the table
                why = " ".join(f"{type(error).__name__}: {error}".split())
                taken.append(Taken(**{**asdict(entry), "why": why}))
    (output / f"{peer}.json").write_text(json.dumps([asdict(each) for each in taken]))


def _solved(method: Method, problems: Sequence[Problem], entry: Taken, file: Path) -> Taken:
    torch.manual_seed(SEED)
    layers: dict[str, Layer] = {}
    started = time.process_time()
    for problem in problems:
        layers |= method.solve(problem)
    seconds = time.process_time() - started + remembered.owed
    remembered.owed = 0.0
    parts = ("weight", "smooth", "up", "down")
    tensors = {
        f"{name}.{part}": getattr(found, part).detach().clone().contiguous()
        for name, found in layers.items()
        for part in parts
    }
    save_file(tensors, file)
    size = sum(bytes_of(found, method.precision) for found in layers.values())
    return Taken(**{**asdict(entry), "seconds": seconds, "bytes": size, "tensors": file.name})


if __name__ == "__main__":
    main()
