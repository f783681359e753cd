"""The CUDA kernels, one file for each: compile-time variant, launch, reference in plain torch, operator.

Importing the package defines `torch.ops.svdq.*`: on a GPU an operator launches the kernel, on a CPU it runs the
reference.
`cpu_*` are the CPU engine's, with operands of its own.
What launches is a parameter: a GPU (`gpu.launch`), or in the tests a CPU that runs the kernels' own source.
"""

from svdq_cli.runtime.ops import (
    attention as attention,
)
from svdq_cli.runtime.ops import (
    quantize_down as quantize_down,
)
from svdq_cli.runtime.ops import (
    reduce_hidden as reduce_hidden,
)
from svdq_cli.runtime.ops import (
    w4a4_gelu_quantize as w4a4_gelu_quantize,
)
from svdq_cli.runtime.ops import (
    w4a4_gemm as w4a4_gemm,
)
from svdq_cli.runtime.ops import (
    w4a16_linear as w4a16_linear,
)
