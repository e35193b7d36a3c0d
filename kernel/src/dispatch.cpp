// The C ABI: checks arguments, picks the instruction set, splits the work over threads.
#include <atomic>
#include <thread>
#include <vector>

#include "ops.h"
#include "rans.h"

namespace {

using kvk::Ops;

constexpr int64_t kStreamBytes = 4 << 20;
// Outputs from here on bypass the caches: a smaller one will be read from them soon.

const Ops* ops_for(int isa) {
#if defined(__x86_64__)
    if (isa > kvk_isa()) return nullptr;
    if (isa == KVK_AVX512VBMI) return &kvk::kAvx512Vbmi;
    if (isa == KVK_AVX512) return &kvk::kAvx512;
    if (isa == KVK_AVX2) return &kvk::kAvx2;
#endif
    return isa == KVK_PORTABLE ? &kvk::kPortable : nullptr;
}

bool valid_dtype(int dtype) { return dtype >= KVK_F32 && dtype <= KVK_BF16; }

constexpr int kPieces = 8;
// A thread takes so many in turn: one that starts late, as on a processor that was asleep, keeps nobody waiting long.

// Calls work(begin, end) over [0, n), here and in threads - 1 others.
template <class Work>
void split(int threads, int64_t n, const Work& work) {
    if (threads < 2 || n < 2) return work(0, n);
    const int64_t piece = (n + int64_t{threads} * kPieces - 1) / (int64_t{threads} * kPieces);
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t begin; (begin = next.fetch_add(piece)) < n;) work(begin, begin + piece < n ? begin + piece : n);
    };
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back(take);
    } catch (...) {
        // No thread to be had: slower, not wrong.
    }
    take();
    for (std::thread& other : others) other.join();
}

bool valid_rows(const kvk_rows* rows) {
    if (!rows || rows->outer < 1 || rows->tokens < 1 || rows->inner < 1 || rows->d < 1) return false;
    if (rows->size < 1 || rows->size > 128 || (rows->size & (rows->size - 1)) || rows->d % rows->size) return false;
    if (rows->block != 32 && rows->block != 64) return false;
    if (rows->stride < rows->tokens * rows->inner * rows->d) return false;
    return rows->groups >= 0 && rows->groups <= rows->tokens && (rows->groups - 1) * kvk::kGroup < rows->tokens;
}

// Groups of tokens that have a mean: of 64, a rest below 32 joining the last one; a short run is one.
int64_t groups_of(const kvk_rows& rows) {
    return rows.tokens < kvk::kGroup ? 1 : (rows.tokens + kvk::kGroup / 2) / kvk::kGroup;
}

bool valid_rotary(const kvk_rows* rows, int rotary) { return rotary >= 0 && rotary % 2 == 0 && rotary <= rows->d; }

bool valid_turns(const kvk_rows* rows, const kvk_turns* turns) {
    return turns && turns->rotary >= 2 && valid_rotary(rows, turns->rotary);
}
// Whether each group but the last has 64 tokens, and the last one 1 to 95.
bool grouped(const kvk_rows* rows) { return rows->groups >= 1 && rows->tokens < (rows->groups - 1) * kvk::kGroup + 2 * kvk::kGroup; }
bool may_turn(const kvk_rows* rows, const kvk_turns* turns) {
    return !turns || (grouped(rows) && valid_turns(rows, turns) && turns->tangents && turns->turning);
}

bool streams(const void* out, int dtype, int64_t n) {
    return n * (dtype == KVK_F32 ? 4 : 2) >= kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

}  // namespace

extern "C" {

int kvk_abi(void) { return KVK_ABI; }

int kvk_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") ? KVK_AVX512VBMI : KVK_AVX512;
    if (avx2) return KVK_AVX2;
#endif
    return KVK_PORTABLE;
}

