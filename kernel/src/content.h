// What the receipt of nf4-kv is a fraction of: the energy of rows without their mean over a group of tokens, standing
// still or turning. The arithmetic is kvstore/codecs/content.py's; sums are floats, so its last digits are not.
// Every operation is elementwise over eight channels, so all instruction sets give the same bits.
#pragma once
#include "kv.h"

namespace {

typedef float Eight __attribute__((vector_size(32)));

template <class Isa>
struct Content {
    static constexpr int kMost = 2 * kvk::kGroup;  // tokens of a group: at most 95
    static constexpr int kShort = 4;               // fewer tokens have no mean to speak of

    struct Run {
        Eight re[kMost], im[kMost];
    };

    // Eight channels of n tokens, `step` values apart, the first one at `at`; those beyond `count` are zeros.
    static void gather(int dtype, const void* x, int64_t at, int64_t width, int n, int step, int count, Eight* out) {
        alignas(32) float some[16];
        for (int t = 0; t < n; ++t, at += width) {
            float* to = reinterpret_cast<float*>(out + t);
            if (step == 1 && count == 8) {
                Kv<Isa>::load(dtype, x, at, to, 8);
                continue;
            }
            Kv<Isa>::load(dtype, x, at, some, (count - 1) * step + 1);
            for (int i = 0; i < 8; ++i) to[i] = i < count ? some[i * step] : 0.0f;
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
        const float count = static_cast<float>(n);
        *whole = e + (s + s) * first + first * first * count;
        const Eight about = (e - s * s / count) * (count / static_cast<float>(n - 1));
        *left = *whole < about ? *whole : about;
    }

    // What is left of pairs without their mean in the frame that turns by the phase of sum z[t+1] conj z[t].
    static void turning(const Run& z, int n, Eight* left) {
        Eight a = {}, b = {};
        for (int t = 1; t < n; ++t) {
            a += z.re[t] * z.re[t - 1] + z.im[t] * z.im[t - 1];
            b += z.im[t] * z.re[t - 1] - z.re[t] * z.im[t - 1];
        }
        const Eight square = a * a + b * b;
        Eight length;
        for (int i = 0; i < 8; ++i) length[i] = __builtin_sqrtf(square[i]);
        const Eight cosine = length > 0.0f ? a / length : Eight{} + 1.0f, sine = length > 0.0f ? b / length : Eight{};
        const Eight re0 = z.re[0], im0 = z.im[0];
        Eight c = cosine, s = sine, sr = {}, si = {}, e = {};
        for (int t = 1; t < n; ++t) {
            const Eight re = z.re[t] * c + z.im[t] * s - re0, im = z.im[t] * c - z.re[t] * s - im0;
            sr += re;
            si += im;
            e += re * re + im * im;
            const Eight next = c * cosine - s * sine;
            s = c * sine + s * cosine;
            c = next;
        }
        const float count = static_cast<float>(n);
        *left = (e - (sr * sr + si * si) / count) * (2.0f * count / (2.0f * count - 3.0f));
    }

    // One group of tokens of one head: (left, whole).
    static void head(int dtype, const void* x, int64_t at, int64_t width, int n, int d, int rotary, bool interleaved,
                     double* out) {
        Run z;
        double left = 0.0, whole = 0.0;
        const int pairs = rotary / 2;
        for (int c = 0; c < d; c += 8) {
            const bool turn = c < pairs;
            const int first = turn ? (interleaved ? 2 * c : c) : c;
            const int end = turn ? pairs : d;
            const int count = end - c < 8 ? end - c : 8, step = turn && interleaved ? 2 : 1;
            gather(dtype, x, at + first, width, n, step, count, z.re);
            Eight l, w;
            still(z.re, n, &l, &w);
            if (turn) {
                Eight l2, w2, turned;
                gather(dtype, x, at + (interleaved ? first + 1 : c + pairs), width, n, step, count, z.im);
                still(z.im, n, &l2, &w2);
                turning(z, n, &turned);
                l += l2;
                l = l < turned ? l : turned;
                w += w2;
                if (c + 8 >= pairs) c = rotary - 8;  // the next channels turn with nobody
            }
            left += sum(l);
            whole += sum(w);
        }
        out[0] = left;
        out[1] = whole;
    }

    // Groups [begin, end) of outer * groups; out: two numbers for each of their heads.
    static void energy(int dtype, const void* x, const kvk_rows& rows, int rotary, bool interleaved, int64_t groups,
                       int64_t begin, int64_t end, double* out) {
        const int64_t width = rows.inner * rows.d;
        for (int64_t at = begin; at < end; ++at) {
            const int64_t slab = at / groups, group = at % groups, start = group * kvk::kGroup;
            const int n = static_cast<int>((group == groups - 1 ? rows.tokens : start + kvk::kGroup) - start);
            for (int64_t i = 0; i < rows.inner; ++i) {
                const int64_t value = slab * rows.stride + start * width + i * rows.d;
                double* to = out + 2 * (at * rows.inner + i);
                if (n < kShort)
                    plain(dtype, x, value, width, n, static_cast<int>(rows.d), to);
                else
                    head(dtype, x, value, width, n, static_cast<int>(rows.d), rotary, interleaved, to);
            }
        }
    }

    static void plain(int dtype, const void* x, int64_t at, int64_t width, int n, int d, double* out) {
        double total = 0.0;
        for (int t = 0; t < n; ++t) total += squares(dtype, x, nullptr, at + t * width, d);
        out[0] = out[1] = total;
    }

    // Sum of squares of d values, or of the differences of two tensors.
    static double squares(int dtype, const void* x, const void* y, int64_t at, int d) {
        alignas(32) float some[64], other[64] = {};
        Eight total = {};
        for (int i = 0; i < d; i += 64) {
            const int n = d - i < 64 ? d - i : 64;
            Kv<Isa>::load(dtype, x, at + i, some, n);
            if (y) Kv<Isa>::load(dtype, y, at + i, other, n);
            for (int j = n; j % 8; ++j) some[j] = other[j] = 0.0f;
            for (int j = 0; j < n; j += 8) {
                Eight a, b;
                memcpy(&a, some + j, sizeof a);
                memcpy(&b, other + j, sizeof b);
                total += (a - b) * (a - b);
            }
        }
        return sum(total);
    }

    // Squared distance of two tensors of the same rows, slab by slab and head by head.
    static void distance(int dtype, const void* x, const void* y, const kvk_rows& rows, int64_t begin, int64_t end,
                         double* out) {
        const int64_t width = rows.inner * rows.d;
        for (int64_t slab = begin; slab < end; ++slab) {
            double* to = out + slab * rows.inner;
            for (int64_t i = 0; i < rows.inner; ++i) to[i] = 0.0;
            for (int64_t t = 0; t < rows.tokens; ++t)
                for (int64_t i = 0; i < rows.inner; ++i)
                    to[i] += squares(dtype, x, y, slab * rows.stride + t * width + i * rows.d, static_cast<int>(rows.d));
        }
    }
};

}  // namespace
