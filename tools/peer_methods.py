"""Data-free low-rank splits of svdq's peers, each by its own library: what `tools.bench_peers` runs in the peers'
environment, one process a peer.

    python tools/peer_methods.py PEER INPUT OUTPUT

INPUT holds SOURCE.safetensors (weights (N, K) float32) and SOURCE.json (lists of layers that read one input) of every
source. OUTPUT gets PEER.json, a list of what each method took, and of each the dequantized weights and branches
(PEER-INDEX.safetensors: NAME.weight, NAME.up, NAME.down). A method that raises is an entry that says why.
"""

# The peers are in an environment of their own.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, SEED = 32, 0
GROUP = {"int4": 64, "nvfp4": 16}
REPEATS = 2
Weights = Mapping[str, Tensor]
Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Layer:
    """One layer as a file would hold it: the 4-bit part dequantized, the branch, and the bytes of both."""

    weight: Tensor  # (N, K)
    up: Tensor  # (N, R)
    down: Tensor  # (R, K)
    bytes: int


@dataclass(frozen=True)
class Method:
    """`solve` is what is timed; `read` makes layers of what it returned."""

    name: str
    precision: str
    solve: Callable[[Weights, Groups], Any]
    read: Callable[[Any], Mapping[str, Layer]]


@dataclass(frozen=True)
class Taken:
    """One method on one source: processor seconds (the least of REPEATS), or why there are none."""

    peer: str
    version: str
    method: str
    precision: str
    source: str
    seconds: float | None = None
    bytes: int | None = None
    tensors: str | None = None
    why: str | None = None


def stored(*tensors: Tensor) -> int:
    """Bytes of tensors as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def svdq(root: str) -> Iterator[Method]:
    """This project's own solver, with what a data-free conversion gives it."""
    sys.path.insert(0, root)
    from svdq_cli.recipe.schema import Quantization
    from svdq_cli.records import Int4, Linear, NvFp4, SharedInput, SolveSettings, W4A4Plan
    from svdq_cli.solve.forward import LinearWeights, dequantized_weight
    from svdq_cli.solve.linear import solve_input

    recipe = Quantization(effort="datafree")

    def solve(weights: Weights, groups: Groups, precision: Int4 | NvFp4, own: bool) -> list[Any]:
        settings = SolveSettings(
            recipe.chosen_smoothing, SEED, torch.bfloat16, recipe.chosen_search, recipe.refinements
        )
        solved: list[Any] = []
        for names in groups:
            plans = {
                name: W4A4Plan(
                    Linear(name, weights[name].shape[1], len(weights[name]), False), precision, RANK
                )
                for name in names
            }
            branches = tuple((name,) for name in names) if own else (tuple(names),)
            sources = {name: LinearWeights(weights[name], None) for name in names}
            shared = SharedInput(names[0], tuple(names), branches)
            solved += solve_input(shared, plans, sources, None, settings).w4a4
        return solved

    def read(solved: list[Any]) -> dict[str, Layer]:
        return {
            each.plan.name: Layer(
                dequantized_weight(each),
                each.up,
                each.down,
                each.codes.numel() // 2
                + stored(each.scales, each.up, each.down)
                + (0 if each.outer is None else stored(each.outer)),
            )
            for each in solved
        }

    for precision in (Int4(), NvFp4()):
        for own in (True, False):
            label = "own branches" if own else "q, k, v share a down"
            yield Method(label, precision.name, lambda w, g, p=precision, own=own: solve(w, g, p, own), read)


def auto_round(_: str) -> Iterator[Method]:
    """Its alternating decomposition, float32, branches in bfloat16."""
    from auto_round.algorithms.transforms.svdquant.residual import (
        ResidualQuantScheme,
        iterate_residual_decomposition,
        rtn_qdq_residual,
    )

    scheme = ResidualQuantScheme(data_type="int", bits=4, group_size=GROUP["int4"], sym=True)

    def solve(weights: Weights, iterations: int) -> dict[str, Any]:
        solved = {}
        for name, weight in weights.items():
            found = iterate_residual_decomposition(
                weight,
                rank=RANK,
                scheme=scheme,
                iterations=iterations,
                early_stop=False,
                residual_dtype=weight.dtype,
                low_rank_dtype=torch.bfloat16,
            )
            solved[name] = (rtn_qdq_residual(found.residual, scheme), found.up, found.down)
        return solved

    def read(solved: dict[str, Any]) -> dict[str, Layer]:
        # its export keeps one 16-bit scale a group
        return {
            name: Layer(weight, up, down, int(weight.numel() * (0.5 + 2 / GROUP["int4"])) + stored(up, down))
            for name, (weight, up, down) in solved.items()
        }

    for iterations in (1, 10):
        yield Method(f"residual_iters {iterations}", "int4", lambda w, _, n=iterations: solve(w, n), read)


def sdnq(_: str) -> Iterator[Method]:
    """Layer by layer; scales in bfloat16 (`dequantize_fp32=False`), as everything else that is compared has them."""
    from sdnq.quantizer import sdnq_quantize_layer_weight

    def solve(weights: Weights, dtype: str) -> dict[str, Any]:
        torch.manual_seed(SEED)
        return {
            name: sdnq_quantize_layer_weight(
                weight,
                layer_class_name="Linear",
                weights_dtype=dtype,
                group_size=GROUP["int4"],
                svd_rank=RANK,
                use_svd=True,
                dequantize_fp32=False,
                torch_dtype=torch.bfloat16,
            )
            for name, weight in weights.items()
        }

    def read(solved: dict[str, Any]) -> dict[str, Layer]:
        layers = {}
        for name, (dequantizer, tensors) in solved.items():
            parts = {key: tensor for key, tensor in tensors.items() if tensor is not None}
            weight = dequantizer(**parts, non_svd=True, skip_compile=True, dtype=torch.float32)
            layers[name] = Layer(weight, parts["svd_up"], parts["svd_down"], stored(*parts.values()))
        return layers

    for dtype in ("int4", "uint4"):
        label = "SVD, zero points" if dtype == "uint4" else "SVD"
        yield Method(label, "int4", lambda w, _, dtype=dtype: solve(w, dtype), read)


