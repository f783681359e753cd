// Where the numbers lie that Hopper's own kernels read: whole tiles, in the order in which they are copied to shared memory.
// svdq_cli/experimental/hopper/tiles.py packs them.
//
// A tile is TOKENS rows of an activation or FEATURES rows of a weight, by 64 columns of codes or 32 ranks. It holds four
// columns of 16 bytes a row, one column after the other: eight rows of a column are a core matrix of wgmma.
//
//   codes          [token tile][K/64][4][TOKENS]  16 e4m3 numbers
//   token_scales   MODE_EXACT: [token tile][K/64][TOKENS] float32; else [token tile][TOKENS] float32; tokens in the order of
//                  `token_slot`, times TOKEN_UNIT
//   hidden         [token tile][R/32][4][TOKENS]  8 16-bit floats
//   weight         MODE_FP8: [feature tile][K/64][4][FEATURES] 16 e4m3 numbers. Else [feature tile][K/64][FEATURES/16][lane]
//                  uint4 of 32 4-bit codes in -8..7 as sign and magnitude (that of a negative code less 1), for rows g and
//                  g + 8 of 16. Byte b of word i is column 16 i + 4 t + b: the magnitude for row g in bits 0..2, its sign
//                  in bit 7; the magnitude for row g + 8 in bits 4..6, and its sign in bit 3 of the next byte (of byte 0
//                  for byte 3).
//   weight_scales  MODE_FP8: (NP,) float32. Else [feature tile][K/64][FEATURES] 16-bit float
//   up             [feature tile][R/32][4][FEATURES]  8 16-bit floats
#pragma once
#include "fragments.cuh"
#include "hopper.cuh"
#include "wgmma.cuh"

// What multiplies (-D MODE). svdq_cli/experimental/hopper/modes.py says what each computes.
#define MODE_EXACT 0 // 4-bit codes on both sides, a scale for 64 columns of each
#define MODE_W4A8 1  // 4-bit weights with their scales; activations e4m3 with one scale a token
#define MODE_FP8 2   // e4m3 on both sides, one scale a row

constexpr int FEATURES = 128;
constexpr int CHUNKS = 4; // of 16 bytes in a row of a tile
constexpr int RANK_STEP = 32;

// Sign and magnitude in one byte are the e4m3 number magnitude * 2^-9 (subnormal but for 8): unpacking is masks, a rotation, and
// 1 for a negative code.
// The factor of 2^9 rides on the tokens' scales.
constexpr float TOKEN_UNIT = MODE == MODE_FP8 ? 1.0f : 512.0f;

constexpr int CODE_BYTES = TOKENS * GROUP;
constexpr int WEIGHT_BYTES = FEATURES * GROUP / (MODE == MODE_FP8 ? 1 : 2);
constexpr int WEIGHT_SCALE_BYTES = MODE == MODE_FP8 ? 0 : FEATURES * 2;
constexpr int TOKEN_SCALE_BYTES = MODE == MODE_EXACT ? TOKENS * 4 : 0;
constexpr int HIDDEN_BYTES = TOKENS * RANK_STEP * 2;
constexpr int UP_BYTES = FEATURES * RANK_STEP * 2;

// Place of a token's scale among 16: a lane's four columns of two octets (2 t, 2 t + 1, 8 + 2 t, 8 + 2 t + 1) are neighbors.
__device__ __forceinline__ int token_slot(int token)
{
    return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;
}

// The descriptor of rows from `first_row` on in a tile of `rows` rows, from 16-byte column `chunk` on.
__device__ __forceinline__ u64 tile_descriptor(const u8* tile, int rows, int first_row, int chunk)
{
    return matrix_descriptor(tile + (chunk * rows + first_row) * 16, rows * 16, 8 * 16);
}
