"""The trial of the GEMM's large blocks on a GPU, in a process of its own: a fault there ends that process only.

`python -m svdq_cli.runtime.large_blocks INDEX` is that process. Its exit code says what it found.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.gpu import variants
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import compile_variant
from svdq_cli.gpu.launch import CudaDevice, device_at
from svdq_cli.gpu.verdicts import Verdict, keep_verdict, read_verdict, verdict_path
from svdq_cli.records import Int4, NvFp4
from svdq_cli.runtime.selftest import large_block_cases

TRIAL_SECONDS = 180.0  # a dozen kernels to compile, a second each, then milliseconds
REPEATS = 20  # of each case: a race need not show the first time
SOUND, UNSOUND, UNKNOWN = 0, 3, 4  # exit codes of the trial

Trial = Callable[[int], Verdict | None]


def has_large_blocks(kind: Architecture) -> bool:
    return any(variants.has_large_blocks(precision, kind) for precision in (Int4(), NvFp4()))


def prove_large_blocks(gpu: CudaDevice, *, again: bool = False, trial: Trial | None = None) -> Verdict | None:
    """What is known of a GPU's large blocks, after a trial where nothing is, or `again`. From then on launches use them
    if they are sound. None where the card has none, or the trial could not run: then the blocks before are used."""
    if not has_large_blocks(gpu.architecture):
        return None
    path = verdict_path(torch.cuda.get_device_name(gpu.index), gpu.architecture)
    if not again and (known := read_verdict(path)) is not None:
        return known
    found = (trial or run_trial)(gpu.index)
    if found is not None:
        keep_verdict(path, found)
    return found


def run_trial(index: int, *, words: tuple[str, ...] = (sys.executable, "-m", __name__)) -> Verdict | None:
    """The trial in a process of its own. None where it could not be run, such as for want of memory: that says nothing
    of the kernels."""
    try:
        found = subprocess.run([*words, str(index)], capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"the trial did not end in {TRIAL_SECONDS:.0f} s")
    except OSError:
        return None
    lines = found.stdout.strip().splitlines()
    said = lines[-1] if lines else ""
    if found.returncode == SOUND:
        return Verdict(True, said)
    if found.returncode == UNSOUND:
        return Verdict(False, said)
    # A fault of the driver or of the machine code may kill the process; a missing package does not
    return (
        Verdict(False, f"the trial was killed by signal {-found.returncode}")
        if found.returncode < 0
        else None
    )


def try_large_blocks(gpu: CudaDevice) -> str | None:
    """What is wrong with the large blocks of a GPU, or None. A fault of the GPU raises, and ends what this process can
    do there."""
    kind, device = gpu.architecture, torch.device("cuda", gpu.index)
    for case in large_block_cases(torch.bfloat16, kind):
        name = f"{case.op} {case.precision} {case.mode}"
        if spilled := compile_variant(case.variant(kind), kind.target).usage.spill_bytes:
            return f"{name} spills {spilled} bytes with this NVRTC"
        for _ in range(REPEATS):
            if (found := case.disagreement(gpu, device)) > case.most or found != found:
                return f"{name}: {found:.1e} of the numbers are others"
    return None


def _main(index: int) -> int:
    try:
        wrong = try_large_blocks(device_at(index))
        torch.cuda.synchronize(index)
    except (EnvironmentLacksError, torch.OutOfMemoryError, MemoryError) as lack:
        print(lack)
        return UNKNOWN
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
        return UNKNOWN if "memory" in str(error) and "out of" in str(error) else UNSOUND
    print(wrong or "the same bits as blocks of 128 rows")
    return UNSOUND if wrong else SOUND


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1])))
