// What the receipt of nf4-kv is a fraction of: the energy of rows without their mean over a group of tokens, standing
// still or turning. The arithmetic is kvstore/kernels/reference_content.py's; sums are floats, so its last digits are not.
// Every operation is elementwise over eight channels, so all instruction sets give the same bits.
#pragma once
#include <initializer_list>

#include "kv.h"

namespace {

typedef float Eight __attribute__((vector_size(32)));
typedef float Lanes __attribute__((vector_size(4 * ThisIsa::kLanes)));

template <class Isa>
struct Content {
    static constexpr int kMost = 2 * kvk::kGroup;  // tokens of a group: at most 95
    static constexpr int kShort = 4;               // fewer tokens have no mean to speak of
    static constexpr int kLanes = Isa::kLanes;
    static constexpr int kChunk = 32;              // channels at a time, or pairs of them
    static constexpr int kWide = kChunk / kLanes;
    static constexpr int kTwo = 2;                 // vectors side by side: what turns waits for itself otherwise
    static constexpr int kSide = kTwo * kLanes;

    struct Run {
        Lanes re[kWide][kMost], im[kWide][kMost];
    };

    template <class Vector, int kDtype>
    __attribute__((always_inline)) static inline void get(const void* x, int64_t at, Vector* out) {
        if constexpr (kDtype == KVK_F32) {
            memcpy(out, static_cast<const float*>(x) + at, sizeof *out);
        } else {
            constexpr int n = sizeof *out / 4;
            alignas(64) float some[n];
            if constexpr (kDtype == KVK_F16)
                Isa::load_f16(static_cast<const uint16_t*>(x) + at, some, n);
            else
                Isa::load_bf16(static_cast<const uint16_t*>(x) + at, some, n);
            memcpy(out, some, sizeof *out);
        }
    }

    // `count` channels of n tokens, `step` values apart, the first one at `at`; zeros behind them, up to kSide.
    template <int kDtype>
    static void gather(const void* x, int64_t at, int64_t width, int n, int step, int count, Lanes (*out)[kMost]) {
        const int whole = step == 1 ? count / kLanes : 0;
        for (int w = 0; w < whole; ++w)
            for (int t = 0; t < n; ++t) get<Lanes, kDtype>(x, at + t * width + kLanes * w, &out[w][t]);
        const int left = count - whole * kLanes, end = (count + kSide - 1) / kSide * kTwo;
        alignas(64) float some[2 * kChunk], ordered[kChunk] = {};
        for (int t = 0; left && t < n; ++t) {
            Kv<Isa>::load(kDtype, x, at + t * width + whole * kLanes * step, some, (left - 1) * step + 1);
            for (int i = 0; i < left; ++i) ordered[i] = some[i * step];
            for (int w = whole; w * kLanes < count; ++w) memcpy(&out[w][t], ordered + (w - whole) * kLanes, sizeof out[w][t]);
        }
        for (int w = (count + kLanes - 1) / kLanes; w < end; ++w)
            for (int t = 0; t < n; ++t) out[w][t] = Lanes{};
    }
    static void gather(int dtype, const void* x, int64_t at, int64_t width, int n, int step, int count,
                       Lanes (*out)[kMost]) {
        const auto some = dtype == KVK_F32 ? gather<KVK_F32> : dtype == KVK_F16 ? gather<KVK_F16> : gather<KVK_BF16>;
        some(x, at, width, n, step, count, out);
    }
    // The pairs c to c + count of a head whose first value is at `at`.
    static void gather_pairs(int dtype, const void* x, int64_t at, int64_t width, int n, int pairs, bool interleaved, int c,
                             int count, Run* z) {
        if (!interleaved) {
            gather(dtype, x, at + c, width, n, 1, count, z->re);
            gather(dtype, x, at + c + pairs, width, n, 1, count, z->im);
        } else if (count == kChunk) {
            const auto some = dtype == KVK_F32 ? apart<KVK_F32> : dtype == KVK_F16 ? apart<KVK_F16> : apart<KVK_BF16>;
            some(x, at + 2 * c, width, n, z);
        } else {
            gather(dtype, x, at + 2 * c, width, n, 2, count, z->re);
            gather(dtype, x, at + 2 * c + 1, width, n, 2, count, z->im);
        }
    }
    // kChunk pairs of neighbours.
    template <int kDtype>
    static void apart(const void* x, int64_t at, int64_t width, int n, Run* z) {
        for (int w = 0; w < kWide; ++w)
            for (int t = 0; t < n; ++t) {
                alignas(64) float both[2 * kLanes], re[kLanes], im[kLanes];
                Lanes some[2];
                get<Lanes, kDtype>(x, at + t * width + 2 * kLanes * w, some);
                get<Lanes, kDtype>(x, at + t * width + 2 * kLanes * w + kLanes, some + 1);
                memcpy(both, some, sizeof both);
                for (int i = 0; i < kLanes; ++i) {
                    re[i] = both[2 * i];
                    im[i] = both[2 * i + 1];
                }
                memcpy(&z->re[w][t], re, sizeof re);
                memcpy(&z->im[w][t], im, sizeof im);
            }
    }

