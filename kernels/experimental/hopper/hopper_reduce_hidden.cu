// hopper_reduce_hidden: adds the parts of a hidden vector that several blocks made, in a fixed order, for hopper_gemm.
//
//   hidden = sum over splits of partial, rounded to 16 bit
//
//   partial  (splits, MP, R) float32, R a multiple of 32, MP of TOKENS      hidden  layout of hopper_tiles.cuh
//
// One thread for 8 ranks of a row; grid: rows * R / 8 / (32 WARPS), rounded up. -D: ELEMENT_BF16, MODE, TOKENS, WARPS.
// Compute capability: 9.0 (sm_90a). Reference: svdq_cli/runtime/ops/reduce_hidden.py.
#include "hopper_tiles.cuh"

extern "C" __global__ void __launch_bounds__(WARPS* LANES)
    hopper_reduce_hidden(const float* partial, uint4* hidden, int splits, int mp, int rank)
{
    const int index = blockIdx.x * WARPS * LANES + threadIdx.x;
    if (index >= mp * (rank / 8))
        return;
    const int row = index % mp, octet = index / mp;
    float sums[8] = {};
    for (int split = 0; split < splits; ++split) {
        const float* from = partial + (size_t(split) * mp + row) * rank + 8 * octet;
#pragma unroll
        for (int quarter = 0; quarter < 2; ++quarter) {
            const float4 four = reinterpret_cast<const float4*>(from)[quarter];
            sums[4 * quarter] += four.x, sums[4 * quarter + 1] += four.y;
            sums[4 * quarter + 2] += four.z, sums[4 * quarter + 3] += four.w;
        }
    }
    const size_t at = (size_t(row / TOKENS) * (rank / 8) + octet) * TOKENS + row % TOKENS;
    hidden[at] = make_uint4(Element::pack(sums[0], sums[1]), Element::pack(sums[2], sums[3]),
                            Element::pack(sums[4], sums[5]), Element::pack(sums[6], sums[7]));
}