def cache_dit(_: str) -> Iterator[Method]:
    """What its `_dq` types do before packing, with its own simulation of what the kernel reads."""
    from cache_dit.quantization.svdquant import quantizer as own

    def solve(weights: Weights, precision: str, rounds: int) -> dict[str, Any]:
        solved = {}
        for name, weight in weights.items():
            down, up, residual = own._refine_lowrank_split(
                weight.bfloat16(),
                RANK,
                refine_iters=rounds,
                precision=precision,
                calibrate_precision="low",
                math_dtype=torch.bfloat16,
                torch_dtype=torch.bfloat16,
            )
            rounded = own._fake_quantize_dequantize_residual(
                residual, precision=precision, math_dtype=torch.bfloat16, torch_dtype=torch.bfloat16
            )
            solved[name] = (rounded, up, down)
        return solved

    def read(solved: dict[str, Any], precision: str) -> dict[str, Layer]:
        # a 16-bit scale for 64 inputs, or one in e4m3 for 16 and one in 16 bits a row
        def scales(weight: Tensor) -> int:
            groups = weight.numel() // GROUP[precision]
            return groups * 2 if precision == "int4" else groups + 2 * len(weight)

        return {
            name: Layer(weight, up, down, weight.numel() // 2 + scales(weight) + stored(up, down))
            for name, (weight, up, down) in solved.items()
        }

    for precision in GROUP:
        for rounds in (0, 4):
            yield Method(
                f"svd_refine_iters {rounds}",
                precision,
                lambda w, _, p=precision, n=rounds: solve(w, p, n),
                lambda solved, p=precision: read(solved, p),
            )


def modelopt(_: str) -> Iterator[Method]:
    """Its SVD and its 4-bit tensors. Its calibration wants activations, and its NVFP4 activations a GPU."""
    from modelopt.torch.quantization.model_calib import svd
    from modelopt.torch.quantization.qtensor import INT4QTensor, NVFP4QTensor

    kinds = {"int4": INT4QTensor, "nvfp4": NVFP4QTensor}

    def solve(weights: Weights, precision: str) -> dict[str, Any]:
        solved = {}
        for name, weight in weights.items():
            up, down = svd(weight.bfloat16(), RANK)
            residual = weight.bfloat16().sub(up @ down)
            solved[name] = (up, down, kinds[precision].quantize(residual, GROUP[precision]))
        return solved

    def read(solved: dict[str, Any], precision: str) -> dict[str, Layer]:
        layers = {}
        for name, (up, down, (codes, scale, *outer)) in solved.items():
            extra = {"double_scale": outer[0]} if outer else {}
            weight = codes.dequantize(
                dtype=torch.float32, scale=scale, block_sizes={-1: GROUP[precision]}, **extra
            )
            size = stored(codes._quantized_data, scale, up, down, *outer)
            layers[name] = Layer(weight, up, down, size)
        return layers

    for precision in kinds:
        yield Method(
            "SVD in float64",
            precision,
            lambda w, _, p=precision: solve(w, p),
            lambda solved, p=precision: read(solved, p),
        )


PEERS: dict[str, Callable[[str], Iterator[Method]]] = {
    "svdq": svdq,
    "auto-round": auto_round,
    "sdnq": sdnq,
    "cache-dit": cache_dit,
    "nvidia-modelopt": modelopt,
}


def main() -> None:
    peer, inputs, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found = version(peer)
    taken: list[Taken] = []
    for method in PEERS[peer](str(Path(__file__).parents[1])):
        for path in sorted(inputs.glob("*.safetensors")):
            weights, groups = load_file(path), json.loads(path.with_suffix(".json").read_text())
            entry = Taken(peer, found, method.name, method.precision, path.stem)
            file = output / f"{peer}-{len(taken)}.safetensors"
            try:
                taken.append(_timed(method, weights, groups, entry, file))
            except Exception as error:  # a peer's fault is a row of the table
                taken.append(Taken(**{**asdict(entry), "why": f"{type(error).__name__}: {error}"}))
    (output / f"{peer}.json").write_text(json.dumps([asdict(each) for each in taken]))


def _timed(method: Method, weights: Weights, groups: Groups, entry: Taken, file: Path) -> Taken:
    first = next(iter(weights))
    method.solve({first: weights[first]}, [[first]])  # what is set up once is not counted
    seconds, solved = float("inf"), None
    for _ in range(REPEATS):
        started = time.process_time()
        solved = method.solve(weights, groups)
        seconds = min(seconds, time.process_time() - started)
    layers = method.read(solved)
    parts = {
        f"{name}.{part}": getattr(layer, part).detach().clone().contiguous()
        for name, layer in layers.items()
        for part in ("weight", "up", "down")
    }
    save_file(parts, file)
    size = sum(layer.bytes for layer in layers.values())
    return Taken(**{**asdict(entry), "seconds": seconds, "bytes": size, "tensors": file.name})


if __name__ == "__main__":
    main()
