// In the place of kernels/experimental/hopper/hopper.cuh.
#pragma once
#include "matrix_descriptor.cuh"

inline u8* dynamic_shared() { return dynamic_memory; }

inline void init_barrier(u64* barrier, u32 arrivals)
{
    emulator::block.phases[barrier] = {long(arrivals), long(arrivals)};
}
inline void fence_barrier_init() {}
inline void arrive(u64* barrier)
{
    emulator::arrive_at(barrier, 0);
    emulator::let_others_run();
}
inline void arrive_expecting(u64* barrier, u32 bytes) { emulator::arrive_at(barrier, bytes); }
inline void wait_phase(u64* barrier, u32 parity) { emulator::wait_for_parity(barrier, parity); }
inline void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier)
{
    emulator::copy_in_bulk({shared, global, bytes, barrier});
}
inline void meet(int id, int threads) { emulator::meet(id, threads); }


template <int COUNT>
inline void keep_registers()
{
}
template <int COUNT>
inline void take_registers()
{
}

// stmatrix.x4.trans: the lane whose row it is gathers column j of matrix i from the lanes that hold it.
inline void store_transposed(void* row, const u32 (&matrices)[4])
{
    struct Operand {
        u32 words[4];
    };
    const emulator::Meeting<Operand> lanes("stmatrix", {{matrices[0], matrices[1], matrices[2], matrices[3]}});
    const int matrix = lane_index() / 8, column = lane_index() % 8;
    for (int g = 0; g < 8; ++g) {
        const u32 pair = lanes[4 * g + column / 2].words[matrix];
        static_cast<u16*>(row)[g] = u16(column % 2 ? pair >> 16 : pair);
    }
}

inline u32 e4m3_from_double(double value)
{
    const u32 sign = std::signbit(value) ? 0x80 : 0;
    if (std::isnan(value))
        return 0x7f;
    const double magnitude = std::fmin(std::fabs(round_to(value, 4, -9)), 448.0);
    if (magnitude < std::ldexp(1, -6))
        return sign | u32(std::ldexp(magnitude, 9));
    int exponent;
    const double fraction = std::frexp(magnitude, &exponent); // in [0.5, 1)
    return sign | u32(exponent + 6) << 3 | u32(std::ldexp(fraction, 4) - 8);
}

inline u32 e4m3_pair(float low, float high) { return e4m3_from_double(low) | e4m3_from_double(high) << 8; }
