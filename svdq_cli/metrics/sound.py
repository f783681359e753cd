"""SNR of a sound against the reference's, sample by sample; higher is better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SNR_CAP_DB = 100.0  # of equal sounds, which JSON and means can't hold as infinity
SNR_FLOOR_DB = -100.0  # of noise where the reference is silent


def snr_db(reference: Tensor, other: Tensor) -> float:
    """10 log10(signal / error) over all channels, within SNR_FLOOR_DB and SNR_CAP_DB.

    Both: (channels, N) samples of one rate; what one of them has at its end beyond the other is not compared.
    """
    length = min(reference.shape[-1], other.shape[-1])
    exact, found = reference[..., :length].double(), other[..., :length].double()
    signal, error = exact.square().sum().item(), (exact - found).square().sum().item()
    if error == 0:
        return SNR_CAP_DB
    if signal == 0:
        return SNR_FLOOR_DB
    return max(SNR_FLOOR_DB, min(SNR_CAP_DB, 10 * math.log10(signal / error)))