    // Sums of eight lanes after the other: the same on every instruction set.
    template <class Vector>
    static void add_to(double* to, const Vector& v) {
        constexpr int n = sizeof v / 4;
        for (int e = 0; e < n; e += 8) {
            double total = 0.0;
            for (int i = 0; i < 8; ++i) total += static_cast<double>(v[e + i]);
            *to += total;
        }
    }

    template <class Vector>
    static void finish(const Vector& first, const Vector& s, const Vector& e, int n, Vector* left, Vector* whole) {
        const float count = static_cast<float>(n);
        *whole = e + (s + s) * first + first * first * count;
        const Vector about = (e - s * s / count) * (count / static_cast<float>(n - 1));
        *left = *whole < about ? *whole : about;
    }

    // What is left of channels without their mean, counted about the first token: exact where the mean is large.
    static void still(const Lanes* x, int n, Lanes* left, Lanes* whole) {
        const Lanes first = x[0];
        Lanes s = {}, e = {};
        for (int t = 1; t < n; ++t) {
            const Lanes v = x[t] - first;
            s += v;
            e += v * v;
        }
        finish(first, s, e, n, left, whole);
    }

    // The cosine and sine of the phase of sum z[t+1] conj z[t], and whether a mean that turns by it promises to leave less
    // than three quarters of what a still one does: where none does, none is looked for.
    static constexpr float kPromise = 1.25f;
    struct Phase {
        Lanes cosine, sine;
        decltype(Lanes{} < Lanes{}) worth;
        int any;
    };
    // The same for pairs, in one pass, with their phases.
    static void still_pairs(const Lanes* re, const Lanes* im, int n, Lanes* left, Lanes* whole, Phase* out) {
        const Lanes first = re[0], other = im[0];
        Lanes s = {}, e = {}, s2 = {}, e2 = {}, a = {}, b = {}, x = first, y = other;
        for (int t = 1; t < n; ++t) {
            const Lanes u = re[t], v = im[t], du = u - first, dv = v - other;
            s += du;
            e += du * du;
            s2 += dv;
            e2 += dv * dv;
            a += u * x + v * y;
            b += v * x - u * y;
            x = u;
            y = v;
        }
        Lanes more, all;
        finish(first, s, e, n, left, whole);
        finish(other, s2, e2, n, &more, &all);
        *left += more;
        *whole += all;
        const Lanes square = a * a + b * b;
        Lanes length;
        for (int i = 0; i < kLanes; ++i) length[i] = __builtin_sqrtf(square[i]);
        const Lanes promised = *whole - length * kPromise;
        out->worth = promised < *left * 0.75f;
        out->any = 0;
        for (int i = 0; i < kLanes; ++i) out->any |= out->worth[i];
        out->cosine = length > 0.0f ? a / length : Lanes{} + 1.0f;
        out->sine = length > 0.0f ? b / length : Lanes{};
    }

    // What is left of pairs without their mean in the frame that turns by their phases.
    static void turning(const Lanes (*re)[kMost], const Lanes (*im)[kMost], int n, const Phase* by, Lanes* left) {
        Lanes c[kTwo], s[kTwo], sr[kTwo] = {}, si[kTwo] = {}, e[kTwo] = {};
        for (int w = 0; w < kTwo; ++w) {
            c[w] = by[w].cosine;
            s[w] = by[w].sine;
        }
        for (int t = 1; t < n; ++t)
#pragma GCC unroll 2
            for (int w = 0; w < kTwo; ++w) {
                const Lanes u = re[w][t] * c[w] + im[w][t] * s[w] - re[w][0], v = im[w][t] * c[w] - re[w][t] * s[w] - im[w][0];
                sr[w] += u;
                si[w] += v;
                e[w] += u * u + v * v;
                const Lanes next = c[w] * by[w].cosine - s[w] * by[w].sine;
                s[w] = c[w] * by[w].sine + s[w] * by[w].cosine;
                c[w] = next;
            }
        const float count = static_cast<float>(n);
        for (int w = 0; w < kTwo; ++w) {
            const Lanes turned = (e[w] - (sr[w] * sr[w] + si[w] * si[w]) / count) * (2.0f * count / (2.0f * count - 3.0f));
            left[w] = by[w].worth & (turned < left[w]) ? turned : left[w];
        }
    }

