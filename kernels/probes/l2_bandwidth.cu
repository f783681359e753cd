// Probe: how many bytes does L2 bring to a multiprocessor? One warp a block copies tiles in bulk, as the producer of the
// Hopper kernels does, and does nothing with them.
//
//   source  (tiles, TILE_BYTES) bytes, which L2 holds      cycles  (grid,) int64: of each block, from first to last tile
//   -D TILE_BYTES, STAGES, DYNAMIC_SHARED (STAGES tiles and their barriers)
//
// Compute capability 9.0 (sm_90a). Bytes: grid * repeats * TILE_BYTES.
#include "hopper.cuh"

extern "C" __global__ void __launch_bounds__(32)
    l2_bandwidth(const u8* source, long long* cycles, int tiles, int repeats)
{
    u8* memory = dynamic_shared();
    u64* full = reinterpret_cast<u64*>(memory + STAGES * TILE_BYTES);
    static_assert(STAGES * (TILE_BYTES + 8) <= DYNAMIC_SHARED, "memory");
    if (threadIdx.x != 0)
        return;
    for (int stage = 0; stage < STAGES; ++stage)
        init_barrier(full + stage, 1);
    fence_barrier_init();
    const long long started = clock64();
    for (int i = 0; i < repeats + STAGES; ++i) {
        const int stage = i % STAGES;
        if (i >= STAGES)
            wait_phase(full + stage, (i / STAGES - 1) & 1);
        if (i < repeats) {
            // Blocks start apart, as the tiles of a product do
            const size_t tile = (size_t(blockIdx.x) * 7 + i) % tiles;
            arrive_expecting(full + stage, TILE_BYTES);
            copy_bulk(memory + stage * TILE_BYTES, source + tile * TILE_BYTES, TILE_BYTES, full + stage);
        }
    }
    cycles[blockIdx.x] = clock64() - started;
}
