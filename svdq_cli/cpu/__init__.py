"""The 4-bit layers on a CPU: `kernels/cpu/`, compiled when first used for the instruction set that is here."""
