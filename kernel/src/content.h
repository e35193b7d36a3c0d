// What the receipt of nf4-kv is a fraction of: the energy of rows without their mean over a group of tokens, standing
// still or turning. The arithmetic is kvstore/kernels/reference_content.py's; sums are floats, so its last digits are not.
// Every operation is elementwise over eight channels, so all instruction sets give the same bits.
#pragma once
#include "kv.h"

namespace {

typedef float Eight __attribute__((vector_size(32)));

template <class Isa>
struct Content {
    static constexpr int kMost = 2 * kvk::kGroup;  // tokens of a group: at most 95
    static constexpr int kShort = 4;               // fewer tokens have no mean to speak of

    static constexpr int kWide = 2;                // eights at a time: a cache line of float32

    struct Run {
        Eight re[kWide][kMost], im[kWide][kMost];
    };

    template <int kDtype>
    __attribute__((always_inline)) static inline void eight(const void* x, int64_t at, Eight* out) {
        if constexpr (kDtype == KVK_F32) {
            memcpy(out, static_cast<const float*>(x) + at, sizeof *out);
        } else {
            alignas(32) float some[8];
            if constexpr (kDtype == KVK_F16)
                Isa::load_f16(static_cast<const uint16_t*>(x) + at, some, 8);
            else
                Isa::load_bf16(static_cast<const uint16_t*>(x) + at, some, 8);
            memcpy(out, some, sizeof *out);
        }
    }

    // `count` channels of n tokens, `step` values apart, the first one at `at`; zeros up to a multiple of eight.
    template <int kDtype>
    static void gather(const void* x, int64_t at, int64_t width, int n, int step, int count, Eight (*out)[kMost]) {
        if (step == 1 && count == 8 * kWide) {
            for (int t = 0; t < n; ++t, at += width)
                for (int w = 0; w < kWide; ++w) eight<kDtype>(x, at + 8 * w, &out[w][t]);
            return;
        }
        alignas(32) float some[16 * kWide];
        for (int t = 0; t < n; ++t, at += width) {
            Kv<Isa>::load(kDtype, x, at, some, (count - 1) * step + 1);
            for (int w = 0; w < kWide; ++w)
                for (int i = 0; i < 8; ++i) out[w][t][i] = 8 * w + i < count ? some[(8 * w + i) * step] : 0.0f;
        }
    }

    static double sum(const Eight& v) {
        double total = 0.0;
        for (int i = 0; i < 8; ++i) total += static_cast<double>(v[i]);
        return total;
    }

    // What is left of channels without their mean, counted about the first token: exact where the mean is large.
    static void still(const Eight* x, int n, Eight* left, Eight* whole) {
        const Eight first = x[0];
        Eight s = {}, e = {};
        for (int t = 1; t < n; ++t) {
            const Eight v = x[t] - first;
            s += v;
            e += v * v;
        }
        finish(first, s, e, n, left, whole);
    }

    static void finish(const Eight& first, const Eight& s, const Eight& e, int n, Eight* left, Eight* whole) {
        const float count = static_cast<float>(n);
        *whole = e + (s + s) * first + first * first * count;
        const Eight about = (e - s * s / count) * (count / static_cast<float>(n - 1));
        *left = *whole < about ? *whole : about;
    }

