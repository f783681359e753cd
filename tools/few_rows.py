"""What each step of the search brings where an input has few rows for its channels, as large models' inputs have. By
hand, as it takes minutes:

    python -m tools.few_rows --channels 3072 --rows 3584
    python -m tools.few_rows --channels 15360 --rows 4096 --outputs 512

Inputs and weights are made: white noise both, or inputs of a few directions plus noise. Next to the rows lies the
covariance of as many tokens as calibration would keep (`--tokens 0` for none). Prints the SQNR of the layer's output on
the held-out eighth of the rows after every step, and on fresh rows at the end. `--outputs 12288` and the like show what
the steps of a layer of full size take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from svdq_cli.calibration.budget import MOST_TOKENS, TOKENS_PER_CHANNEL
from svdq_cli.calibration.covariance import CovarianceSum
from svdq_cli.evaluation.layers import layer_sqnr_db
from svdq_cli.recipe.schema import STEPS_OF_EFFORT
from svdq_cli.records import (
    HELD_OUT,
    ActivationStats,
    Int4,
    Linear,
    NvFp4,
    Precision,
    SearchStep,
    SharedInput,
    SolveSettings,
    W4A4Plan,
)
from svdq_cli.solve.forward import LinearWeights
from svdq_cli.solve.linear import solve_input

PRECISIONS: dict[str, Precision] = {"int4": Int4(), "nvfp4": NvFp4()}
# The paper's search is what every effort begins with
STEPS: dict[str, tuple[SearchStep, ...]] = {"paper": (), **STEPS_OF_EFFORT}
DIRECTIONS, NOISE = 64, 0.3  # of inputs that are not white: the noise's amplitude beside theirs, per channel
FRESH = 1024  # rows that no step has seen
BATCH = 1024  # tokens at a time

Source = Callable[[int], Tensor]  # makes so many tokens (M, K), in float32


def white(channels: int, generator: torch.Generator) -> Source:
    return lambda count: torch.randn(count, channels, generator=generator)


def low_rank(channels: int, generator: torch.Generator) -> Source:
    directions = torch.randn(DIRECTIONS, channels, generator=generator) / DIRECTIONS**0.5

    def tokens(count: int) -> Tensor:
        mixed = torch.randn(count, DIRECTIONS, generator=generator) @ directions
        return mixed.add_(torch.randn(count, channels, generator=generator), alpha=NOISE)

    return tokens


KINDS: dict[str, Callable[[int, torch.Generator], Source]] = {"white": white, "low-rank": low_rank}


def statistics(name: str, make: Source, *, rows: int, tokens: int) -> ActivationStats:
    """As calibration keeps them: the rows to learn from are some of the tokens of the covariance, those that judge are
    not."""
    learned = rows * (HELD_OUT - 1) // HELD_OUT
    kept: list[Tensor] = []
    products = CovarianceSum()
    for batch in _batches(make, max(tokens, learned)):
        kept.append(batch[: max(0, learned - sum(map(len, kept)))])
        if tokens:
            products.add(batch)
    kept.append(make(rows - learned).bfloat16())
    whole = torch.cat(kept)
    wide = whole.float()
    return ActivationStats(
        name,
        wide.abs().amax(0),
        wide.square().mean(0),
        whole,
        tokens_seen=max(tokens, rows),
        covariance=products.covariance(more_than=rows),
    )


def _batches(make: Source, count: int) -> Iterator[Tensor]:
    for start in range(0, count, BATCH):
        yield make(min(BATCH, count - start)).bfloat16()


def measure(kind: str, chosen: argparse.Namespace, efforts: list[str]) -> None:
    generator = torch.Generator().manual_seed(chosen.seed)
    make = KINDS[kind](chosen.channels, generator)
    weight = torch.randn(chosen.outputs, chosen.channels, generator=generator) / chosen.channels**0.5
    tokens = (
        min(TOKENS_PER_CHANNEL * chosen.channels, MOST_TOKENS) if chosen.tokens is None else chosen.tokens
    )
    stats, fresh = statistics("layer", make, rows=chosen.rows, tokens=tokens), make(FRESH)
    linear = Linear("layer", chosen.channels, chosen.outputs, bias=False)
    plan = W4A4Plan(linear, PRECISIONS[chosen.precision], chosen.rank)
    for effort in efforts:
        began = time.monotonic()
        settings = SolveSettings("grid", chosen.seed, torch.bfloat16, STEPS[effort])
        solved = solve_input(
            SharedInput("layer", ("layer",), (("layer",),)),
            {"layer": plan},
            {"layer": LinearWeights(weight, None)},
            stats,
            settings,
        )
        seconds = time.monotonic() - began
        search = solved.reports[0].search
        show = partial(print, f"{kind:9}{effort:9}", flush=True)
        for step, reached in search.steps_db.items():
            took = "" if step == "start" else f"{search.steps_seconds[step]:8.1f} s"
            not_taken = "" if step in ("start", *search.steps_taken) else "  not taken"
            show(f"{step:12}{reached:8.3f} dB{took}{not_taken}")
        reached = layer_sqnr_db(weight, None, solved.w4a4[0], fresh)
        show(f"{'fresh rows':12}{reached:8.3f} dB{seconds:8.1f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.few_rows", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--channels", type=int, default=3072, help="K")
    parser.add_argument("--rows", type=int, default=3584, help="M")
    parser.add_argument("--outputs", type=int, default=512, help="N")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, help="of the covariance; default: what calibration keeps")
    parser.add_argument("--precision", choices=PRECISIONS, default="int4")
    parser.add_argument("--inputs", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--efforts", nargs="+", choices=[*STEPS], default=["paper", "fast", "balanced"], metavar="EFFORT"
    )
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for kind in chosen.inputs:
        measure(kind, chosen, chosen.efforts)


if __name__ == "__main__":
    main()