int kvk_nf4_encode(int isa, int threads, int dtype, const void* x, int64_t n, uint8_t* codes, float* absmax,
                   int32_t* sums) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || n < 0) return KVK_BAD_ARGUMENT;
    std::atomic<bool> finite{true};
    const int64_t b = (n + 63) / 64;
    split(threads, n / 64, [&](int64_t begin, int64_t end) {
        if (ops->nf4_encode(dtype, x, begin, end, codes, absmax, {sums, sums + b, sums + 2 * b}) >= 0x7f800000u)
            finite = false;
    });
    const int64_t full = n / 64 * 64;
    if (full < n) {
        const char* tail = static_cast<const char*>(x) + full * (dtype == KVK_F32 ? 4 : 2);
        const int rest = static_cast<int>(n - full);
        const kvk::Measured last = {sums + b - 1, sums + 2 * b - 1, sums + 3 * b - 1};
        if (ops->nf4_encode_tail(dtype, tail, rest, codes + full / 2, absmax + full / 64, last) >= 0x7f800000u)
            finite = false;
    }
    return finite ? KVK_OK : KVK_NOT_FINITE;
}

int kvk_nf4_decode(int isa, int threads, int dtype, const uint8_t* codes, const float* absmax, int64_t n, void* out) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || n < 0) return KVK_BAD_ARGUMENT;
    const bool stream = streams(out, dtype, n);
    split(threads, n / 64, [&](int64_t begin, int64_t end) {
        ops->nf4_decode(dtype, codes, absmax, begin, end, stream, out);
    });
    const int64_t full = n / 64 * 64;
    if (full < n)
        ops->nf4_decode_tail(dtype, codes + full / 2, absmax[full / 64], static_cast<int>(n - full),
                             static_cast<char*>(out) + full * (dtype == KVK_F32 ? 4 : 2));
    return KVK_OK;
}

int kvk_nf4_scales(int isa, int threads, const float* absmax, int64_t b, float offset, const uint8_t* lut,
                   const float* map, const int32_t* sums, uint8_t* codes, float* nested, double* squares) {
    const Ops* ops = ops_for(isa);
    if (!ops || b < 0) return KVK_BAD_ARGUMENT;
    int32_t* in = const_cast<int32_t*>(sums);  // only read
    split(threads, (b + kvk::kScaleGroup - 1) / kvk::kScaleGroup, [&](int64_t begin, int64_t end) {
        ops->nf4_scales(absmax, b, offset, lut, map, {in, in + b, in + 2 * b}, begin, end, codes, nested, squares);
    });
    return KVK_OK;
}

int kvk_kv_means(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, int8_t* codes, float* scales,
                 float* means, int rotary, int interleaved, double* content) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !valid_rows(rows) || rows->groups < 1) return KVK_BAD_ARGUMENT;
    if (content && (!valid_rotary(rows, rotary) || rows->tokens > (rows->groups + 1) * kvk::kGroup)) return KVK_BAD_ARGUMENT;
    split(threads, rows->outer * rows->groups, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
            ops->kv_means(dtype, x, *rows, at, at + 1, codes, scales, means);
            if (content) ops->kv_content(dtype, x, *rows, rotary, interleaved != 0, rows->groups, at, at + 1, content);
        }
    });
    return KVK_OK;
}

int kvk_kv_expand(const kvk_rows* rows, const int8_t* codes, const float* scales, float* means) {
    if (!valid_rows(rows) || rows->groups < 1) return KVK_BAD_ARGUMENT;
    const int64_t n = rows->outer * rows->groups * rows->inner;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < rows->d; ++c)
            means[i * rows->d + c] = static_cast<float>(codes[i * rows->d + c]) * scales[i];
    return KVK_OK;
}

int kvk_kv_content(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, int pairings,
                   const int32_t* rotaries, double* content) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !valid_rows(rows) || pairings < 1) return KVK_BAD_ARGUMENT;
    for (int i = 0; i < pairings; ++i)
        if (!valid_rotary(rows, rotaries[2 * i])) return KVK_BAD_ARGUMENT;
    const int64_t groups = groups_of(*rows), n = rows->outer * groups;
    split(threads, n, [&](int64_t begin, int64_t end) {
        for (int i = 0; i < pairings; ++i)
            ops->kv_content(dtype, x, *rows, rotaries[2 * i], rotaries[2 * i + 1] != 0, groups, begin, end,
                            content + 2 * i * n * rows->inner);
    });
    return KVK_OK;
}