    // What is left of pairs without their mean in the frame that turns by the phase of sum z[t+1] conj z[t].
    static constexpr float kPromise = 1.25f;
    static void turning(const Eight* re, const Eight* im, int n, const Eight& whole, Eight* left) {
        Eight a = {}, b = {};
        for (int t = 1; t < n; ++t) {
            a += re[t] * re[t - 1] + im[t] * im[t - 1];
            b += im[t] * re[t - 1] - re[t] * im[t - 1];
        }
        const Eight square = a * a + b * b;
        Eight length;
        for (int i = 0; i < 8; ++i) length[i] = __builtin_sqrtf(square[i]);
        // Where a turning mean would leave no less than three quarters of `left`, none is looked for.
        const Eight promised = whole - length * kPromise;
        const auto worth = promised < *left * 0.75f;
        int any = 0;
        for (int i = 0; i < 8; ++i) any |= worth[i];
        if (!any) return;
        const Eight cosine = length > 0.0f ? a / length : Eight{} + 1.0f, sine = length > 0.0f ? b / length : Eight{};
        const Eight re0 = re[0], im0 = im[0];
        Eight c = cosine, s = sine, sr = {}, si = {}, e = {};
        for (int t = 1; t < n; ++t) {
            const Eight u = re[t] * c + im[t] * s - re0, v = im[t] * c - re[t] * s - im0;
            sr += u;
            si += v;
            e += u * u + v * v;
            const Eight next = c * cosine - s * sine;
            s = c * sine + s * cosine;
            c = next;
        }
        const float count = static_cast<float>(n);
        const Eight turned = (e - (sr * sr + si * si) / count) * (2.0f * count / (2.0f * count - 3.0f));
        *left = worth & (turned < *left) ? turned : *left;
    }

    // One group of tokens of one head: (left, whole).
    template <int kDtype>
    static void head(const void* x, int64_t at, int64_t width, int n, int d, int rotary, bool interleaved, double* out) {
        Run z;
        double left = 0.0, whole = 0.0;
        const int pairs = rotary / 2, step = interleaved ? 2 : 1;
        for (int c = 0, count; c < pairs; c += count) {
            count = pairs - c < 8 * kWide ? pairs - c : 8 * kWide;
            gather<kDtype>(x, at + c * step, width, n, step, count, z.re);
            gather<kDtype>(x, at + (interleaved ? 2 * c + 1 : c + pairs), width, n, step, count, z.im);
            for (int w = 0; 8 * w < count; ++w) {
                Eight l, l2, whole1, whole2;
                still(z.re[w], n, &l, &whole1);
                still(z.im[w], n, &l2, &whole2);
                l += l2;
                whole1 += whole2;
                turning(z.re[w], z.im[w], n, whole1, &l);
                left += sum(l);
                whole += sum(whole1);
            }
        }
        for (int c = rotary, count; c < d; c += count) {  // the channels that turn with nobody
            count = d - c < 8 * kWide ? d - c : 8 * kWide;
            gather<kDtype>(x, at + c, width, n, 1, count, z.re);
            for (int w = 0; 8 * w < count; ++w) {
                Eight l, all;
                still(z.re[w], n, &l, &all);
                left += sum(l);
                whole += sum(all);
            }
        }
        out[0] = left;
        out[1] = whole;
    }

    // Heads are read across the rows of a group: the caches are told first, front to back.
    static void ahead(int dtype, const void* x, int64_t at, int64_t count) {
        const int64_t size = dtype == KVK_F32 ? 4 : 2;
        const char* from = static_cast<const char*>(x) + at * size;
        for (int64_t i = 0; i < count * size && i < kAhead; i += 64) __builtin_prefetch(from + i, 0, 2);
    }
    static constexpr int64_t kAhead = 256 << 10;
    static constexpr int kStrip = 256;  // channels at a time: their sums stay in L1

    // One group of tokens, all its channels standing still: row after row, as they lie. `d` a multiple of 8.
    template <int kDtype>
    static void flat(const void* x, int64_t at, int64_t width, int n, int64_t inner, int d, double* out) {
        Eight first[kStrip / 8], s[kStrip / 8], e[kStrip / 8];
        for (int64_t i = 0; i < 2 * inner; ++i) out[i] = 0.0;
        for (int64_t c = 0; c < width; c += kStrip) {
            const int eights = static_cast<int>(width - c < kStrip ? width - c : kStrip) / 8;
            for (int w = 0; w < eights; ++w) {
                eight<kDtype>(x, at + c + 8 * w, first + w);
                s[w] = e[w] = Eight{};
            }
            for (int t = 1; t < n; ++t)
                for (int w = 0; w < eights; ++w) {
                    Eight v;
                    eight<kDtype>(x, at + t * width + c + 8 * w, &v);
                    v -= first[w];
                    s[w] += v;
                    e[w] += v * v;
                }
            for (int w = 0; w < eights; ++w) {
                Eight left, whole;
                finish(first[w], s[w], e[w], n, &left, &whole);
                double* to = out + 2 * ((c + 8 * w) / d);
                to[0] += sum(left);
                to[1] += sum(whole);
            }
        }
    }

