// AVX2 and F16C: eight floats at a time.
#pragma once
#include <immintrin.h>

#include "convert.h"
#include "tables.h"

namespace {

struct Avx2 {
    static constexpr bool kStreams = true;

    static __m256 load8(const uint32_t* bits) {
        return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
    }

    static void load(const float* x, float* out, int n) {
        for (int i = 0; i < n; i += 8) _mm256_storeu_ps(out + i, _mm256_loadu_ps(x + i));
    }
    static void load_f16(const uint16_t* x, float* out, int n) {
        for (int i = 0; i < n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
    }
    static void load_bf16(const uint16_t* x, float* out, int n) {
        for (int i = 0; i < n; i += 8) {
            const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
            _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
        }
    }
    static void store_f16(const float* x, uint16_t* out, int n) {
        for (int i = 0; i < n; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    }
    static __m256i rounded_bf16(const float* x) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        return _mm256_srli_epi32(rounded, 16);
    }
    static void store_bf16(const float* x, uint16_t* out, int n) {
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            const __m256i both = _mm256_packus_epi32(rounded_bf16(x + i), rounded_bf16(x + i + 8));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permute4x64_epi64(both, 0xd8));
        }
        for (; i < n; ++i) out[i] = float_to_bf16(x[i]);
    }
    // out is 32-byte aligned.
    static void store_stream(const float* x, float* out, int n) {
        for (int i = 0; i < n; i += 8) _mm256_stream_ps(out + i, _mm256_loadu_ps(x + i));
    }
    static void fence() { _mm_sfence(); }

