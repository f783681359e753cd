// Where the numbers of a tile are stored: the layouts that all kernels of this folder share. svdq_cli/gpu/layout.py packs them.
//
// M, N, K, R as everywhere in svdq; MP and NP are M and N rounded up to whole blocks. g = lane / 4, t = lane % 4.
//
//   codes    [K/64][rows/16][lane]  uint4 of 32 4-bit codes. Activation rows: word i is row g + 8 (i % 2), columns
//            32 (i / 2) + 8 t .. + 7. Weight rows: word i is row 8 (i / 2) + g, columns 32 (i % 2) + 8 t .. + 7. Code j
//            of a word is in bits 4 j.
//   scales   [K/64][rows]  in the order of `row_scale_slot` (activations) and gpu/layout.py (weights), one entry for 64
//            columns: int4 a 16-bit float, nvfp4 four e4m3 bytes, columns 0..15 in the lowest.
//   hidden, up  [R/16][rows/16][lane]  uint4 of 8 16-bit floats, fragments of m16n8k16. hidden: word i is row
//            g + 8 (i % 2), ranks 8 (i / 2) + 2 t, + 1. up: word i is row 8 (i / 2) + g, ranks 8 (i % 2) + 2 t, + 1.
//   down     [K/64][R/8][2][lane]  uint4 of 8 16-bit floats: rank g, columns 32 half + 8 t .. + 7.
#pragma once
#include "ptx.cuh"

#if ELEMENT_BF16
typedef Bf16 Element;
#else
typedef Fp16 Element;
#endif

// A scale entry: four e4m3 bytes, or one 16-bit float.
#if PRECISION_NVFP4
typedef u32 Scale;
#else
typedef u16 Scale;
#endif

constexpr int LANES = 32;
constexpr int GROUP = 64; // columns that one step of every kernel covers

// The codes and 16-bit fragments of 16 rows by one step are 32 lanes' uint4.
__host__ __device__ constexpr int tile_vectors(int rows) { return rows / 16 * LANES; }

// Place of a row's scale in its block of 32 rows, so that a lane's four rows (g, g + 8, g + 16, g + 24) are neighbors.
__device__ __forceinline__ int row_scale_slot(int row_in_32) { return row_in_32 % 8 * 4 + row_in_32 / 8; }

__device__ __forceinline__ u32 word(const uint4& words, int index)
{
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

__device__ __forceinline__ float low_float(u32 pair) { return Element::to_float(u16(pair & 0xffffu)); }
__device__ __forceinline__ float high_float(u32 pair) { return Element::to_float(u16(pair >> 16)); }

// 16 rows by 64 columns of 16-bit values in a warp: entry [half][r] of a lane is row g + 8 r, columns
// 32 half + 8 t .. + 7. The same words serve as the A fragment of four m16n8k16 steps: step (half, p) takes words
// 2 p, 2 p + 1 of both rows. That permutes k within the 64, and `down` is packed with the same permutation.
struct Rows16 {
    uint4 part[2][2];
};

// Rows g and g + 8 of a tile, 64 columns of `group`; zeros from row `m` on.
__device__ __forceinline__ Rows16 load_rows(const uint4* x, int first_row, int group, int m, int k, int lane)
{
    Rows16 rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + 8 * r + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            rows.part[half][r] = row < m ? x[size_t(row) * (k / 8) + group * 8 + 4 * half + lane % 4]
                                         : make_uint4(0, 0, 0, 0);
    }
    return rows;
}

// Rows of y (M, N), N a multiple of 8, from `row` and `column` on; what is outside is left out.
__device__ __forceinline__ void store_rows(uint4* y, const Rows16& rows, int row, int column, int m, int n, int lane)
{
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = row + 8 * r + lane / 4, j = column + 32 * half + 8 * (lane % 4);
            if (i < m && j < n)
                y[(size_t(i) * n + j) / 8] = rows.part[half][r];
        }
}

// hidden (16 x 8 ranks) += rows . down^T for one group of 64 columns. `down` is this lane's two halves.
__device__ __forceinline__ void add_down(float (&hidden)[4], const Rows16& rows, const uint4 (&down)[2])
{
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            const uint4 &upper = rows.part[half][0], &lower = rows.part[half][1];
            const u32 a[4] = {word(upper, 2 * p), word(lower, 2 * p), word(upper, 2 * p + 1), word(lower, 2 * p + 1)};
            const u32 b[2] = {word(down[half], 2 * p), word(down[half], 2 * p + 1)};
            Element::mma(hidden, a, b);
        }
}

// Four lanes of a quad hold a 4 x 4 matrix, a row each: afterwards lane t holds column t.
__device__ __forceinline__ void transpose_in_quad(u32 (&v)[4], int t)
{
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (!(i & bit)) {
                const bool upper = t & bit;
                const u32 received = shuffle_xor(upper ? v[i] : v[i | bit], bit);
                v[i] = upper ? received : v[i];
                v[i | bit] = upper ? v[i | bit] : received;
            }
}