    // What `count` pairs, or channels where pairs is false, add to (left, whole) of their head.
    static void add_energies(const Run& z, int n, int count, bool pairs, double* out) {
        for (int w = 0; kLanes * w < count; w += kTwo) {
            Lanes left[kTwo], whole[kTwo];
            Phase by[kTwo];
            int any = 0;
            for (int i = 0; i < kTwo; ++i) {
                if (!pairs) {
                    still(z.re[w + i], n, left + i, whole + i);
                    continue;
                }
                still_pairs(z.re[w + i], z.im[w + i], n, left + i, whole + i, by + i);
                any |= by[i].any;
            }
            if (any) turning(z.re + w, z.im + w, n, by, left);
            for (int i = 0; i < kTwo; ++i) {
                add_to(out, left[i]);
                add_to(out + 1, whole[i]);
            }
        }
    }

    // Heads are read across the rows of a group: the caches are told first, front to back, an equal part at each call.
    class Ahead {
      public:
        Ahead(int dtype, const void* x, int64_t at, int64_t count, int64_t calls)
            : at_(static_cast<const char*>(x) + at * (dtype == KVK_F32 ? 4 : 2)), left_(count * (dtype == KVK_F32 ? 4 : 2)) {
            left_ = left_ < kAhead ? left_ : kAhead;
            step_ = (left_ / calls + 64) / 64 * 64;
        }
        void operator()() {
            const int64_t some = left_ < step_ ? left_ : step_;
            lines_ahead(at_, some);
            at_ += some;
            left_ -= some;
        }

      private:
        static constexpr int64_t kAhead = 256 << 10;
        const char* at_;
        int64_t left_, step_;
    };
    static void ahead(int dtype, const void* x, int64_t at, int64_t count) { Ahead(dtype, x, at, count, 1)(); }
    // One group of tokens of one head: (left, whole).
    static void head(int dtype, const void* x, int64_t at, int64_t width, int n, int d, int rotary, bool interleaved,
                     double* out, Ahead* next) {
        Run z;
        const int pairs = rotary / 2;
        out[0] = out[1] = 0.0;
        for (int c = 0, count; c < pairs; c += count) {
            count = pairs - c < kChunk ? pairs - c : kChunk;
            (*next)();
            gather_pairs(dtype, x, at, width, n, pairs, interleaved, c, count, &z);
            (*next)();
            add_energies(z, n, count, true, out);
        }
        for (int c = rotary, count; c < d; c += count) {  // the channels that turn with nobody
            count = d - c < kChunk ? d - c : kChunk;
            (*next)();
            gather(dtype, x, at + c, width, n, 1, count, z.re);
            add_energies(z, n, count, false, out);
        }
    }

    static constexpr int kStrip = 1024;  // channels at a time: their sums stay in L1

    // One group of tokens, all its channels standing still: row after row, as they lie. `d` a multiple of 8.
    template <int kDtype>
    static void flat(const void* x, int64_t at, int64_t width, int n, int64_t inner, int d, double* out) {
        constexpr int64_t size = kDtype == KVK_F32 ? 4 : 2;
        Eight first[kStrip / 8], s[kStrip / 8], e[kStrip / 8];
        for (int64_t i = 0; i < 2 * inner; ++i) out[i] = 0.0;
        for (int64_t c = 0; c < width; c += kStrip) {
            const int eights = static_cast<int>(width - c < kStrip ? width - c : kStrip) / 8;
            for (int w = 0; w < eights; ++w) {
                get<Eight, kDtype>(x, at + c + 8 * w, first + w);
                s[w] = e[w] = Eight{};
            }
            for (int t = 1; t < n; ++t)
                for (int w = 0; w < eights; ++w) {
                    Eight v;
                    const int64_t place = at + t * width + c + 8 * w;
                    if (w % 2 == 0) lines_ahead(static_cast<const char*>(x) + (place + Kv<Isa>::kFar) * size, 64);
                    get<Eight, kDtype>(x, place, &v);
                    v -= first[w];
                    s[w] += v;
                    e[w] += v * v;
                }
            for (int w = 0; w < eights; ++w) {
                Eight left, whole;
                finish(first[w], s[w], e[w], n, &left, &whole);
                double* to = out + 2 * ((c + 8 * w) / d);
                add_to(to, left);
                add_to(to + 1, whole);
            }
        }
    }

