// A block of Hopper's GEMMs: one producer warpgroup, of which one thread works, and two consumer warpgroups; and the way
// of a result from a consumer's registers to rows of tokens.
#pragma once
#include "hopper_product.cuh"

// A token's 64 features in 16 bit, and 16 bytes, so that eight rows are stored in different banks.
constexpr int ROW_STRIDE = 64 * 2 + 16;
constexpr int STAGING_BYTES = TOKENS * ROW_STRIDE; // a warpgroup
constexpr int BARRIER_BYTES = (2 * STAGES * 8 + 127) / 128 * 128;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + CONSUMERS * STAGING_BYTES + BARRIER_BYTES;
static_assert(SHARED_BYTES == DYNAMIC_SHARED, "what the launch asks for");

// Registers a thread: the launch bound gives all threads the same; here it is redistributed. 128 * 40 + 256 * 232 <= 65536.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

struct Shared {
    u8* memory;

    __device__ __forceinline__ Ring ring() const
    {
        u64* barriers = reinterpret_cast<u64*>(memory + STAGES * STAGE_BYTES + CONSUMERS * STAGING_BYTES);
        return {memory, barriers, barriers + STAGES};
    }

    __device__ __forceinline__ u8* staging(int group) const
    {
        return memory + STAGES * STAGE_BYTES + group * STAGING_BYTES;
    }
};

// The threads of a warpgroup meet; 0 is the whole block's barrier.
__device__ __forceinline__ void meet_warpgroup(const Consumer& me) { meet(1 + me.group, WARPGROUP); }

// Asked for again where a result is stored, so that what follows from it takes no registers while products run.
__device__ __forceinline__ Consumer this_consumer()
{
    const int thread = thread_index_again() - WARPGROUP;
    return {thread / WARPGROUP, thread % WARPGROUP / LANES, thread % LANES};
}

// acc + bias, rounded to 16 bit, as rows of tokens in the warpgroup's staging. `bias` at the tile's first feature, or null.
__device__ __forceinline__ void stage_rows(u8* staging, const Sums& acc, const u16* bias, const Consumer& me)
{
    const float upper = bias ? Element::to_float(bias[me.feature()]) : 0.0f;
    const float lower = bias ? Element::to_float(bias[me.feature() + 8]) : 0.0f;
    const int matrix = me.lane / 8;
    u8* row = staging + (8 * (matrix / 2) + me.lane % 8) * ROW_STRIDE + (16 * me.warp + 8 * (matrix % 2)) * 2;
#pragma unroll
    for (int pair = 0; pair < TOKENS / 16; ++pair) {
        u32 matrices[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float bias_of = i % 2 ? lower : upper;
            matrices[i] = Element::pack(acc[8 * pair + 2 * i] + bias_of, acc[8 * pair + 2 * i + 1] + bias_of);
        }
        store_transposed(row + 16 * pair * ROW_STRIDE, matrices);
    }
}

// 16 tokens by the warpgroup's 64 features.
__device__ __forceinline__ Rows16 staged_rows(const u8* staging, int first_token, int lane)
{
    Rows16 rows;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            rows.part[half][r] = *reinterpret_cast<const uint4*>(
                staging + (first_token + 8 * r + lane / 4) * ROW_STRIDE + 64 * half + 16 * (lane % 4));
    return rows;
}

// Runs a block: `finish(tile, staging, me)` gets every tile of it, as rows in the staging of each warpgroup.
template <class Finish>
__device__ __forceinline__ void run_block(const TileInput& in, const u16* bias, Finish finish)
{
    const Shared shared = {dynamic_shared()};
    const Ring ring = shared.ring();
    if (threadIdx.x == 0)
        ring.initialize();
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        keep_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0)
            produce(ring, in);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        Place place;
        for (int tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
            Sums acc;
            multiply_tile(acc, ring, place, in, tile, this_consumer());
            const Consumer me = this_consumer();
            const int done = opaque(tile); // its place in y is not known while products run
            u8* staging = shared.staging(me.group);
            meet_warpgroup(me); // all have read the tile before
            stage_rows(staging, acc, bias ? bias + size_t(in.feature_tile(done)) * FEATURES : nullptr, me);
            meet_warpgroup(me);
            finish(done, staging, me);
        }
    }
}