    // Groups [begin, end) of outer * groups; out: two numbers for each of their heads.
    static void energy(int dtype, const void* x, const kvk_rows& rows, int rotary, bool interleaved, int64_t groups,
                       int64_t begin, int64_t end, double* out) {
        const int64_t width = rows.inner * rows.d;
        const auto one = dtype == KVK_F32 ? head<KVK_F32> : dtype == KVK_F16 ? head<KVK_F16> : head<KVK_BF16>;
        const auto still_of = dtype == KVK_F32 ? flat<KVK_F32> : dtype == KVK_F16 ? flat<KVK_F16> : flat<KVK_BF16>;
        for (int64_t at = begin; at < end; ++at) {
            const int64_t slab = at / groups, group = at % groups, start = group * kvk::kGroup;
            const int n = static_cast<int>((group == groups - 1 ? rows.tokens : start + kvk::kGroup) - start);
            if (!rotary && n >= kShort && rows.d % 8 == 0) {
                still_of(x, slab * rows.stride + start * width, width, n, rows.inner, static_cast<int>(rows.d),
                         out + 2 * at * rows.inner);
                continue;
            }
            ahead(dtype, x, slab * rows.stride + start * width, n * width);
            for (int64_t i = 0; i < rows.inner; ++i) {
                const int64_t value = slab * rows.stride + start * width + i * rows.d;
                double* to = out + 2 * (at * rows.inner + i);
                if (n < kShort)
                    to[0] = to[1] = squares(dtype, x, nullptr, value, width, n, static_cast<int>(rows.d));
                else
                    one(x, value, width, n, static_cast<int>(rows.d), rotary, interleaved, to);
            }
        }
    }

    // Sum of squares of n rows of d values, or of the differences of two tensors.
    static double squares(int dtype, const void* x, const void* y, int64_t at, int64_t width, int64_t n, int d) {
        const auto some = dtype == KVK_F32 ? square<KVK_F32> : dtype == KVK_F16 ? square<KVK_F16> : square<KVK_BF16>;
        double total = 0.0;
        for (int64_t t = 0; t < n; t += 16)
            total += some(x, y, at + t * width, width, static_cast<int>(n - t < 16 ? n - t : 16), d);
        return total;
    }

    template <int kDtype>
    static double square(const void* x, const void* y, int64_t at, int64_t width, int n, int d) {
        Eight total = {}, a, b = {};
        const int whole = d & ~7;
        alignas(32) float some[8] = {}, other[8] = {};
        for (int t = 0; t < n; ++t, at += width) {
            for (int i = 0; i < whole; i += 8) {
                eight<kDtype>(x, at + i, &a);
                if (y) eight<kDtype>(y, at + i, &b);
                total += (a - b) * (a - b);
            }
            if (whole == d) continue;
            Kv<Isa>::load(kDtype, x, at + whole, some, d - whole);
            if (y) Kv<Isa>::load(kDtype, y, at + whole, other, d - whole);
            memcpy(&a, some, sizeof a);
            memcpy(&b, other, sizeof b);
            total += (a - b) * (a - b);
        }
        return sum(total);
    }

    // Squared distance of two tensors of the same rows, slab by slab and head by head.
    static void distance(int dtype, const void* x, const void* y, const kvk_rows& rows, int64_t begin, int64_t end,
                         double* out) {
        const int64_t width = rows.inner * rows.d;
        for (int64_t slab = begin; slab < end; ++slab)
            for (int64_t i = 0; i < rows.inner; ++i)
                out[slab * rows.inner + i] =
                    squares(dtype, x, y, slab * rows.stride + i * rows.d, width, rows.tokens, static_cast<int>(rows.d));
    }
};

}  // namespace
