"""Hopper's own int4 kernels. No GPU has run them: tests compile them and run their source on a CPU (docs/hopper.md).

`--backend kernels:MODE` asks for them; without it int4 layers take the portable kernels.
"""
