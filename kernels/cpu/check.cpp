// Random layers on one instruction set, a line with the digest of every result for each. Lines of two instruction sets
// are equal, whatever machine or emulator they ran on; `scalar` is compared with the definition in tests/cpu. Also what
// the sanitizers run (make check-cpu).
//   check [CASES] [THREADS] [REPEATS]
#include "engine.cpp"

#include <cstdio>
#include <cstdlib>

namespace {

struct Draw {
    uint64_t state;

    uint32_t bits()
    {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return uint32_t(state >> 33);
    }
    int64_t below(int64_t most) { return int64_t(bits() % uint32_t(most)); }
    // About normal: the sum of four even numbers
    float number()
    {
        float sum = 0.0f;
        for (int i = 0; i < 4; ++i)
            sum += float(bits() & 0xffff) / 65536.0f - 0.5f;
        return 1.7f * sum;
    }
};

template <class T> uint64_t digest(const std::vector<T>& values, uint64_t seed = 14695981039346656037ull)
{
    const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i)
        seed = (seed ^ bytes[i]) * 1099511628211ull;
    return seed;
}

std::vector<uint16_t> numbers(Draw& draw, int64_t count, bool bfloat16, float size, float offset = 0.0f)
{
    std::vector<uint16_t> found(count);
    for (auto& each : found) {
        const float value = offset + size * (offset != 0.0f ? std::fabs(draw.number()) : draw.number());
        each = bfloat16 ? BFloat16::from_float(value) : Float16::from_float(value);
    }
    return found;
}

std::vector<uint8_t> bytes(Draw& draw, int64_t count, int most)
{
    std::vector<uint8_t> found(count);
    for (auto& each : found)
        each = uint8_t(draw.below(most));
    return found;
}

struct Input {
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> starts;
    std::vector<uint16_t> hidden;

    Input(int64_t m, int64_t k, int64_t rank, int group)
        : codes(blocks_of(m) * BLOCK * up_to(k, STEP)), scales(blocks_of(m) * BLOCK * up_to(k, STEP) / group),
          starts(scales.size()), hidden(blocks_of(m) * BLOCK * rank)
    {
    }
    Quantized where() { return {codes.data(), scales.data(), starts.data(), hidden.data()}; }
    uint64_t digests() const { return digest(hidden, digest(starts, digest(scales, digest(codes)))); }
};

struct Layer {
    std::vector<uint8_t> codes, scales;
    std::vector<uint16_t> up, smooth, down;
    std::vector<float> outer, bias;
    int64_t n, k, rank;

    Layer(Draw& draw, int64_t n, int64_t k, int64_t rank, bool nvfp4, bool bfloat16) : n(n), k(k), rank(rank)
    {
        const int64_t kp = up_to(k, STEP), np = up_to(n, PANEL);
        codes = bytes(draw, np * kp / 2, 256);
        if (nvfp4) {
            scales = bytes(draw, np * kp / 16, 127);
            for (int64_t i = 0; i < np; ++i)
                outer.push_back(0.01f + std::fabs(draw.number()));
        } else {
            const auto wide = numbers(draw, np * kp / 64, bfloat16, 0.02f);
            scales.resize(2 * wide.size());
            std::memcpy(scales.data(), wide.data(), scales.size());
        }
        up = numbers(draw, np * rank, bfloat16, 0.1f);
        smooth = numbers(draw, k, bfloat16, 0.7f, 0.4f);
        down = numbers(draw, kp * rank, bfloat16, 0.05f);
        for (int64_t i = 0; i < np; ++i)
            bias.push_back(draw.number());
    }
    Weights weights() const { return {codes.data(), scales.data(), up.data(), outer.empty() ? nullptr : outer.data(), bias.data(), n, k, rank}; }
    Quantizer quantizer(int64_t unsigned_from) const { return {smooth.data(), down.data(), k, rank, unsigned_from, 0.171875f}; }
};

#ifdef __AVX512BF16__
// Attention of random rows. Not among the digests: other instruction sets leave it to torch.
uint64_t attended(Draw& draw, int64_t threads)
{
    const int64_t heads = 1 + draw.below(3), queries = 1 + draw.below(120), keys = 1 + draw.below(600), size = 2 * (1 + draw.below(80));
    auto q = numbers(draw, heads * queries * size, true, 1.0f), k = numbers(draw, heads * keys * size, true, 1.0f),
         v = numbers(draw, heads * keys * size, true, 1.0f);
    std::vector<uint16_t> y(q.size());
    std::vector<float> bias(keys);
    for (float& each : bias)
        each = draw.below(3) ? 0.0f : -INFINITY;
    const auto of = [&](std::vector<uint16_t>& x) { return Heads{x.data(), 0, size, heads * size}; };
    const Heads at[] = {of(q), of(k), of(v), of(y)};
    const Attention how{1, heads, queries, keys, size, 0.2f, draw.below(2) ? bias.data() : nullptr};
    svdq_attention(&how, at, at + 1, at + 2, at + 3, threads);
    return digest(y, 0);
}
#endif

