// What is stored where in memory. Every instruction set reads the same bytes.
//
// Weights are in panels of 16 columns (out features): a line of 64 bytes holds 8 consecutive k of the 16 columns, byte
// 4 column + i with k = 8 line + i in its lower and k = 8 line + 4 + i in its upper nibble.
//   int4: the nibble is the code + 8, so that it needs no sign; scales [panel][K/64][16] 16-bit
//   nvfp4: the nibble is e2m1; scales [panel][K/16][16] e4m3 bytes, without a sign
// Activations are in blocks of 6 rows (tokens): codes [block][K/4][6][4] int8, scales and starts [block][K/group][6].
//   A start is what undoes the weights' offset: -offset times the sum of the row's codes in the group.
// The branch: down [K/2][R][2], up [panel][R/2][16][2], hidden [block][R/2][6][2], 16-bit, R a multiple of 16.
// K is padded to 64 with codes and scales of zero.
#pragma once
#include "numbers.h"

namespace svdq {

constexpr int PANEL = 16, LINE_K = 8, LINE_BYTES = 64, STEP = 64, BLOCK = 6;

struct Int4 {
    static constexpr int GROUP = 64, LINES = GROUP / LINE_K, OFFSET = 8;
    using Scale = uint16_t;
};

struct NvFp4 {
    static constexpr int GROUP = 16, LINES = GROUP / LINE_K, OFFSET = 12;
    using Scale = uint8_t;
    // Twice the e2m1 value of a nibble, plus the offset
    alignas(16) static constexpr uint8_t TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};

// A quantized activation (M, K) with its hidden vectors.
struct Quantized {
    int8_t* codes;
    float* scales;
    int32_t* starts;
    uint16_t* hidden;
};

// A layer's weights as the GEMM reads them. `outer`: nvfp4's, times 2^6, which undoes two doubled codes and the 2^-8 of
// `load_e4m3`; (16 panels) float32, null for int4. `bias`: (16 panels) float32 or null.
struct Weights {
    const uint8_t* codes;
    const void* scales;
    const uint16_t* up;
    const float* outer;
    const float* bias;
    int64_t n, k, rank;
};

// How an input is quantized. `smooth` (K,) 16-bit; `down` see above. Channels from `unsigned_from` on, a multiple of 64,
// get `shift` added first and codes without a sign.
struct Quantizer {
    const uint16_t* smooth;
    const uint16_t* down;
    int64_t k, rank;
    int64_t unsigned_from;
    float shift;
};

} // namespace svdq
