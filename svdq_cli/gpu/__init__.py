"""The CUDA kernels of `kernels/`: compiled when first needed, packed for, launched. CuPy is imported here only."""
