// The 4-bit layers on a CPU, as C functions that svdq_cli/cpu/ calls. Compiled once for the instruction set that
// SVDQ_VECTOR names; layouts.h says what is stored where. Every result has the same bits on every instruction set, for any
// number of threads, rows and batches; attention is there on one of them only.
#include SVDQ_VECTOR

#include "attention.h"
#include "multiply.h"
#include "parallel.h"
#include "quantize.h"
#include "w4a16.h"

#include <memory>

using namespace svdq;

#ifdef _WIN32
#define SVDQ_API extern "C" __declspec(dllexport)
#else
#define SVDQ_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr int64_t BYTES_OF_ROWS = 512 * 1024; // of codes that stay in the second cache while the weights pass by
constexpr int64_t MOST_BLOCKS = 16;           // of rows a task
constexpr int64_t BYTES_OF_HEADS = 8 * 1024 * 1024; // of k and v that are packed at once
constexpr double WORTH_A_THREAD = 2e6;        // multiplications below which waking another thread costs more than it saves

int64_t worth(int64_t threads, double products)
{
    const double useful = products / WORTH_A_THREAD;
    return useful < double(threads) ? (useful < 1.0 ? 1 : int64_t(useful)) : threads;
}

int64_t blocks_of(int64_t m) { return (m + BLOCK - 1) / BLOCK; }

// Calls `of(precision, element)` with the types that two numbers name.
template <class Of> void with_types(int32_t nvfp4, int32_t bfloat16, Of of)
{
    if (nvfp4)
        bfloat16 ? of(NvFp4{}, BFloat16{}) : of(NvFp4{}, Float16{});
    else
        bfloat16 ? of(Int4{}, BFloat16{}) : of(Int4{}, Float16{});
}

template <class P, class E>
void quantize_rows(const Rows& before, const Rows& x, int64_t m, const Quantizer& how, const Quantized& out, int64_t threads)
{
    threads = worth(threads, double(m) * double(how.k) * double(how.rank + 64));
    const int64_t blocks = blocks_of(m), together = blocks < 2 * MOST_TOGETHER * threads ? 1 : MOST_TOGETHER;
    const bool reciprocals = have_reciprocals<Vector, E>(how.smooth, how.k);
    in_parallel((blocks + together - 1) / together, threads, [&](int64_t task) {
        const int64_t block = task * together, count = blocks - block < together ? blocks - block : together;
        const std::unique_ptr<float[]> sums(new float[count * BLOCK * how.rank + 1]);
        if (reciprocals)
            quantize_blocks<Vector, P, E, Vector::RECIPROCALS && E::IS_BFLOAT16>(before, x, m, block, int(count), how, out, sums.get());
        else
            quantize_blocks<Vector, P, E, false>(before, x, m, block, int(count), how, out, sums.get());
    });
}