int kvk_kv_missed(const kvk_rows* rows, const float* error, double* missed) {
    if (!valid_rows(rows) || rows->d % rows->block) return KVK_BAD_ARGUMENT;
    const int64_t a_row = rows->d / rows->block, width = rows->inner * a_row;
    constexpr int64_t kStrip = 64;
    for (int64_t slab = 0; slab < rows->outer; ++slab, error += rows->tokens * width) {
        double* const to = missed + slab * rows->inner;
        for (int64_t i = 0; i < rows->inner; ++i) to[i] = 0.0;
        for (int64_t c = 0; c < width; c += kStrip) {
            const int64_t n = width - c < kStrip ? width - c : kStrip;
            double sums[kStrip] = {};
            for (int64_t t = 0; t < rows->tokens; ++t)
                for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(error[t * width + c + i]);
            for (int64_t i = 0; i < n; ++i) to[(c + i) / a_row] += sums[i];
        }
    }
    return KVK_OK;
}

int kvk_kv_along(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, const kvk_along* how,
                 float* distance, float* lacking) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !valid_rows(rows)) return KVK_BAD_ARGUMENT;
    if (!how || how->every < 1 || how->first < 0 || how->first > rows->tokens - 2) return KVK_BAD_ARGUMENT;
    std::atomic<bool> good{true};
    split(threads, rows->outer, [&](int64_t begin, int64_t end) {
        if (!ops->kv_along(dtype, x, *rows, *how, begin, end, distance, lacking)) good = false;
    });
    return good ? KVK_OK : KVK_NO_MEMORY;
}

int kvk_kv_distance(int isa, int threads, int dtype, const void* x, const void* y, const kvk_rows* rows,
                    double* squares) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !valid_rows(rows)) return KVK_BAD_ARGUMENT;
    split(threads, rows->outer, [&](int64_t begin, int64_t end) {
        ops->kv_distance(dtype, x, y, *rows, begin, end, squares);
    });
    return KVK_OK;
}

int kvk_kv_phases(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, const kvk_turns* turns,
                  const kvk_phases* how, double* power, double* pooled, uint8_t* shown, int32_t* heads) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !valid_rows(rows) || !grouped(rows) || !valid_turns(rows, turns)) return KVK_BAD_ARGUMENT;
    if (!how || how->sampled < 1 || how->sampled > rows->groups) return KVK_BAD_ARGUMENT;
    for (const int32_t lag : how->lags)
        if (lag < 1) return KVK_BAD_ARGUMENT;
    std::atomic<bool> good{true};
    split(threads, rows->outer, [&](int64_t begin, int64_t end) {
        if (!ops->kv_phases(dtype, x, *rows, *turns, rows->groups, *how, begin, end, power, pooled, shown, heads)) good = false;
    });
    return good ? KVK_OK : KVK_NO_MEMORY;
}

int kvk_kv_sums(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, const kvk_turns* turns, float* still,
                float* turned, float* gains, double* content) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !valid_rows(rows) || !grouped(rows)) return KVK_BAD_ARGUMENT;
    if (!turns || !valid_rotary(rows, turns->rotary) || (turns->tangents && turns->rotary < 2)) return KVK_BAD_ARGUMENT;
    std::atomic<bool> good{true};
    split(threads, rows->outer * rows->groups, [&](int64_t begin, int64_t end) {
        if (!ops->kv_sums(dtype, x, *rows, *turns, begin, end, still, turned, content)) good = false;
    });
    if (!good) return KVK_NO_MEMORY;
    if (turns->tangents) ops->kv_gains(*rows, *turns, still, turned, gains);
    return KVK_OK;
}

int kvk_kv_code_means(int isa, int threads, const kvk_rows* rows, const kvk_turns* turns, const float* still, const float* turned,
                      int8_t* codes, uint8_t* scales, float* means) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_rows(rows) || !grouped(rows)) return KVK_BAD_ARGUMENT;
    if (turns && (!valid_turns(rows, turns) || !turns->turning || !turned)) return KVK_BAD_ARGUMENT;
    std::atomic<bool> good{true};
    split(threads, rows->outer * rows->groups, [&](int64_t begin, int64_t end) {
        if (!ops->kv_code_means(*rows, turns, still, turned, begin, end, codes, scales, means)) good = false;
    });
    return good ? KVK_OK : KVK_NO_MEMORY;
}

