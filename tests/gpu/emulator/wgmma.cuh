// In the place of kernels/experimental/hopper/wgmma.cuh. Products are computed when they are waited for, from what shared memory holds then.
#pragma once
#include "matrix_descriptor.cuh"

inline void fence_stores_before_wgmma() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::block.current->product_groups++; }
template <int PENDING>
inline void wgmma_wait()
{
    emulator::wait_products(PENDING);
}

// Byte `k` of row `row` of what a descriptor names. Bits 0..13 address, 16..29 leading, 32..45 stride, all in units of 16.
inline const u8* operand_byte(u64 descriptor, int row, int k)
{
    if (descriptor >> 46)
        emulator::fail("a matrix descriptor asks for a swizzle or a base offset");
    const u32 start = u32(descriptor & 0x3fff) << 4;
    const u32 leading = u32(descriptor >> 16 & 0x3fff) << 4, stride = u32(descriptor >> 32 & 0x3fff) << 4;
    return at_shared_address(start + k / 16 * leading + row / 8 * stride + row % 8 * 16 + k % 16);
}

// ------------------------------------------------------------------------------------------ e4m3

// In units of 2^-9, the smallest number; a NaN is no integer and comes as one that no sum of others reaches.
constexpr long E4M3_NAN = 1L << 40;

inline long e4m3_integer(u8 byte)
{
    static const std::vector<long> table = [] {
        std::vector<long> values(256);
        for (int i = 0; i < 256; ++i) {
            const int exponent = i >> 3 & 15, mantissa = i & 7;
            const long magnitude = exponent ? long(8 + mantissa) << (exponent - 1) : mantissa;
            values[i] = (i & 0x7f) == 0x7f ? E4M3_NAN : i & 0x80 ? -magnitude : magnitude;
        }
        return values;
    }();
    return table[byte];
}

// A sum of 32 products on top of `start`, all in units of 2^-18, as Hopper's tensor cores are reported to add (DeepSeek-AI,
// arXiv 2412.19437, section 3.3.2): everything is shifted to the largest exponent and keeps 13 bits behind the leading one.
inline double narrow_sum(double start, const long (&products)[32])
{
    long largest = long(std::fabs(start));
    for (const long product : products)
        largest = std::max(largest, std::labs(product));
    int exponent = 0;
    while (largest >> exponent > 1)
        ++exponent;
    const long unit = exponent > 13 ? 1L << (exponent - 13) : 1;
    long sum = long(start) / unit * unit;
    for (const long product : products)
        sum += product / unit * unit;
    return double(sum);
}

// One lane's share: rows g and g + 8 of its warp's 16, whose 32 bytes are given.
template <int COUNT>
inline void finish_e4m3(float (&d)[COUNT], const long (&rows)[2][32], u64 b, int scale_d)
{
    const int t = lane_index() % 4;
    for (int j = 0; j < COUNT / 4; ++j)
        for (int i = 0; i < 4; ++i) {
            long products[32];
            bool nan = false;
            for (int k = 0; k < 32; ++k) {
                const long one = rows[i / 2][k], other = e4m3_integer(*operand_byte(b, 8 * j + 2 * t + i % 2, k));
                nan |= one == E4M3_NAN || other == E4M3_NAN;
                products[k] = one == E4M3_NAN || other == E4M3_NAN ? 0 : one * other;
            }
            float& sum = d[4 * j + i];
            nan |= scale_d && std::isnan(sum);
            sum = nan ? NAN : float(std::ldexp(narrow_sum(scale_d ? std::ldexp(sum, 18) : 0, products), -18));
        }
}

struct ARows {
    long bytes[2][32];
};

template <int COUNT>
inline void wgmma_e4m3(float (&d)[COUNT], const u32 (&a)[4], u64 b, int scale_d)
{
    struct Operand {
        u32 words[4];
    };
    const emulator::Meeting<Operand> lanes("wgmma.e4m3", {{a[0], a[1], a[2], a[3]}});
    const int g = lane_index() / 4;
    ARows rows;
    for (int k = 0; k < 32; ++k)
        for (int r = 0; r < 2; ++r)
            rows.bytes[r][k] = e4m3_integer(u8(lanes[4 * g + k % 16 / 4].words[k / 16 * 2 + r] >> k % 4 * 8));
    emulator::start_product([&d, rows, b, scale_d] { finish_e4m3(d, rows.bytes, b, scale_d); });
}

// The warp's first row among the warpgroup's 64.
inline int first_row() { return int(threadIdx.x) / emulator::LANES % 4 * 16; }

template <int COUNT>
inline void wgmma_e4m3(float (&d)[COUNT], u64 a, u64 b, int scale_d)
{
    const emulator::Meeting<char> lanes("wgmma.e4m3", 0);
    emulator::start_product([&d, a, b, scale_d] {
        ARows rows;
        for (int k = 0; k < 32; ++k)
            for (int r = 0; r < 2; ++r)
                rows.bytes[r][k] = e4m3_integer(*operand_byte(a, first_row() + lane_index() / 4 + 8 * r, k));
        finish_e4m3(d, rows.bytes, b, scale_d);
    });
}

// ------------------------------------------------------------------------------------------ 16-bit floats

template <class Format, int COUNT>
inline void wgmma_16(float (&d)[COUNT], u64 a, u64 b, int scale_d)
{
    const emulator::Meeting<char> lanes("wgmma.16", 0);
    emulator::start_product([&d, a, b, scale_d] {
        const auto number = [](u64 descriptor, int row, int k) {
            u16 bits;
            std::memcpy(&bits, operand_byte(descriptor, row, 2 * k), 2);
            return Format::decode(bits);
        };
        for (int j = 0; j < COUNT / 4; ++j)
            for (int i = 0; i < 4; ++i) {
                const int row = first_row() + lane_index() / 4 + 8 * (i / 2), column = 8 * j + lane_index() % 4 * 2 + i % 2;
                double sum = scale_d ? d[4 * j + i] : 0;
                for (int k = 0; k < 16; ++k)
                    sum += number(a, row, k) * number(b, column, k);
                d[4 * j + i] = float(sum);
            }
    });
}

template <int COUNT>
inline void wgmma_bf16(float (&d)[COUNT], u64 a, u64 b, int scale_d)
{
    wgmma_16<Bf16Format>(d, a, b, scale_d);
}

template <int COUNT>
inline void wgmma_f16(float (&d)[COUNT], u64 a, u64 b, int scale_d)
{
    wgmma_16<Fp16Format>(d, a, b, scale_d);
}