    // Groups [begin, end) of outer * groups; out: two numbers for each of their heads.
    static void energy(int dtype, const void* x, const kvk_rows& rows, int rotary, bool interleaved, int64_t groups,
                       int64_t begin, int64_t end, double* out) {
        const int64_t width = rows.inner * rows.d;
        const auto still_of = dtype == KVK_F32 ? flat<KVK_F32> : dtype == KVK_F16 ? flat<KVK_F16> : flat<KVK_BF16>;
        for (int64_t at = begin; at < end; ++at) {
            const int64_t slab = at / groups, group = at % groups, start = group * kvk::kGroup;
            const int n = static_cast<int>((group == groups - 1 ? rows.tokens : start + kvk::kGroup) - start);
            if (!rotary && n >= kShort && rows.d % 8 == 0) {
                still_of(x, slab * rows.stride + start * width, width, n, rows.inner, static_cast<int>(rows.d),
                         out + 2 * at * rows.inner);
                continue;
            }
            const int64_t first = slab * rows.stride + start * width;
            if (at == begin) ahead(dtype, x, first, n * width);
            const int64_t after = group == groups - 1 ? (slab + 1) * rows.stride : first + n * width;
            Ahead next(dtype, x, after, at + 1 < end ? n * width : 0, rows.inner * ((rows.d + kSide - 1) / kSide));
            for (int64_t i = 0; i < rows.inner; ++i) {
                const int64_t value = first + i * rows.d;
                double* to = out + 2 * (at * rows.inner + i);
                if (n < kShort)
                    to[0] = to[1] = squares(dtype, x, nullptr, value, width, n, static_cast<int>(rows.d));
                else
                    head(dtype, x, value, width, n, static_cast<int>(rows.d), rotary, interleaved, to, &next);
            }
        }
    }

    static constexpr int kRows = 16;  // whose squares are summed as floats
    // Sum of squares of n rows of d values, or of the differences of two tensors.
    static double squares(int dtype, const void* x, const void* y, int64_t at, int64_t width, int64_t n, int d) {
        const auto some = dtype == KVK_F32 ? square<KVK_F32> : dtype == KVK_F16 ? square<KVK_F16> : square<KVK_BF16>;
        double total = 0.0;
        for (int64_t t = 0; t < n; t += kRows)
            total += some(x, y, at + t * width, width, static_cast<int>(n - t < kRows ? n - t : kRows), d);
        return total;
    }

    template <int kDtype>
    static double square(const void* x, const void* y, int64_t at, int64_t width, int n, int d) {
        Eight total[4] = {}, a, b = {};
        const int whole = d & ~7;
        alignas(32) float some[8] = {}, other[8] = {};
        for (int t = 0; t < n; ++t, at += width) {
            for (int i = 0; i < whole; i += 8) {
                get<Eight, kDtype>(x, at + i, &a);
                if (y) get<Eight, kDtype>(y, at + i, &b);
                total[i / 8 % 4] += (a - b) * (a - b);
            }
            if (whole == d) continue;
            Kv<Isa>::load(kDtype, x, at + whole, some, d - whole);
            if (y) Kv<Isa>::load(kDtype, y, at + whole, other, d - whole);
            memcpy(&a, some, sizeof a);
            memcpy(&b, other, sizeof b);
            total[0] += (a - b) * (a - b);
        }
        double found = 0.0;
        for (const Eight& each : total) add_to(&found, each);
        return found;
    }

    // Squared distance of two tensors of the same rows, slab by slab and head by head: as the rows lie.
    static void distance(int dtype, const void* x, const void* y, const kvk_rows& rows, int64_t begin, int64_t end,
                         double* out) {
        const auto some = dtype == KVK_F32 ? square<KVK_F32> : dtype == KVK_F16 ? square<KVK_F16> : square<KVK_BF16>;
        const int64_t width = rows.inner * rows.d, size = dtype == KVK_F32 ? 4 : 2;
        for (int64_t slab = begin; slab < end; ++slab) {
            double* const to = out + slab * rows.inner;
            for (int64_t i = 0; i < rows.inner; ++i) to[i] = 0.0;
            for (int64_t t = 0; t < rows.tokens; t += kRows)
                for (int64_t i = 0; i < rows.inner; ++i) {
                    const int64_t next = slab * rows.stride + (t + kRows) * width + i * kRows * rows.d;
                    for (const void* each : {x, y}) lines_ahead(static_cast<const char*>(each) + next * size, kRows * rows.d * size);
                    to[i] += some(x, y, slab * rows.stride + t * width + i * rows.d, width,
                                  static_cast<int>(rows.tokens - t < kRows ? rows.tokens - t : kRows), static_cast<int>(rows.d));
                }
        }
    }
};

}  // namespace