int kvk_kv_expand_eights(const kvk_rows* rows, const int8_t* codes, const uint8_t* scales, float* means) {
    if (!valid_rows(rows) || rows->groups < 1) return KVK_BAD_ARGUMENT;
    const int64_t n = rows->outer * rows->groups * rows->inner;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < rows->d; c += 8, ++scales) {
            const float scale = from_bits(static_cast<uint32_t>(*scales) << 23);
            const int some = static_cast<int>(rows->d - c < 8 ? rows->d - c : 8);
            for (int j = 0; j < some; ++j) *means++ = static_cast<float>(*codes++) * scale;
        }
    return KVK_OK;
}

int kvk_kv_encode(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, const float* means,
                  const kvk_turns* turns, uint8_t* codes, uint8_t* scales, int16_t* tops, float* error) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !valid_rows(rows) || !may_turn(rows, turns)) return KVK_BAD_ARGUMENT;
    std::atomic<int> worst{KVK_OK};
    const int64_t tiles = (kvk::blocks_of(*rows) + kvk::kScaleGroup - 1) / kvk::kScaleGroup;
    split(threads, tiles, [&](int64_t begin, int64_t end) {
        const int status = ops->kv_encode(dtype, x, *rows, means, turns, begin, end, codes, scales, tops, error);
        if (status != KVK_OK) worst = status;
    });
    return worst;
}

int kvk_kv_decode(int isa, int threads, int dtype, const uint8_t* codes, const uint8_t* scales, const int16_t* tops,
                  const float* means, const kvk_turns* turns, const kvk_rows* rows, void* out) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !valid_rows(rows) || !may_turn(rows, turns)) return KVK_BAD_ARGUMENT;
    std::atomic<int> worst{KVK_OK};
    const int64_t tiles = (kvk::blocks_of(*rows) + kvk::kScaleGroup - 1) / kvk::kScaleGroup;
    const bool stream = streams(out, dtype, kvk::values_of(*rows));
    split(threads, tiles, [&](int64_t begin, int64_t end) {
        const int status = ops->kv_decode(dtype, codes, scales, tops, means, turns, *rows, begin, end, stream, out);
        if (status != KVK_OK) worst = status;
    });
    return worst;
}

int kvk_learned_decode(int isa, int dtype, const kvk_learned* how, const uint8_t* symbols, const int32_t* columns,
                       const uint8_t* classes, const int16_t* escapes, int64_t escaped, void* out, int64_t* used) {
    const Ops* ops = ops_for(isa);
    if (!ops || !valid_dtype(dtype) || !how || how->layers < 1 || how->heads < 1 || how->d < 1 || how->d > 1024)
        return KVK_BAD_ARGUMENT;
    const int64_t n = how->layers * how->heads * how->d;
    if (how->tokens < 1 || how->stride < how->tokens * how->heads * how->d || how->live < 0 || how->live > n || escaped < 0)
        return KVK_BAD_ARGUMENT;
    if (how->pairs < 0 || 2 * how->pairs > how->d) return KVK_BAD_ARGUMENT;
    for (int64_t k = 0; k < how->live; ++k)
        if (columns[k] < 0 || columns[k] >= n || classes[k] >= 40) return KVK_BAD_ARGUMENT;
    return ops->learned_decode(dtype, *how, symbols, columns, classes, escapes, escaped, out, used);
}

int kvk_rans_decode(int isa, const uint8_t* data, int64_t nbytes, int64_t rows, int64_t width, const uint8_t* classes,
                    int64_t tables, const uint32_t* slots, int64_t lanes, uint8_t* out) {
    const Ops* ops = ops_for(isa);
    if (!ops || !kvk::rans_fits(rows, width, lanes, tables, classes) || nbytes < 0) return KVK_BAD_ARGUMENT;
    return ops->rans_decode(data, nbytes, rows, width, classes, slots, lanes, out) ? KVK_OK : KVK_BAD_ARGUMENT;
}

int kvk_rans_encode(const uint8_t* symbols, int64_t rows, int64_t width, const uint8_t* classes, int64_t tables,
                    const uint16_t* counts, const uint16_t* starts, int64_t lanes, uint8_t* out, int64_t* written) {
    if (!kvk::rans_fits(rows, width, lanes, tables, classes)) return KVK_BAD_ARGUMENT;
    uint8_t* end = out + 2 * rows * width + 4 * lanes;
    *written = kvk::rans_encode(symbols, rows, width, classes, counts, starts, lanes, end);
    return *written < 0 ? KVK_BAD_ARGUMENT : KVK_OK;
}

}  // extern "C"
