// Probe: how many wavefronts does a load from shared memory take when only four addresses of a warp differ, as with the
// scales of a tile's columns? Eight warps load as fast as they can.
//
//   result  (grid, 256) uint32, so that nothing is dropped
//   -D PATTERN: 0 LDS.128, 32 addresses (four wavefronts, known); 1 LDS.128, 2 LDS.64, 3 LDS.32, four addresses a warp
//
// Any compute capability. Loads: grid * 8 * LOADS * repeats.
#include "ptx.cuh"

constexpr int LOADS = 16; // of one repeat
constexpr int VECTORS = 1024;

#if PATTERN <= 1
typedef uint4 Loaded;
__device__ __forceinline__ u32 folded(const uint4& v) { return v.x ^ v.y ^ v.z ^ v.w; }
#elif PATTERN == 2
typedef uint2 Loaded;
__device__ __forceinline__ u32 folded(const uint2& v) { return v.x ^ v.y; }
#else
typedef u32 Loaded;
__device__ __forceinline__ u32 folded(u32 v) { return v; }
#endif

extern "C" __global__ void __launch_bounds__(256) shared_wavefronts(u32* result, int repeats)
{
    __shared__ uint4 memory[VECTORS];
    for (int i = threadIdx.x; i < VECTORS; i += blockDim.x)
        memory[i] = make_uint4(i, i + 1, i + 2, i + 3);
    __syncthreads();
    const int lane = threadIdx.x % 32, place = PATTERN == 0 ? lane : lane % 4;
    u32 sum = 0;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const Loaded* from = reinterpret_cast<const Loaded*>(memory) + (sum & 1) + (repeat & 3) * 4 + place;
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            sum ^= folded(from[i * 32]);
    }
    result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
