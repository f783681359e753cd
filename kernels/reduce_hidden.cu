// reduce_hidden: adds the parts of a hidden vector that several blocks made, in a fixed order.
//
//   hidden = sum over splits of partial, rounded to 16 bit
//
//   partial  (splits, MP, R) float32, R a multiple of 16, MP a multiple of 16
//   hidden   layout of fragments.cuh
//
// One warp per 16 x 16 tile; grid: tiles / WARPS, rounded up. -D: ELEMENT_BF16, WARPS.
// Compute capability: 8.0 with bfloat16, 7.5 with float16. Reference: svdq_cli/runtime/ops/reduce_hidden.py.
#include "fragments.cuh"

extern "C" __global__ void __launch_bounds__(WARPS* LANES)
    reduce_hidden(const float* partial, uint4* hidden, int splits, int mp, int rank)
{
    const int lane = threadIdx.x % LANES, index = blockIdx.x * WARPS + threadIdx.x / LANES;
    const int tiles = mp / 16;
    if (index >= tiles * (rank / 16))
        return;
    const int tile = index % tiles, rank_tile = index / tiles;
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 16 * tile + lane / 4 + 8 * (i % 2), r = 16 * rank_tile + 8 * (i / 2) + 2 * (lane % 4);
        float2 sum = make_float2(0.0f, 0.0f);
        for (int split = 0; split < splits; ++split) {
            const float2 part = *reinterpret_cast<const float2*>(partial + (size_t(split) * mp + row) * rank + r);
            sum.x += part.x, sum.y += part.y;
        }
        words[i] = Element::pack(sum.x, sum.y);
    }
    hidden[size_t(index) * LANES + lane] = make_uint4(words[0], words[1], words[2], words[3]);
}
