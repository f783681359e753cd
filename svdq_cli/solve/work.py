"""Operations of the search by kind, and what a randomized SVD of every branch takes of them."""

from __future__ import annotations

from dataclasses import dataclass

from svdq_cli.solve.low_rank import OVERSAMPLE

# What rounding to e2m1 takes over rounding to integers, by which it is measured: its steps depend on the number.
NVFP4_ROUNDING = 10

Shapes = list[tuple[int, int]]  # of every branch: N, R


@dataclass(frozen=True, slots=True)
class Work:
    """Counts of operations that run at rates of their own."""

    matmul: float = 0.0  # floating point operations of large products, float32
    sketch: float = 0.0  # the same of the randomized SVD: products with few columns
    bases: float = 0.0  # the same of those columns' QR
    quantized: float = 0.0  # numbers rounded to nearest, scales included
    # numbers of a rebuilt weight, or of an output, that are compared with the exact ones
    compared: float = 0.0
    gptq: float = 0.0  # weights rounded one column after the other
    factored: float = 0.0  # K^3 of every float64 Cholesky factor or inverse
    learned: float = 0.0  # K of every step that learns the smoothing factor
    # additions of a few numbers: what operations cost however small they are, Python included
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, count: float) -> Work:
        return Work(*(getattr(self, name) * count for name in self.__dataclass_fields__))


def split_work(shapes: Shapes, width: int, power_iterations: int) -> Work:
    """The randomized SVD of every branch, and the product of its factors."""
    total = Work()
    for n, rank in shapes:
        if rank == 0:
            continue
        columns = min(rank + OVERSAMPLE, n, width)
        products = (2 * power_iterations + 2) * 2 * n * width * columns
        # the SVD of what is left, (columns, K), takes five times as long as its QR
        bases = ((power_iterations + 1) * n + (power_iterations + 5) * width) * 4 * columns**2
        calls = 25 * (2 * power_iterations + 3)
        total += Work(sketch=products, bases=bases, matmul=2 * n * width * rank, calls=calls)
    return total
