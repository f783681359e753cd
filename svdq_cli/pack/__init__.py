"""Bit layouts: how codes, scales and low-rank factors are stored in memory for the kernels that read them.

Every `pack_*` is a pure permutation (plus nibble packing) and is next to its exact inverse `unpack_*`.
Nothing here knows about key names or files; that is the room `formats`.
"""
