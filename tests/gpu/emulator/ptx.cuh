// In the place of kernels/ptx.cuh: the same functions, lane for lane, on a CPU. Written from the PTX ISA's fragment
// tables, not from the kernels: here stands what the hardware does.
#pragma once
#include "threads.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define HAS_SM80 1
#define HAS_MXF4 1
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("svdq_shared")))
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size
#define __syncthreads emulator::synchronize_threads

struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class To, class From>
inline To bits_as(From from)
{
    static_assert(sizeof(To) == sizeof(From), "size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float __uint_as_float(u32 bits) { return bits_as<float>(bits); }
inline float __int_as_float(int bits) { return bits_as<float>(bits); }
inline u32 __float_as_uint(float value) { return bits_as<u32>(value); }
inline int __float2int_rn(float value)
{
    if (std::isnan(value))
        return 0;
    if (value >= 2147483648.0f)
        return 2147483647;
    if (value < -2147483648.0f)
        return -2147483647 - 1;
    return int(std::lrintf(value));
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
using std::isinf;
using std::isnan;

// ------------------------------------------------------------------------------------------ warps

inline int thread_index_again() { return int(threadIdx.x); }
inline int opaque(int value) { return value; }
inline int lane_index() { return int(threadIdx.x) % emulator::LANES; }

template <class T>
inline T shuffle_xor(T value, int mask)
{
    const emulator::Meeting<T> meeting("shuffle_xor", value);
    return meeting[lane_index() ^ mask];
}

inline void __syncwarp() { const emulator::Meeting<char> meeting("__syncwarp", 0); }

inline float max_magnitude(float a, float b)
{
    if (std::isnan(a) || std::isnan(b))
        return NAN;
    return a < std::fabs(b) ? std::fabs(b) : a;
}

// ------------------------------------------------------------------------------------------ 16-bit floats

inline double half_to_double(u16 bits)
{
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

// Round a double to `precision` significant bits, ties to even; steps are never finer than 2^least_exponent.
inline double round_to(double value, int precision, int least_exponent)
{
    if (value == 0 || !std::isfinite(value))
        return value;
    int exponent;
    std::frexp(value, &exponent);
    const int step = exponent - precision > least_exponent ? exponent - precision : least_exponent;
    return std::ldexp(std::nearbyint(std::ldexp(value, -step)), step);
}

template <class Format>
struct SixteenBit {
    static float to_float(u16 bits) { return float(Format::decode(bits)); }
    static u16 from_float(float value) { return Format::encode(value); }
    static u32 pack(float low, float high) { return u32(from_float(low)) | u32(from_float(high)) << 16; }

    static u32 fma2(u32 a, u32 b, u32 c)
    {
        u32 d = 0;
        for (int i = 0; i < 32; i += 16) {
            // Exact: a product of two 11-bit numbers plus a third within a double's 53 bits, or far below its last bit
            const double sum = Format::decode(u16(a >> i)) * Format::decode(u16(b >> i)) + Format::decode(u16(c >> i));
            d |= u32(Format::encode(sum)) << i;
        }
        return d;
    }

    // mma.m16n8k16. A: register i is row g + 8 (i % 2), k = 8 (i / 2) + 2 t + {0, 1}. B: register i is column g,
    // k = 8 i + 2 t + {0, 1}. C: element i is row g + 8 (i / 2), column 2 t + i % 2.
    static void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2])
    {
        struct Operand {
            u32 a[4], b[2];
        };
        const emulator::Meeting<Operand> lanes("mma.m16n8k16", {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
        const int g = lane_index() / 4, t = lane_index() % 4;
        double rows[2][16], columns[2][16];
        for (int quad = 0; quad < 4; ++quad) {
            const Operand of_row = lanes[4 * g + quad];
            const Operand of_column[2] = {lanes[4 * (2 * t) + quad], lanes[4 * (2 * t + 1) + quad]};
            for (int k = 0; k < 4; ++k) {
                const int at = 8 * (k / 2) + 2 * quad + k % 2, shift = 16 * (k % 2);
                for (int i = 0; i < 2; ++i) {
                    rows[i][at] = Format::decode(u16(of_row.a[2 * (k / 2) + i] >> shift));
                    columns[i][at] = Format::decode(u16(of_column[i].b[k / 2] >> shift));
                }
            }
        }
        for (int i = 0; i < 4; ++i) {
            double sum = 0;
            for (int k = 0; k < 16; ++k)
                sum += rows[i / 2][k] * columns[i % 2][k];
            c[i] = float(double(c[i]) + sum);
        }
    }
};

struct Bf16Format {
    static double decode(u16 bits) { return bits_as<float>(u32(bits) << 16); }
    static u16 encode(double value)
    {
        if (std::isnan(value))
            return 0x7fff;
        return u16(bits_as<u32>(float(round_to(value, 8, -133))) >> 16);
    }
};

struct Fp16Format {
    static double decode(u16 bits)
    {
        static const std::vector<double> table = [] {
            std::vector<double> values(65536);
            for (int i = 0; i < 65536; ++i)
                values[i] = half_to_double(u16(i));
            return values;
        }();
        return table[bits];
    }
    static u16 encode(double value)
    {
        if (std::isnan(value))
            return 0x7fff;
        const u16 sign = std::signbit(value) ? 0x8000 : 0;
        const double magnitude = std::fabs(round_to(value, 11, -24));
        if (magnitude >= 65536)
            return sign | 0x7c00;
        if (magnitude < std::ldexp(1, -14))
            return sign | u16(std::ldexp(magnitude, 24));
        int exponent;
        const double fraction = std::frexp(magnitude, &exponent); // in [0.5, 1)
        return sign | u16((exponent + 14) << 10) | u16(std::ldexp(fraction, 11) - 1024);
    }
};

struct Bf16 : SixteenBit<Bf16Format> {};
struct Fp16 : SixteenBit<Fp16Format> {};

// ------------------------------------------------------------------------------------------ 4-bit products

inline int nibble(u32 word, int i, bool is_unsigned)
{
    const int code = word >> 4 * i & 15;
    return is_unsigned || code < 8 ? code : code - 16;
}

struct IntOperand {
    u32 a[4], b[2];
};

// mma.m16n8k64. A: register i is row g + 8 (i % 2), k = 32 (i / 2) + 8 t + 0..7. B: register i is column g,
// k = 32 i + 8 t + 0..7.
template <bool UNSIGNED>
inline void mma_s4_k64(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&start)[4])
{
    const emulator::Meeting<IntOperand> lanes("mma.m16n8k64.s4", {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 4; ++i) {
        int sum = start[i];
        for (int quad = 0; quad < 4; ++quad)
            for (int half = 0; half < 2; ++half) {
                const u32 row = lanes[4 * g + quad].a[2 * half + i / 2], column = lanes[4 * (2 * t + i % 2) + quad].b[half];
                for (int k = 0; k < 8; ++k)
                    sum += nibble(row, k, UNSIGNED) * nibble(column, k, false);
            }
        d[i] = sum;
    }
}

// mma.m16n8k32. A: register i is row g + 8 (i % 2), k = 16 (i / 2) + 4 t + 0..3. B: register i is column g,
// k = 16 i + 4 t + 0..3.
template <bool UNSIGNED>
inline void mma_s8_k32(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&start)[4])
{
    const emulator::Meeting<IntOperand> lanes("mma.m16n8k32.s8", {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    const int g = lane_index() / 4, t = lane_index() % 4;
    int sums[4] = {start[0], start[1], start[2], start[3]};
    for (int i = 0; i < 4; ++i)
        for (int quad = 0; quad < 4; ++quad)
            for (int half = 0; half < 2; ++half) {
                const u32 row = lanes[4 * g + quad].a[2 * half + i / 2], column = lanes[4 * (2 * t + i % 2) + quad].b[half];
                for (int k = 0; k < 32; k += 8) {
                    const u8 byte = u8(row >> k);
                    sums[i] += (UNSIGNED ? int(byte) : int(int8_t(byte))) * int(int8_t(column >> k));
                }
            }
    for (int i = 0; i < 4; ++i)
        d[i] = sums[i];
}

// mma.m8n8k32: A is row g, B column g, k = 8 t + 0..7; C is row g, columns 2 t, 2 t + 1.
template <bool UNSIGNED>
inline void mma_s4_k32(int& c0, int& c1, u32 a, u32 b)
{
    const emulator::Meeting<uint2> lanes("mma.m8n8k32.s4", {a, b});
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 2; ++i)
        for (int quad = 0; quad < 4; ++quad)
            for (int k = 0; k < 8; ++k)
                (i ? c1 : c0) += nibble(lanes[4 * g + quad].x, k, UNSIGNED) * nibble(lanes[4 * (2 * t + i) + quad].y, k, false);
}

inline double e2m1(u32 code)
{
    static const double magnitudes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7];
}

inline double ue4m3(u32 byte)
{
    static const std::vector<double> table = [] {
        std::vector<double> values(256, NAN);
        for (int i = 0; i < 256; ++i) {
            const int exponent = i >> 3 & 15, mantissa = i & 7;
            if ((i & 0x7f) != 0x7f)
                values[i] = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
        }
        return values;
    }();
    return table[byte];
}

// mma.m16n8k64 mxf4nvf4, scale_vec::4X, selectors 0: fragments as m16n8k64.s4; byte j of a scale word is for
// k = 16 j .. + 15. Row g's word comes from lane 4 g, row g + 8's from lane 4 g + 1, column g's from lane 4 g.
inline void mma_mxf4(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], u32 a_scales, u32 b_scales)
{
    struct Operand {
        u32 a[4], b[2], a_scales, b_scales;
    };
    const emulator::Meeting<Operand> lanes("mma.mxf4nvf4", {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, a_scales, b_scales});
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 4; ++i) {
        const int column = 2 * t + i % 2;
        const u32 row_scales = lanes[4 * g + i / 2].a_scales, column_scales = lanes[4 * column].b_scales;
        double sum = 0;
        for (int k = 0; k < 64; ++k) {
            const int half = k / 32, quad = k % 32 / 8, shift = 4 * (k % 8), scale = 8 * (k / 16);
            sum += e2m1(lanes[4 * g + quad].a[2 * half + i / 2] >> shift & 15) * ue4m3(row_scales >> scale & 255) *
                   e2m1(lanes[4 * column + quad].b[half] >> shift & 15) * ue4m3(column_scales >> scale & 255);
        }
        c[i] = float(double(c[i]) + sum);
    }
}

// ------------------------------------------------------------------------------------------ copies to shared memory

// What a launch asks for, at most: a block of Hopper has 227 KB. Shared addresses begin somewhere, not at 0.
alignas(1024) __shared__ u8 dynamic_memory[227 * 1024];
constexpr u32 DYNAMIC_AT = 1024;

inline u32 shared_address(const void* shared) { return u32(static_cast<const u8*>(shared) - dynamic_memory) + DYNAMIC_AT; }
inline const u8* at_shared_address(u32 address) { return dynamic_memory + address - DYNAMIC_AT; }

inline void copy_async_16(void* shared, const void* global) { emulator::copy_late(shared, global); }
inline void commit_copies() { emulator::commit_copies(); }
template <int PENDING>
inline void wait_copies()
{
    emulator::wait_copies(PENDING);
}
