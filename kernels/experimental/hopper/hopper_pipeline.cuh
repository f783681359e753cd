// A ring of STAGES stages in shared memory between one producer thread, which starts the copies, and two consumer
// warpgroups, which multiply. A stage holds up to STAGE_GROUPS groups of 64 columns, or 32 ranks of the low-rank branch.
//
// Two barriers a stage. `full` ends a phase when the producer has announced the bytes (1 arrival) and they have all been
// written. `empty` ends one when every consumer warp has read what it wants (CONSUMER_WARPS arrivals). Both sides go
// through the ring in the same order; in its n-th round (from 0) a consumer waits for phase n of `full`, the producer for
// phase n - 1 of `empty`, which in round 0 counts as ended. A stage is refilled only after all of a round's arrivals, so
// neither side can be two phases behind the other and a parity is enough.
#pragma once
#include "hopper_tiles.cuh"

constexpr int STAGE_GROUPS = 2;
constexpr int CONSUMERS = 2; // warpgroups
constexpr int WARPGROUP = 128;
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / LANES;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;

constexpr int WEIGHT_AT = STAGE_GROUPS * CODE_BYTES;
constexpr int WEIGHT_SCALES_AT = WEIGHT_AT + STAGE_GROUPS * WEIGHT_BYTES;
constexpr int TOKEN_SCALES_AT = WEIGHT_SCALES_AT + STAGE_GROUPS * WEIGHT_SCALE_BYTES;
constexpr int STAGE_BYTES = TOKEN_SCALES_AT + STAGE_GROUPS * TOKEN_SCALE_BYTES;
static_assert(HIDDEN_BYTES <= WEIGHT_AT && UP_BYTES <= STAGE_GROUPS * WEIGHT_BYTES, "the branch fits a stage");

// Everything in global memory that the product reads, in the layouts of hopper_tiles.cuh.
struct TileInput {
    const u8* codes;
    const float* token_scales;
    const u8* hidden;
    const u8* weight;
    const u8* weight_scales;
    const u8* up;
    int token_tiles, feature_tiles, groups, rank_steps;

    __device__ __forceinline__ int tiles() const { return token_tiles * feature_tiles; }
    // Blocks that run at the same time share a few weight tiles, which stay in the L2 cache.
    __device__ __forceinline__ int token_tile(int tile) const { return tile % token_tiles; }
    __device__ __forceinline__ int feature_tile(int tile) const { return tile / token_tiles; }
    __device__ __forceinline__ int group_steps() const { return (groups + STAGE_GROUPS - 1) / STAGE_GROUPS; }
    __device__ __forceinline__ int groups_of(int step) const { return min(STAGE_GROUPS, groups - step * STAGE_GROUPS); }
};

// Where one side is in the ring.
struct Place {
    int stage = 0;
    u32 parity = 0; // of the round

    __device__ __forceinline__ void advance()
    {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Ring {
    u8* memory;
    u64* full;
    u64* empty;

    __device__ __forceinline__ u8* at(const Place& place) const { return memory + place.stage * STAGE_BYTES; }

    // By one thread; the block synchronizes afterwards.
    __device__ __forceinline__ void initialize() const
    {
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(full + stage, 1);
            init_barrier(empty + stage, CONSUMER_WARPS);
        }
        fence_barrier_init();
    }

    __device__ __forceinline__ void wait_full(const Place& place) const { wait_phase(full + place.stage, place.parity); }

    // The warp has read all it wants of the stage.
    __device__ __forceinline__ void release(const Place& place, int lane) const
    {
        __syncwarp();
        if (lane == 0)
            arrive(empty + place.stage);
    }

    // Producer: the stage is free; `bytes` will come.
    __device__ __forceinline__ u64* announce(const Place& place, u32 bytes) const
    {
        wait_phase(empty + place.stage, place.parity ^ 1);
        arrive_expecting(full + place.stage, bytes);
        return full + place.stage;
    }
};

__device__ __forceinline__ void produce_groups(const Ring& ring, const Place& place, const TileInput& in, int tile, int step)
{
    const u32 count = in.groups_of(step);
    const size_t token_group = size_t(in.token_tile(tile)) * in.groups + step * STAGE_GROUPS;
    const size_t feature_group = size_t(in.feature_tile(tile)) * in.groups + step * STAGE_GROUPS;
    u8* to = ring.at(place);
    u64* full =
        ring.announce(place, count * (CODE_BYTES + WEIGHT_BYTES + WEIGHT_SCALE_BYTES + TOKEN_SCALE_BYTES));
    copy_bulk(to, in.codes + token_group * CODE_BYTES, count * CODE_BYTES, full);
    copy_bulk(to + WEIGHT_AT, in.weight + feature_group * WEIGHT_BYTES, count * WEIGHT_BYTES, full);
    if constexpr (WEIGHT_SCALE_BYTES > 0)
        copy_bulk(to + WEIGHT_SCALES_AT, in.weight_scales + feature_group * WEIGHT_SCALE_BYTES,
                  count * WEIGHT_SCALE_BYTES, full);
    if constexpr (TOKEN_SCALE_BYTES > 0)
        copy_bulk(to + TOKEN_SCALES_AT, in.token_scales + token_group * TOKENS, count * TOKEN_SCALE_BYTES, full);
}

__device__ __forceinline__ void produce_ranks(const Ring& ring, const Place& place, const TileInput& in, int tile, int step)
{
    const size_t token_step = size_t(in.token_tile(tile)) * in.rank_steps + step;
    const size_t feature_step = size_t(in.feature_tile(tile)) * in.rank_steps + step;
    u64* full = ring.announce(place, HIDDEN_BYTES + UP_BYTES);
    copy_bulk(ring.at(place), in.hidden + token_step * HIDDEN_BYTES, HIDDEN_BYTES, full);
    copy_bulk(ring.at(place) + WEIGHT_AT, in.up + feature_step * UP_BYTES, UP_BYTES, full);
}

// One thread starts every copy of every tile of its block, as far ahead as the ring allows: also while the consumers
// store a tile's result.
__device__ __forceinline__ void produce(const Ring& ring, const TileInput& in)
{
    Place place;
    for (int tile = blockIdx.x; tile < in.tiles(); tile += gridDim.x) {
        for (int step = 0; step < in.group_steps(); ++step, place.advance())
            produce_groups(ring, place, in, tile, step);
        for (int step = 0; step < in.rank_steps; ++step, place.advance())
            produce_ranks(ring, place, in, tile, step);
    }
}
