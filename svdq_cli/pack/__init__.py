"""Bit layouts: how codes, scales and low-rank factors lie in memory for the kernels that read them.

Every `pack_*` is a pure permutation (plus nibble packing) and stands beside its exact inverse `unpack_*`.
Nothing here knows about key names or files; that is the room `formats`.
"""