    static void add(float* x, const float* y, int n) {
        for (int i = 0; i < n; i += 8)
            _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    }
    static void sub(float* x, const float* y, int n) {
        for (int i = 0; i < n; i += 8)
            _mm256_storeu_ps(x + i, _mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    }

    static uint32_t absmax_bits(const float* x, int n) {
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        __m256i most = _mm256_setzero_si256();
        for (int i = 0; i < n; i += 8) {
            const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
            most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
        }
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
    }

    // Codes by a search of four comparisons: exact for every float, with no table of buckets to trust.
    static __m256i codes8(__m256 z) {
        const uint32_t* t = kvk::kThresholdBits;
        const __m256 t7 = _mm256_set1_ps(from_bits(t[7]));
        const __m256 quarter = _mm256_setr_ps(from_bits(t[3]), from_bits(t[11]), 0, 0, 0, 0, 0, 0);
        const __m256 eighth =
            _mm256_setr_ps(from_bits(t[1]), from_bits(t[5]), from_bits(t[9]), from_bits(t[13]), 0, 0, 0, 0);
        const __m256 last = _mm256_setr_ps(from_bits(t[0]), from_bits(t[2]), from_bits(t[4]), from_bits(t[6]),
                                           from_bits(t[8]), from_bits(t[10]), from_bits(t[12]), from_bits(t[14]));
        __m256i above = _mm256_castps_si256(_mm256_cmp_ps(z, t7, _CMP_GT_OQ));
        __m256i index = _mm256_sub_epi32(_mm256_setzero_si256(), above);
        above = _mm256_castps_si256(_mm256_cmp_ps(z, _mm256_permutevar_ps(quarter_pair(quarter), index), _CMP_GT_OQ));
        index = _mm256_sub_epi32(_mm256_add_epi32(index, index), above);
        above = _mm256_castps_si256(_mm256_cmp_ps(z, _mm256_permutevar_ps(quarter_pair(eighth), index), _CMP_GT_OQ));
        index = _mm256_sub_epi32(_mm256_add_epi32(index, index), above);
        above = _mm256_castps_si256(_mm256_cmp_ps(z, _mm256_permutevar8x32_ps(last, index), _CMP_GT_OQ));
        return _mm256_sub_epi32(_mm256_add_epi32(index, index), above);
    }
    // The low four floats in both halves, for the cheaper permute within a half.
    static __m256 quarter_pair(__m256 table) { return _mm256_permute2f128_ps(table, table, 0); }

    static void codes32(const float* x, float inverse, uint8_t* out) {
        const __m256 by = _mm256_set1_ps(inverse);
        __m256i c[4];
        for (int i = 0; i < 4; ++i) c[i] = codes8(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), by));
        const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(c[0], c[1]), _mm256_packus_epi32(c[2], c[3]));
        const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const __m256i pairs = _mm256_maddubs_epi16(ordered, _mm256_set1_epi16(0x0110));
        const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
    }

    static __m256 levels8(__m256i code) {
        const __m256 low = load8(kvk::kCodeBits), high = load8(kvk::kCodeBits + 8);
        const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), is_high);
    }
    static void levels32(const uint8_t* codes, float scale, float* out) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m128i nibble = _mm_set1_epi8(15);
        const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), second = _mm_and_si128(bytes, nibble);
        const __m128i a = _mm_unpacklo_epi8(first, second), b = _mm_unpackhi_epi8(first, second);
        const __m256 by = _mm256_set1_ps(scale);
        const __m128i part[4] = {a, _mm_srli_si128(a, 8), b, _mm_srli_si128(b, 8)};
        for (int i = 0; i < 4; ++i)
            _mm256_storeu_ps(out + 8 * i, _mm256_mul_ps(levels8(_mm256_cvtepu8_epi32(part[i])), by));
    }

    static void rotate_small(float* x, int n, int size) {
        for (int h = 1; h < size; h *= 2)
            for (int i = 0; i < n; i += 2 * h)
                for (int j = i; j < i + h; ++j) {
                    const float a = x[j], b = x[j + h];
                    x[j] = a + b;
                    x[j + h] = a - b;
                }
    }
    // Stages 1, 2 and 4 inside a register: the partner plus the value, negated where it is the second.
    static __m256 rotate8(__m256 v) {
        const __m256 n1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
        const __m256 n2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
        const __m256 n4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
        v = _mm256_add_ps(_mm256_permute_ps(v, 0xb1), _mm256_xor_ps(v, n1));
        v = _mm256_add_ps(_mm256_permute_ps(v, 0x4e), _mm256_xor_ps(v, n2));
        return _mm256_add_ps(_mm256_permute2f128_ps(v, v, 1), _mm256_xor_ps(v, n4));
    }
    static void rotate(float* x, int n, int size) {
        if (size < 8) return rotate_small(x, n, size);
        if (size == 64) return rotate_runs<8>(x, n);
        if (size == 128) return rotate_runs<16>(x, n);
        if (size == 32) return rotate_runs<4>(x, n);
        if (size == 16) return rotate_runs<2>(x, n);
        return rotate_runs<1>(x, n);
    }
    template <int kRegisters>
    static void rotate_runs(float* x, int n) {
        for (int i = 0; i < n; i += 8 * kRegisters) {
            __m256 v[kRegisters];
            for (int r = 0; r < kRegisters; ++r) v[r] = rotate8(_mm256_loadu_ps(x + i + 8 * r));
            for (int h = 1; h < kRegisters; h *= 2)
                for (int r = 0; r < kRegisters; ++r)
                    if (!(r & h)) {
                        const __m256 a = v[r], b = v[r + h];
                        v[r] = _mm256_add_ps(a, b);
                        v[r + h] = _mm256_sub_ps(a, b);
                    }
            for (int r = 0; r < kRegisters; ++r) _mm256_storeu_ps(x + i + 8 * r, v[r]);
        }
    }

    static float tree8(__m256 v) {
        __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        q = _mm_add_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
    }
    static float dot(const float* x, const float* y, int n) {
        __m256 s[8];
        const int registers = n / 8;
        for (int r = 0; r < registers; ++r) s[r] = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * r), _mm256_loadu_ps(y + 8 * r));
        for (int half = registers / 2; half; half /= 2)
            for (int r = 0; r < half; ++r) s[r] = _mm256_add_ps(s[r], s[r + half]);
        return tree8(s[0]);
    }

    // For each run of 16 values of u: how many thresholds lie below it, and the at most two inside it.
    struct Buckets {
        alignas(16) int8_t base[kvk::kClips][16], first[kvk::kClips][16], second[kvk::kClips][16];
        alignas(16) int8_t levels[16];
        constexpr Buckets() : base(), first(), second(), levels() {
            for (int i = 0; i < 16; ++i) levels[i] = static_cast<int8_t>(kvk::kSearchLevels[i]);
            for (int clip = 0; clip < kvk::kClips; ++clip)
                for (int bucket = 0; bucket < 16; ++bucket) {
                    const int low = 16 * bucket - 128;
                    int below = 0, inside = 0;
                    int found[2] = {127, 127};
                    for (int t = 0; t < 15; ++t) {
                        const int threshold = kvk::kSearchThresholds[clip][t];
                        if (threshold < low)
                            ++below;
                        else if (threshold < low + 15)
                            found[inside++] = threshold;
                    }
                    base[clip][bucket] = static_cast<int8_t>(below);
                    first[clip][bucket] = static_cast<int8_t>(found[0]);
                    second[clip][bucket] = static_cast<int8_t>(found[1]);
                }
        }
    };

    static __m256i row(const int8_t* table) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    }
    static __m256i integers8(const float* x, __m256 by) {
        return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), by));
    }
    static void clip_sums(const float* x, int n, float inverse, int32_t* a, int32_t* b) {
        static constexpr Buckets kBuckets;
        const __m256 by = _mm256_set1_ps(inverse);
        const __m256i ones = _mm256_set1_epi16(1), levels = row(kBuckets.levels);
        __m256i sa[kvk::kClips], sb[kvk::kClips];
        for (int clip = 0; clip < kvk::kClips; ++clip) sa[clip] = sb[clip] = _mm256_setzero_si256();
        for (int i = 0; i < n; i += 32) {
            // Packing mixes the order of the 32 integers; only their sums are wanted.
            const __m256i low = _mm256_packs_epi32(integers8(x + i, by), integers8(x + i + 8, by));
            const __m256i high = _mm256_packs_epi32(integers8(x + i + 16, by), integers8(x + i + 24, by));
            const __m256i u = _mm256_packs_epi16(low, high);
            const __m256i bucket = _mm256_and_si256(_mm256_srli_epi16(_mm256_xor_si256(u, _mm256_set1_epi8(-128)), 4),
                                                    _mm256_set1_epi8(15));
            const __m256i magnitude = _mm256_abs_epi8(u);
            for (int clip = 0; clip < kvk::kClips; ++clip) {
                __m256i code = _mm256_shuffle_epi8(row(kBuckets.base[clip]), bucket);
                const __m256i first = _mm256_shuffle_epi8(row(kBuckets.first[clip]), bucket);
                const __m256i second = _mm256_shuffle_epi8(row(kBuckets.second[clip]), bucket);
                code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(u, first));
                code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(u, second));
                const __m256i level = _mm256_shuffle_epi8(levels, code);
                const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(level, u));
                const __m256i size = _mm256_abs_epi8(level);
                const __m256i squares = _mm256_maddubs_epi16(size, size);
                sa[clip] = _mm256_add_epi32(sa[clip], _mm256_madd_epi16(products, ones));
                sb[clip] = _mm256_add_epi32(sb[clip], _mm256_madd_epi16(squares, ones));
            }
        }
        const __m256i a4 = _mm256_hadd_epi32(_mm256_hadd_epi32(sa[0], sa[1]), _mm256_hadd_epi32(sa[2], sa[3]));
        const __m256i b4 = _mm256_hadd_epi32(_mm256_hadd_epi32(sb[0], sb[1]), _mm256_hadd_epi32(sb[2], sb[3]));
        const __m256i rest = _mm256_hadd_epi32(sa[4], sb[4]);
        const __m256i last = _mm256_hadd_epi32(rest, rest);
        store_halves(a4, a);
        store_halves(b4, b);
        int32_t ends[4];
        store_halves(last, ends);
        a[4] = ends[0];
        b[4] = ends[1];
    }
    static void store_halves(__m256i v, int32_t* out) {
        const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sum);
    }
};

}  // namespace
