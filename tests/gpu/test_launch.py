"""What a launch hands to CuPy, without a GPU."""

from __future__ import annotations

import numpy as np
import torch

from svdq_cli.gpu.launch import c_values


def test_arguments_have_the_sizes_of_the_kernels_parameters():
    """CuPy copies as many bytes as a numpy scalar has, and 8 of an int."""
    x = torch.zeros(3)
    pointer, null, count, factor = c_values((x, None, 4608, 0.5))
    assert (pointer, null) == (x.data_ptr(), 0)
    assert (type(count), count) == (np.int32, 4608)
    assert (type(factor), factor) == (np.float32, 0.5)
    assert c_values((torch.nn.Parameter(x),)) == (x.data_ptr(),)
