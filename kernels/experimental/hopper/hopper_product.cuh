// The product of one tile by a consumer warpgroup: 64 features (rows) by TOKENS tokens (columns), y^T = W . x^T. So the
// weight's scale of a group is one number a row, two for each lane, and unpacked codes are operand A, in registers.
#pragma once
#include "hopper_pipeline.cuh"

constexpr int SUMS = TOKENS / 2;

// [4 j + i]: feature 16 warp + g + 8 (i / 2), token 8 j + 2 t + i % 2 of the warpgroup's part of the tile.
typedef float Sums[SUMS];

// Who a thread is among the consumers.
struct Consumer {
    int group; // which warpgroup: features 64 group ..
    int warp;  // in the warpgroup
    int lane;

    __device__ __forceinline__ int first_feature() const { return 64 * group; }
    // The lane's upper row; the lower one is 8 further.
    __device__ __forceinline__ int feature() const { return 64 * group + 16 * warp + lane / 4; }
};

// Scales of the lane's tokens in octets 2 pair and 2 pair + 1.
__device__ __forceinline__ float4 pair_scales(const float* scales, int pair, int lane)
{
    return reinterpret_cast<const float4*>(scales)[4 * pair + lane % 4];
}

// Calls add(index, feature half, token scale) for every sum of the lane.
template <class Add>
__device__ __forceinline__ void for_each_sum(const float* token_scales, int lane, Add add)
{
#pragma unroll
    for (int pair = 0; pair < TOKENS / 16; ++pair) {
        const float4 scales = pair_scales(token_scales, pair, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            add(8 * pair + 2 * half, half, scales.x);
            add(8 * pair + 2 * half + 1, half, scales.y);
            add(8 * pair + 4 + 2 * half, half, scales.z);
            add(8 * pair + 4 + 2 * half + 1, half, scales.w);
        }
    }
}

#if MODE == MODE_FP8

// Sums over a stage (128 columns) are added in float32: the accumulator of fp8 products keeps about 14 bits.
__device__ __forceinline__ void multiply_stage(Sums& acc, const u8* stage, int groups, const Consumer& me)
{
    Sums sums;
    wgmma_fence();
#pragma unroll
    for (int group = 0; group < STAGE_GROUPS; ++group)
        if (group < groups)
#pragma unroll
            for (int k32 = 0; k32 < 2; ++k32)
                wgmma_e4m3(sums,
                           tile_descriptor(stage + WEIGHT_AT + group * WEIGHT_BYTES, FEATURES, me.first_feature(), 2 * k32),
                           tile_descriptor(stage + group * CODE_BYTES, TOKENS, 0, 2 * k32), group + k32 > 0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i)
        acc[i] += sums[i];
}

#else

// The e4m3 codes of a lane for 64 columns: operand A of two k32 steps.
struct WeightCodes {
    u32 words[2][4];
};

constexpr u32 SIGN_AND_MAGNITUDE = 0x87878787u;
constexpr u32 ONE_A_BYTE = 0x01010101u;

// The e4m3 numbers of four bytes of sign and magnitude: a negative code's magnitude is stored less 1. 0x87 becomes 0x88, which
// is -8 (the smallest normal number); no byte carries into the next.
__device__ __forceinline__ u32 signed_codes(u32 bytes)
{
    return bytes + (bytes >> 7 & ONE_A_BYTE);
}

// hopper_tiles.cuh says which bits are where.
__device__ __forceinline__ WeightCodes unpack(const uint4& packed)
{
    WeightCodes codes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 both = word(packed, i);
        codes.words[i / 2][i % 2 * 2] = signed_codes(both & SIGN_AND_MAGNITUDE);
        codes.words[i / 2][i % 2 * 2 + 1] = signed_codes((both >> 4 | both << 28) & SIGN_AND_MAGNITUDE);
    }
    return codes;
}

// What a consumer reads of one group of a stage.
struct GroupOperands {
    const uint4* weight;
    const u16* weight_scales;
    const u8* codes;
    const float* token_scales;

    __device__ __forceinline__ GroupOperands(const u8* stage, int group, const Consumer& me)
        : weight(reinterpret_cast<const uint4*>(stage + WEIGHT_AT + group * WEIGHT_BYTES) +
                 (4 * me.group + me.warp) * LANES + me.lane),
          weight_scales(reinterpret_cast<const u16*>(stage + WEIGHT_SCALES_AT + group * WEIGHT_SCALE_BYTES) +
                        me.feature()),
          codes(stage + group * CODE_BYTES),
          token_scales(reinterpret_cast<const float*>(stage + TOKEN_SCALES_AT + group * TOKEN_SCALE_BYTES))
    {
    }
};

