// GELU by tanh, on 16-bit numbers in place.
#pragma once
#include "fragments.cuh"

// Hendrycks and Gimpel, arXiv 1606.08415, section 2: sqrt(2 / pi) and 0.044715.
__device__ __forceinline__ float gelu(float v)
{
    return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}

__device__ __forceinline__ void apply_gelu(Rows16& rows)
{
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 pair = word(rows.part[half][r], i);
                pairs[i] = Element::pack(gelu(low_float(pair)), gelu(high_float(pair)));
            }
            rows.part[half][r] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
}