// Rows of blocks `first`.. of the activation; the result's row 0 is the first of them.
template <class P, class E>
void multiply_rows(const Quantized& x, int64_t first, int64_t m, const Weights& w, const Result& to, int64_t threads)
{
    const int64_t kp = up_to(w.k, STEP), panels = (w.n + PANEL - 1) / PANEL, blocks = blocks_of(m);
    threads = worth(threads, double(m) * double(w.n) * double(kp));
    int64_t at_once = BYTES_OF_ROWS / (BLOCK * kp);
    at_once = at_once < 1 ? 1 : at_once > MOST_BLOCKS ? MOST_BLOCKS : at_once;
    // Parts of about equal size, enough of them that no thread waits long for the last one, as many for each thread
    const int64_t units = (blocks + Vector::BLOCKS_AT_ONCE - 1) / Vector::BLOCKS_AT_ONCE, pairs = (panels + 1) / 2;
    const int64_t some = (blocks + at_once - 1) / at_once, parts_of_m = some < units ? some : units;
    int64_t parts_of_n = threads <= 1 ? 1 : (8 * threads + parts_of_m - 1) / parts_of_m;
    while (parts_of_m * parts_of_n % threads)
        ++parts_of_n;
    parts_of_n = parts_of_n > pairs ? pairs : parts_of_n;
    in_parallel(parts_of_m * parts_of_n, threads, [&](int64_t task) {
        // Neighbors in time read the same weights
        const int64_t of_m = task % parts_of_m, of_n = task / parts_of_m;
        const int64_t from = units * of_m / parts_of_m * Vector::BLOCKS_AT_ONCE;
        const int64_t past = units * (of_m + 1) / parts_of_m * Vector::BLOCKS_AT_ONCE, until = past < blocks ? past : blocks;
        const int64_t begin = pairs * of_n / parts_of_n * 2, end = pairs * (of_n + 1) / parts_of_n * 2;
        for (int64_t panel = begin; panel < end && panel < panels; panel += 2) {
            const int64_t wide = panels - panel < 2 ? 1 : 2;
            const uint8_t* next = w.codes + (panel + wide) * kp * PANEL / 2;
            const int64_t groups = (until - from) * (kp / P::GROUP), lines = (PANEL * kp / LINE_BYTES + groups - 1) / groups;
            for (int64_t block = from; block < until; block += Vector::BLOCKS_AT_ONCE) {
                const int64_t row = block * BLOCK, end = until * BLOCK < m ? until * BLOCK : m, most = Vector::BLOCKS_AT_ONCE * BLOCK;
                const int64_t rows = end - row < most ? end - row : most;
                multiply_blocks<Vector, P, E>(x, first + block, int(rows), w, panel, wide, to, row,
                                              next + (block - from) * (kp / P::GROUP) * lines * LINE_BYTES, lines);
            }
        }
    });
}

} // namespace

// Where `team` is not null: GOMP_parallel of the OpenMP that torch uses.
SVDQ_API void svdq_use_team(void* team)
{
    threads_of_torch().team = reinterpret_cast<Team>(team);
    threads_of_torch().process = process_id();
}

// `x` (m, k), its rows `stride` numbers apart.
SVDQ_API void svdq_quantize(const void* x, int32_t float32, int64_t stride, int64_t m, const Quantizer* how,
                            const Quantized* out, int32_t nvfp4, int32_t bfloat16, int64_t threads)
{
    with_types(nvfp4, bfloat16, [&](auto precision, auto element) {
        const Rows rows{x, bool(float32), how->k, stride};
        quantize_rows<decltype(precision), decltype(element)>(Rows{}, rows, m, *how, *out, threads);
    });
}

SVDQ_API void svdq_multiply(const Quantized* x, int64_t m, const Weights* weights, void* y, int32_t float32, int32_t nvfp4,
                            int32_t bfloat16, int64_t threads)
{
    with_types(nvfp4, bfloat16, [&](auto precision, auto element) {
        multiply_rows<decltype(precision), decltype(element)>(*x, 0, m, *weights, {y, bool(float32), nullptr, weights->n}, threads);
    });
}

// One layer, `activation` of its 16-bit results, and the next layer's quantization. What the next layer reads before
// them: `before` (m, before_columns), its rows before_stride numbers apart, 16-bit or float32; a multiple of 64 columns,
// or none. `between`: room for (rows_at_once, n) 16-bit results, where rows_at_once is a multiple of 6.
SVDQ_API void svdq_multiply_quantize(const Quantized* x, int64_t m, const Weights* weights, const uint16_t* activation,
                                     const Quantizer* how, const Quantized* out, const void* before, int32_t before_float32,
                                     int64_t before_columns, int64_t before_stride, uint16_t* between, int64_t rows_at_once,
                                     int32_t nvfp4, int32_t bfloat16, int64_t threads)
{
    const int64_t before_bytes = before_stride * (before_float32 ? 4 : 2);
    with_types(nvfp4, bfloat16, [&](auto precision, auto element) {
        using P = decltype(precision);
        using E = decltype(element);
        const int64_t kp = up_to(how->k, STEP), groups = kp / P::GROUP;
        for (int64_t row = 0; row < m; row += rows_at_once) {
            const int64_t rows = m - row < rows_at_once ? m - row : rows_at_once, block = row / BLOCK;
            multiply_rows<P, E>(*x, block, rows, *weights, {between, false, activation, weights->n}, threads);
            const Quantized part{out->codes + block * kp * BLOCK, out->scales + block * groups * BLOCK,
                                 out->starts + block * groups * BLOCK, out->hidden + block * how->rank * BLOCK};
            const Rows first{static_cast<const char*>(before) + row * before_bytes, bool(before_float32), before_columns, before_stride};
            quantize_rows<P, E>(first, {between, false, weights->n, weights->n}, rows, *how, part, threads);
        }
    });
}