// One fma a group and number, groups in order. MODE_EXACT: a sum of codes has 13 bits, times a 16-bit scale is exact.
__device__ __forceinline__ void add_sums(Sums& acc, const Sums& sums, const float (&scales)[2], const float* token_scales,
                                         int lane)
{
#if MODE == MODE_EXACT
    for_each_sum(token_scales, lane, [&](int i, int half, float token_scale) {
        acc[i] = fmaf(sums[i] * scales[half], token_scale, acc[i]);
    });
#else
#pragma unroll
    for (int i = 0; i < SUMS; ++i)
        acc[i] = fmaf(sums[i], scales[i / 2 % 2], acc[i]);
#endif
}

// Codes are unpacked before a product starts: registers that become operands while one runs make ptxas serialize it (C7513).
__device__ __forceinline__ void multiply_group(Sums& acc, const GroupOperands& at, int lane)
{
    Sums sums;
    const WeightCodes weight = unpack(*at.weight);
    wgmma_fence();
    wgmma_e4m3(sums, weight.words[0], tile_descriptor(at.codes, TOKENS, 0, 0), 0);
    wgmma_e4m3(sums, weight.words[1], tile_descriptor(at.codes, TOKENS, 0, 2), 1);
    wgmma_commit();
    const float scales[2] = {Element::to_float(at.weight_scales[0]), Element::to_float(at.weight_scales[8])};
    wgmma_wait<0>();
    add_sums(acc, sums, scales, at.token_scales, lane);
}

__device__ __forceinline__ void multiply_stage(Sums& acc, const u8* stage, int groups, const Consumer& me)
{
#pragma unroll
    for (int group = 0; group < STAGE_GROUPS; ++group)
        if (group < groups)
            multiply_group(acc, GroupOperands(stage, group, me), me.lane);
}

#endif

// MODE_W4A8, MODE_FP8: the scales that hold for whole rows.
__device__ __forceinline__ void scale_rows(Sums& acc, const TileInput& in, int tile, const Consumer& me)
{
#if MODE != MODE_EXACT
    float scales[2] = {1.0f, 1.0f};
#if MODE == MODE_FP8
    const float* rows =
        reinterpret_cast<const float*>(in.weight_scales) + size_t(in.feature_tile(tile)) * FEATURES + me.feature();
    scales[0] = rows[0], scales[1] = rows[8];
#endif
    for_each_sum(in.token_scales + size_t(in.token_tile(tile)) * TOKENS, me.lane,
                 [&](int i, int half, float token_scale) { acc[i] *= scales[half] * token_scale; });
#endif
}

__device__ __forceinline__ void multiply_elements(Sums& acc, u64 a, u64 b)
{
#if ELEMENT_BF16
    wgmma_bf16(acc, a, b, 1);
#else
    wgmma_f16(acc, a, b, 1);
#endif
}

// acc += up . hidden^T for 32 ranks, into the same registers.
__device__ __forceinline__ void add_low_rank(Sums& acc, const u8* stage, const Consumer& me)
{
    wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < 2; ++k16)
        multiply_elements(acc, tile_descriptor(stage + WEIGHT_AT, FEATURES, me.first_feature(), 2 * k16),
                          tile_descriptor(stage, TOKENS, 0, 2 * k16));
    wgmma_commit();
    wgmma_wait<0>();
}

// The whole product of a tile, without the bias.
__device__ __forceinline__ void multiply_tile(Sums& acc, const Ring& ring, Place& place, const TileInput& in, int tile,
                                              const Consumer& me)
{
#pragma unroll
    for (int i = 0; i < SUMS; ++i)
        acc[i] = 0.0f;
    for (int step = 0; step < in.group_steps(); ++step, place.advance()) {
        ring.wait_full(place);
        multiply_stage(acc, ring.at(place), in.groups_of(step), me);
        ring.release(place, me.lane);
    }
    scale_rows(acc, in, tile, me);
    for (int step = 0; step < in.rank_steps; ++step, place.advance()) {
        ring.wait_full(place);
        add_low_rank(acc, ring.at(place), me);
        ring.release(place, me.lane);
    }
}