uint64_t one(int index, int64_t threads)
{
    Draw draw{uint64_t(index) * 7919 + 1};
    const bool nvfp4 = draw.below(2), bfloat16 = draw.below(2), float32 = draw.below(2);
    const int group = nvfp4 ? 16 : 64;
    const int64_t m = 1 + draw.below(40), k = nvfp4 ? 16 * (1 + draw.below(80)) : 64 * (1 + draw.below(20));
    const int64_t n = nvfp4 ? 16 * (1 + draw.below(24)) : 64 * (1 + draw.below(6)), rank = 16 * draw.below(4);
    const int64_t last = 1 + draw.below(90), beside = 64 * draw.below(6), both = beside + n;
    Layer first(draw, n, k, rank, nvfp4, bfloat16);
    const Layer second(draw, last, both, rank, nvfp4, bfloat16);
    const int64_t start = nvfp4 || draw.below(2) ? both : 64 * draw.below(both / 64);
    std::vector<uint16_t> table(65536); // any function will do
    for (size_t i = 0; i < table.size(); ++i)
        table[i] = uint16_t(i & 0x8000 ? 0x8000 : i);
    // Sometimes quotients near the subnormal numbers, and divisors that have no reciprocal
    const bool tiny = bfloat16 && draw.below(4) == 0, wild = bfloat16 && draw.below(4) == 0;
    for (auto& each : first.smooth)
        each = wild && draw.below(40) == 0 ? uint16_t(draw.below(2) ? 0x0010 : 0x7f10) : uint16_t(each + (tiny ? 24 << 7 : 0));
    const auto x = numbers(draw, m * k, bfloat16, tiny ? 0x1p-99f : 2.0f), aside = numbers(draw, m * (beside + 3), bfloat16, 2.0f);
    std::vector<float> wide(x.size());
    for (size_t i = 0; i < x.size(); ++i)
        wide[i] = (bfloat16 ? BFloat16::to_float(x[i]) : Float16::to_float(x[i])) * 1.001f;
    Input in(m, k, rank, group), between(m, both, rank, group);
    const auto how = first.quantizer(k), next = second.quantizer(start);
    const auto put = in.where(), put_next = between.where();
    svdq_quantize(float32 ? static_cast<const void*>(wide.data()) : x.data(), float32, k, m, &how, &put, nvfp4, bfloat16, threads);
    const auto one = first.weights(), two = second.weights();
    std::vector<uint16_t> y(m * n), z(m * last), room(12 * n);
    std::vector<float> exact(m * last);
    svdq_multiply(&put, m, &one, y.data(), 0, nvfp4, bfloat16, threads);
    svdq_multiply_quantize(&put, m, &one, table.data(), &next, &put_next, aside.data(), 0, beside, beside + 3, room.data(), 12, nvfp4,
                          bfloat16, threads);
    svdq_multiply(&put_next, m, &two, z.data(), 0, nvfp4, bfloat16, threads);
    svdq_multiply(&put_next, m, &two, exact.data(), 1, nvfp4, bfloat16, threads);
    const int64_t k64 = up_to(k, 64), np = up_to(last, PANEL);
    const auto codes = bytes(draw, np * k64 / 2, 256);
    const auto scales = numbers(draw, np * k64 / 32, bfloat16, 0.02f), bias = numbers(draw, np, bfloat16, 1.0f);
    const auto rows = numbers(draw, 3 * k64, bfloat16, 2.0f);
    std::vector<float> wider(rows.size());
    std::vector<uint16_t> modulation(3 * last);
    const W4A16Weights small{codes.data(), scales.data(), bias.data(), last, k64};
    svdq_w4a16(rows.data(), 3, &small, wider.data(), modulation.data(), bfloat16, threads);
    return digest(modulation, digest(exact, digest(z, digest(y, in.digests() ^ between.digests()))));
}

} // namespace

int main(int count, char** words)
{
    const int cases = count > 1 ? std::atoi(words[1]) : 60, repeats = count > 3 ? std::atoi(words[3]) : 1;
    const int threads = count > 2 ? std::atoi(words[2]) : 1;
    for (int i = 0; i < cases; ++i) {
        const uint64_t found = one(i, 1);
#ifdef __AVX512BF16__
        Draw first{uint64_t(i)}, again{uint64_t(i)};
        if (attended(first, 1) != attended(again, 2 + i % 3)) {
            std::printf("attention %d differs on %d threads\n", i, 2 + i % 3);
            return 1;
        }
#endif
        for (int again = 0; again < repeats && threads > 1; ++again)
            if (one(i, 2 + again % (threads - 1)) != found) {
                std::printf("case %d differs on %d threads\n", i, 2 + again % (threads - 1));
                return 1;
            }
        std::printf("%d %016llx\n", i, (unsigned long long)found);
    }
}