// `x` (m, k) and y (m, n) 16-bit. `wide`: room for (m, k) float32.
SVDQ_API void svdq_w4a16(const uint16_t* x, int64_t m, const W4A16Weights* weights, float* wide, uint16_t* y, int32_t bfloat16,
                         int64_t threads)
{
    with_types(0, bfloat16, [&](auto, auto element) {
        using E = decltype(element);
        for (int64_t i = 0; i < m * weights->k; ++i)
            wide[i] = E::to_float(x[i]);
        const int64_t vectors = (weights->n + Vector::LANES - 1) / Vector::LANES, some = 64 / Vector::LANES;
        threads = worth(threads, 8.0 * double(m + 4) * double(weights->n) * double(weights->k));
        in_parallel((vectors + some - 1) / some, threads, [&](int64_t task) {
            for (int64_t at = task * some; at < (task + 1) * some && at < vectors; ++at)
                w4a16_columns<Vector, E>(wide, m, *weights, at, y);
        });
    });
}

#ifdef __AVX512BF16__
// Softmax of q times k, times v, of every batch and head; bfloat16.
SVDQ_API void svdq_attention(const Attention* how, const Heads* q, const Heads* k, const Heads* v, const Heads* out, int64_t threads)
{
    const int64_t heads = how->batches * how->heads, size = how->packed(), blocks = how->blocks(), wide = how->wide();
    const int64_t parts = (how->queries + QUERIES - 1) / QUERIES;
    int64_t together = BYTES_OF_HEADS / (4 * size);
    together = together < 1 ? 1 : together > heads ? heads : together;
    threads = worth(threads, double(heads) * double(how->queries) * double(how->keys) * double(how->size));
    const std::unique_ptr<uint16_t[]> packed(new uint16_t[together * 2 * size]);
    for (int64_t first = 0; first < heads; first += together) {
        const int64_t some = heads - first < together ? heads - first : together;
        const auto keys = [&](int64_t head) { return packed.get() + head * 2 * size; };
        const auto at = [&](const Heads& of, int64_t head) { return of.of((first + head) / how->heads, (first + head) % how->heads); };
        in_parallel(some * blocks, threads, [&](int64_t task) {
            const int64_t head = task / blocks, key = task % blocks * KEYS, rows = how->keys - key < KEYS ? how->keys - key : KEYS;
            pack_keys(at(*k, head) + key * k->row, k->row, rows, how->size, keys(head) + key * how->size);
            pack_values(at(*v, head) + key * v->row, v->row, rows, how->size, wide, keys(head) + size + key * wide);
        });
        in_parallel(some * parts, threads, [&](int64_t task) {
            const std::unique_ptr<Room> room(new Room);
            const int64_t head = task / parts, row = task % parts * QUERIES, rows = how->queries - row < QUERIES ? how->queries - row : QUERIES;
            const float* bias = how->bias ? how->bias + (first + head) / how->heads * how->keys : nullptr;
            attend(*how, bias, at(*q, head) + row * q->row, q->row, rows, keys(head), keys(head) + size, at(*out, head) + row * out->row,
                   out->row, *room);
        });
    }
}
#endif
