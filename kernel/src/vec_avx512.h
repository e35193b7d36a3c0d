// AVX-512 (F, BW, DQ, VL): sixteen floats at a time where it pays; the rest is AVX2's.
#pragma once
#include "vec_avx2.h"

namespace {

struct Avx512 : Avx2 {
    static constexpr int kLanes = 16;

    static void load_f16(const uint16_t* x, float* out, int n) {
        int i = 0;
        for (; i + 16 <= n; i += 16)
            _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
        Avx2::load_f16(x + i, out + i, n - i);
    }
    static void load_bf16(const uint16_t* x, float* out, int n) {
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
            _mm512_storeu_ps(out + i, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
        }
        Avx2::load_bf16(x + i, out + i, n - i);
    }

    static uint32_t absmax_bits(const float* x, int n) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        __m512i most = _mm512_setzero_si512();
        for (int i = 0; i < n; i += 16)
            most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
        const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
    }

    // Codes by buckets of round(15.49 z): each of the 31 holds one threshold, so a lookup and a comparison
    // find the code. Exact: no threshold is within 1e-3 of a bucket's edge (tests/kvstore/kernels/test_cpu.py).
    struct Buckets {
        alignas(64) uint32_t base[32], threshold[32];
        constexpr Buckets() : base(), threshold() {
            // The bucket of each threshold in order, as found by rounding 15.49 times it.
            constexpr int bucket_of[15] = {-13, -9, -7, -5, -4, -2, -1, 1, 2, 3, 5, 6, 8, 10, 13};
            for (int j = -16; j < 16; ++j) {
                int below = 0;
                uint32_t own = 0x7f800000;  // no threshold here: +inf, never exceeded
                for (int t = 0; t < 15; ++t) {
                    if (bucket_of[t] < j) ++below;
                    if (bucket_of[t] == j) own = kvk::kThresholdBits[t];
                }
                base[j & 31] = static_cast<uint32_t>(below);
                threshold[j & 31] = own;
            }
        }
    };
    static __m512i codes16(__m512 z) {
        static constexpr Buckets kBuckets;
        const __m512 one = _mm512_set1_ps(1.0f);
        z = _mm512_max_ps(_mm512_min_ps(z, one), _mm512_sub_ps(_mm512_setzero_ps(), one));
        // Adding 1.5 * 2^23 leaves the rounded bucket in the low bits, which the permutes take modulo 32.
        const __m512 shifted = _mm512_add_ps(_mm512_mul_ps(z, _mm512_set1_ps(15.49f)), _mm512_set1_ps(12582912.0f));
        const __m512i index = _mm512_castps_si512(shifted);
        const __m512i base = _mm512_permutex2var_epi32(_mm512_load_si512(kBuckets.base), index,
                                                       _mm512_load_si512(kBuckets.base + 16));
        const __m512 threshold = _mm512_permutex2var_ps(_mm512_load_ps(kBuckets.threshold), index,
                                                        _mm512_load_ps(kBuckets.threshold + 16));
        const __mmask16 above = _mm512_cmp_ps_mask(z, threshold, _CMP_GT_OQ);
        return _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
    }
    static void store_packed(__m512i first, __m512i second, uint8_t* out) {
        const __m128i a = _mm512_cvtepi32_epi8(first), b = _mm512_cvtepi32_epi8(second);
        const __m128i weights = _mm_set1_epi16(0x0110);
        const __m128i packed = _mm_packus_epi16(_mm_maddubs_epi16(a, weights), _mm_maddubs_epi16(b, weights));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
    }
    static void codes32(const float* x, float inverse, uint8_t* out) {
        const __m512 by = _mm512_set1_ps(inverse);
        store_packed(codes16(_mm512_mul_ps(_mm512_loadu_ps(x), by)), codes16(_mm512_mul_ps(_mm512_loadu_ps(x + 16), by)),
                     out);
    }

    // Codes of a block, and the sums x.x, x.L and L.L over its levels L, halves added to halves.
    template <int kSize>
    static kvk::Sums code_block(const float* x, float inverse, uint8_t* codes) {
        constexpr int kRegisters = kSize / 16;
        __m512 energy[kRegisters], cross[kRegisters], size[kRegisters];
        const __m512 by = _mm512_set1_ps(inverse), table = _mm512_loadu_ps(kvk::kCodeBits);
        for (int i = 0; i < kRegisters; i += 2) {
            __m512i code[2];
            for (int r = 0; r < 2; ++r) {
                const __m512 v = _mm512_loadu_ps(x + 16 * (i + r));
                code[r] = codes16(_mm512_mul_ps(v, by));
                const __m512 level = _mm512_permutexvar_ps(code[r], table);
                energy[i + r] = _mm512_mul_ps(v, v);
                cross[i + r] = _mm512_mul_ps(v, level);
                size[i + r] = _mm512_mul_ps(level, level);
            }
            store_packed(code[0], code[1], codes + 8 * i);
        }
        return {tree<kRegisters>(energy), tree<kRegisters>(cross), tree<kRegisters>(size)};
    }
    template <int kRegisters>
    static float tree(__m512* v) {
        if constexpr (kRegisters == 4) {
            v[0] = _mm512_add_ps(v[0], v[2]);
            v[1] = _mm512_add_ps(v[1], v[3]);
        }
        const __m512 sum = _mm512_add_ps(v[0], v[1]);
        return tree8(_mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1)));
    }

    // A stage inside registers: the partner plus the value, or minus it where it is the second. One rounding.
    KVK_INLINE __m512 stage16(__m512 v, __m512 partner, __mmask16 second) {
        const __m512 one = _mm512_set1_ps(1.0f);
        return _mm512_fmadd_ps(v, _mm512_mask_sub_ps(one, second, _mm512_setzero_ps(), one), partner);
    }
    // The stages inside registers. One of all registers after the other: so the processor finds operations that wait for
    // nobody.
    template <int kRegisters>
    KVK_INLINE void lane_stages(__m512* v) {
#pragma GCC unroll 16
        for (int r = 0; r < kRegisters; ++r) v[r] = stage16(v[r], _mm512_permute_ps(v[r], 0xb1), 0xaaaa);
#pragma GCC unroll 16
        for (int r = 0; r < kRegisters; ++r) v[r] = stage16(v[r], _mm512_permute_ps(v[r], 0x4e), 0xcccc);
#pragma GCC unroll 16
        for (int r = 0; r < kRegisters; ++r) v[r] = stage16(v[r], _mm512_shuffle_f32x4(v[r], v[r], 0xb1), 0xf0f0);
#pragma GCC unroll 16
        for (int r = 0; r < kRegisters; ++r) v[r] = stage16(v[r], _mm512_shuffle_f32x4(v[r], v[r], 0x4e), 0xff00);
    }
    // The stage of distance kStage registers.
    template <int kRegisters, int kStage>
    KVK_INLINE void pairs_wide(__m512* v) {
#pragma GCC unroll 16
        for (int r = 0; r < kRegisters; ++r)
            if (!(r & kStage)) {
                const __m512 a = v[r], b = v[r + kStage];
                v[r] = _mm512_add_ps(a, b);
                v[r + kStage] = _mm512_sub_ps(a, b);
            }
    }
    template <int kRegisters, int kRun>
    KVK_INLINE void rotate_some(float* x) {
        __m512 v[kRegisters];
#pragma GCC unroll 16
        for (int r = 0; r < kRegisters; ++r) v[r] = _mm512_loadu_ps(x + 16 * r);
        lane_stages<kRegisters>(v);
        if constexpr (kRun > 1) pairs_wide<kRegisters, 1>(v);
        if constexpr (kRun > 2) pairs_wide<kRegisters, 2>(v);
        if constexpr (kRun > 4) pairs_wide<kRegisters, 4>(v);
#pragma GCC unroll 16
        for (int r = 0; r < kRegisters; ++r) _mm512_storeu_ps(x + 16 * r, v[r]);
    }
    // Runs of kRun registers.
    template <int kRun>
    static void rotate_wide(float* x, int n) {
        for (; n >= 256; n -= 256, x += 256) rotate_some<16, kRun>(x);
        for (; n > 0; n -= 16 * kRun, x += 16 * kRun) rotate_some<kRun, kRun>(x);
    }
    static void rotate(float* x, int n, int size) {
        if (size == 64) return rotate_wide<4>(x, n);
        if (size == 128) return rotate_wide<8>(x, n);
        if (size == 32) return rotate_wide<2>(x, n);
        if (size == 16) return rotate_wide<1>(x, n);
        return Avx2::rotate(x, n, size);
    }

    static void levels32(const uint8_t* codes, float scale, float* out) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m128i nibble = _mm_set1_epi8(15);
        const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), second = _mm_and_si128(bytes, nibble);
        const __m512i a = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));
        const __m512i b = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(first, second));
        const __m512 table = _mm512_loadu_ps(kvk::kCodeBits), by = _mm512_set1_ps(scale);
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_permutexvar_ps(a, table), by));
        _mm512_storeu_ps(out + 16, _mm512_mul_ps(_mm512_permutexvar_ps(b, table), by));
    }

    // 64 levels times their blocks' scales: registers 2q and 2q + 1 have the even and the odd ones of 32q to 32q + 31, as
    // a byte holds one of each. scales: of 0-31 and of 32-63.
    KVK_INLINE void levels_by_halves(const uint8_t* codes, float low, float high, __m512* v) {
        const __m512 table = _mm512_loadu_ps(kvk::kCodeBits);
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
            const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * q));
            const __m512i bytes = _mm512_cvtepu8_epi32(packed);  // a permute looks at four bits of each
            const __m512 levels = _mm512_mul_ps(table, _mm512_set1_ps(q ? high : low));
            v[2 * q] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels);
            v[2 * q + 1] = _mm512_permutexvar_ps(bytes, levels);
        }
    }
    // 64 values by halves, 16 kRegisters in all, rotated (stages in the order of `rotate`).
    template <int kRegisters>
    KVK_INLINE void rotate_halves(__m512* v) {
        pairs_wide<kRegisters, 1>(v);
        lane_stages<kRegisters>(v);
        pairs_wide<kRegisters, 2>(v);
    }
    // Values by halves in their order.
    KVK_INLINE void in_order(__m512* v) {
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 2
        for (int q = 0; q < 4; q += 2) {
            const __m512 even = v[q], odd = v[q + 1];
            v[q] = _mm512_permutex2var_ps(even, low, odd);
            v[q + 1] = _mm512_permutex2var_ps(even, high, odd);
        }
    }
    KVK_INLINE void put_wide(char* out, __m512i value, bool stream) {
        if (stream)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out), value);
        else
            _mm512_storeu_si512(out, value);
    }
    // 64 values in their order to out as kDtype, by halves where that is bfloat16: half a unit is added, and only where that
    // hits a tie does the last bit matter.
    template <int kDtype>
    KVK_INLINE void store64_wide(const __m512* v, bool stream, char* out) {
        if constexpr (kDtype == KVK_F32) {
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) put_wide(out + 64 * r, _mm512_castps_si512(v[r]), stream);
        } else if constexpr (kDtype == KVK_F16) {
#pragma GCC unroll 2
            for (int r = 0; r < 4; r += 2) {
                const __m256i a = _mm512_cvtps_ph(v[r], _MM_FROUND_TO_NEAREST_INT);
                const __m256i b = _mm512_cvtps_ph(v[r + 1], _MM_FROUND_TO_NEAREST_INT);
                put_wide(out + 32 * r, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1), stream);
            }
        } else {
            const __m512i half = _mm512_set1_epi32(0x8000), low = _mm512_set1_epi32(0xffff);
            __m512i x[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) x[r] = _mm512_add_epi32(_mm512_castps_si512(v[r]), half);
            const __m512i least = _mm512_min_epu16(_mm512_min_epu16(x[0], x[1]), _mm512_min_epu16(x[2], x[3]));
            if (__builtin_expect(_mm512_testn_epi32_mask(least, low), 0)) {
                for (int r = 0; r < 4; ++r) {
                    const __m512i bits = _mm512_castps_si512(v[r]);
                    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
                    x[r] = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < 4; r += 2)  // the even ones' upper halves below the odd ones'
                put_wide(out + 32 * r, _mm512_ternarylogic_epi32(_mm512_srli_epi32(x[r], 16), x[r + 1], low, 0xf4), stream);
        }
    }
    // One block of nf4.
    template <int kDtype>
    static void decode_block(const uint8_t* codes, float scale, bool stream, char* out) {
        __m512 v[4];
        levels_by_halves(codes, scale, scale, v);
        if constexpr (kDtype != KVK_BF16) in_order(v);
        store64_wide<kDtype>(v, stream, out);
    }
    // The even values of each 32, then the odd ones. n: a multiple of 32.
    static constexpr int kJoined = 32;
    static void by_pairs(const float* x, int64_t n, float* out) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        for (int64_t i = 0; i < n; i += 32) {
            const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + 16);
            _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(a, even, b));
            _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(a, odd, b));
        }
    }
    // 64 rotated values by halves, with their means, which are in their order unless by pairs (Avx2::decode_runs).
    template <int kDtype, bool kPairs>
    KVK_INLINE void finish64(__m512* v, float* mean, const int64_t* turn, bool stream, char* out) {
        if constexpr (!kPairs) in_order(v);
        if (turn) {
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) v[r] = _mm512_add_ps(v[r], gone_on16(mean + 16 * r, turn));
        } else if (mean) {
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) v[r] = _mm512_add_ps(v[r], _mm512_loadu_ps(mean + 16 * r));
        }
        if constexpr (kDtype == KVK_BF16 && !kPairs) by_halves(v);
        store64_wide<kDtype>(v, stream, out);
    }
    KVK_INLINE void by_halves(__m512* v) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
#pragma GCC unroll 2
        for (int q = 0; q < 4; q += 2) {
            const __m512 a = v[q], b = v[q + 1];
            v[q] = _mm512_permutex2var_ps(a, even, b);
            v[q + 1] = _mm512_permutex2var_ps(a, odd, b);
        }
    }
    // Where decoding is, and what stays (Avx2::decode_runs).
    struct Runs {
        const uint8_t* codes;
        const float* scales;
        int block;
        float *mean, *row;
        const float* end;
        const int64_t* turn;
        bool stream;
        char* out;
    };
    // The next 16 kRegisters values: runs of 64 or 128.
    template <int kRegisters, int kSize, int kDtype, bool kPairs>
    KVK_INLINE void decode_some(Runs* at) {
        constexpr int kBytes = kDtype == KVK_F32 ? 4 : 2;
        const int per = 64 / at->block;
        __m512 v[kRegisters];
        page_ahead(at->out, 16 * kRegisters * kBytes);
#pragma GCC unroll 4
        for (int r = 0; r < kRegisters; r += 4, at->codes += 32, at->scales += per)
            levels_by_halves(at->codes, at->scales[0], at->scales[per - 1], v + r);
        rotate_halves<kRegisters>(v);
        if constexpr (kSize == 128) pairs_wide<kRegisters, 4>(v);
#pragma GCC unroll 4
        for (int r = 0; r < kRegisters; r += 4, at->out += 64 * kBytes) {
            finish64<kDtype, kPairs>(v + r, at->mean, at->turn, at->stream, at->out);
            if (at->mean) at->mean = at->mean + 64 == at->end ? at->row : at->mean + 64;
        }
    }
    // As Avx2::decode_runs. 256 values at a time: one block's operations wait for each other.
    template <int kSize, int kDtype, bool kPairs>
    static void decode_runs(const uint8_t* codes, const float* scales, int block, int64_t n, float* mean, float* row,
                            const float* end, const int64_t* turn, bool stream, char* out) {
        Runs at = {codes, scales, block, mean, row, end, turn, stream, out};
        for (; n >= 256; n -= 256) decode_some<16, kSize, kDtype, kPairs>(&at);
        for (; n > 0; n -= kSize) decode_some<kSize / 16, kSize, kDtype, kPairs>(&at);
    }

    // Whole rows of tokens one behind the other under means that turn (Avx2::decode_runs says how): a run of all of them
    // after the other, so that its means are fetched and written once for 256 values.
    static constexpr bool kColumns = true;
    template <int kSize, int kDtype>
    static void decode_turning(const uint8_t* codes, const float* scales, int block, int64_t tokens, int64_t width,
                               float* mean, const int64_t* turn, bool stream, char* out) {
        constexpr int kBytes = kDtype == KVK_F32 ? 4 : 2, kTogether = 256 / kSize;
        for (int64_t t = 0; t < tokens; ++t) page_ahead(out + (tokens + t) * width * kBytes, width * kBytes);
        for (int64_t c = 0; c < width; c += kSize) {
            Rows at = {codes + c / 2, scales + c / block, block, width, mean + c, turn, stream, out + c * kBytes};
            int64_t t = 0;
            for (; t + kTogether <= tokens; t += kTogether) turning_some<kTogether, kSize, kDtype>(&at);
            for (; t < tokens; ++t) turning_some<1, kSize, kDtype>(&at);
        }
    }
    struct Rows {
        const uint8_t* codes;
        const float* scales;
        int block;
        int64_t width;
        float* mean;
        const int64_t* turn;
        bool stream;
        char* out;
    };
    // A run of the next kTokens tokens.
    template <int kTokens, int kSize, int kDtype>
    KVK_INLINE void turning_some(Rows* at) {
        constexpr int kEach = kSize / 16, kBytes = kDtype == KVK_F32 ? 4 : 2;
        const int per = 64 / at->block;
        __m512 v[kTokens * kEach];
#pragma GCC unroll 4
        for (int j = 0; j < kTokens; ++j, at->codes += at->width / 2, at->scales += at->width / at->block) {
#pragma GCC unroll 2
            for (int r = 0; r < kEach; r += 4)
                levels_by_halves(at->codes + 8 * r, at->scales[r / 4 * per], at->scales[r / 4 * per + per - 1], v + kEach * j + r);
        }
        rotate_halves<kTokens * kEach>(v);
        if constexpr (kSize == 128) pairs_wide<kTokens * kEach, 4>(v);
        if constexpr (kDtype != KVK_BF16) {
#pragma GCC unroll 4
            for (int r = 0; r < kTokens * kEach; r += 4) in_order(v + r);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kEach; ++r) {
            float* const to = at->mean + 16 * r;
            __m512 m = _mm512_loadu_ps(to), step = _mm512_loadu_ps(to + at->turn[0]);
            const __m512 chord = _mm512_loadu_ps(to + at->turn[1]);
#pragma GCC unroll 4
            for (int j = 0; j < kTokens; ++j) {
                v[kEach * j + r] = _mm512_add_ps(v[kEach * j + r], m);
                m = _mm512_add_ps(m, step);
                step = _mm512_sub_ps(step, _mm512_mul_ps(chord, m));
            }
            _mm512_storeu_ps(to, m);
            _mm512_storeu_ps(to + at->turn[0], step);
        }
#pragma GCC unroll 4
        for (int j = 0; j < kTokens; ++j, at->out += at->width * kBytes) {
#pragma GCC unroll 2
            for (int r = 0; r < kEach; r += 4) store64_wide<kDtype>(v + kEach * j + r, at->stream, at->out + 16 * r * kBytes);
        }
    }

    // Sixteen vectors reduced at once, each into its lane: halves with halves, as a tree of one vector would be.
    struct Add {
        KVK_INLINE __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    };
    struct AddIntegers {
        KVK_INLINE __m512 of(__m512 a, __m512 b) {
            return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
        }
    };
    struct Most {
        KVK_INLINE __m512 of(__m512 a, __m512 b) {
            return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
        }
    };
    template <class Op>
    KVK_INLINE __m512 reduced(const __m512* v) {
        __m512 half[8];
#pragma GCC unroll 16
        for (int i = 0; i < 8; ++i)
            half[i] = Op::of(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
        return reduced_halves<Op>(half);
    }
    // The same of sixteen halves of vectors.
    template <class Op>
    KVK_INLINE __m512 reduced_halves(const __m512* v) {
        __m512 a[4], b[2];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            a[i] = Op::of(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                          _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
            b[i] = Op::of(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        }
        const __m512 mixed = Op::of(_mm512_shuffle_ps(b[0], b[1], 0x88), _mm512_shuffle_ps(b[0], b[1], 0xdd));
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm512_permutexvar_ps(order, mixed);
    }

    static void absmaxes(const float* x, int blocks, int block, float* most) {
        const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
        int b = 0;
        for (; b + 16 <= blocks; b += 16) {
            __m512 v[16];
            for (int i = 0; i < 16; ++i) {
                const float* at = x + (b + i) * block;
                v[i] = _mm512_and_ps(_mm512_loadu_ps(at), magnitude);
                for (int j = 16; j < block; j += 16)
                    v[i] = Most::of(v[i], _mm512_and_ps(_mm512_loadu_ps(at + j), magnitude));
            }
            _mm512_storeu_ps(most + b, reduced<Most>(v));
        }
        Avx2::absmaxes(x + b * block, blocks - b, block, most + b);
    }

    template <int kSize>
    static void code_blocks(const float* x, int blocks, const float* inverse, uint8_t* codes, const kvk::BlockSums& sums) {
        const __m512 table = _mm512_loadu_ps(kvk::kCodeBits);
        int b = 0;
        for (; b + 16 <= blocks; b += 16) {
            __m512 energy[16], cross[16], size[16];
            for (int i = 0; i < 16; ++i, x += kSize, codes += kSize / 2) {
                constexpr int kRegisters = kSize / 16;
                __m512 e[kRegisters], c[kRegisters], s[kRegisters];
                const __m512 by = _mm512_set1_ps(inverse[b + i]);
#pragma GCC unroll 2
                for (int r = 0; r < kRegisters; r += 2) {
                    __m512i code[2];
#pragma GCC unroll 2
                    for (int h = 0; h < 2; ++h) {
                        const __m512 v = _mm512_loadu_ps(x + 16 * (r + h));
                        code[h] = codes16(_mm512_mul_ps(v, by));
                        const __m512 level = _mm512_permutexvar_ps(code[h], table);
                        e[r + h] = _mm512_mul_ps(v, v);
                        c[r + h] = _mm512_mul_ps(v, level);
                        s[r + h] = _mm512_mul_ps(level, level);
                    }
                    store_packed(code[0], code[1], codes + 8 * r);
                }
                energy[i] = wide_sum<kRegisters>(e);
                cross[i] = wide_sum<kRegisters>(c);
                size[i] = wide_sum<kRegisters>(s);
            }
            _mm512_storeu_ps(sums.energy + b, reduced<Add>(energy));
            _mm512_storeu_ps(sums.cross + b, reduced<Add>(cross));
            _mm512_storeu_ps(sums.size + b, reduced<Add>(size));
        }
        for (; b < blocks; ++b, x += kSize, codes += kSize / 2) sums.set(b, code_block<kSize>(x, inverse[b], codes));
    }
    template <int kRegisters>
    KVK_INLINE __m512 wide_sum(const __m512* v) {
        if constexpr (kRegisters == 4) return _mm512_add_ps(_mm512_add_ps(v[0], v[2]), _mm512_add_ps(v[1], v[3]));
        return _mm512_add_ps(v[0], v[1]);
    }

    // Sixteen lanes at a time: a slot each by one gather, words handed out to those lanes that want one, in order.
    static bool rans_run(kvk::RansStream* stream, int64_t lane, int64_t stop, const uint32_t* slots, uint8_t* out) {
        const __m512i low = _mm512_set1_epi32((1 << kvk::kRansBits) - 1), one = _mm512_set1_epi32(1);
        const uint8_t* word = stream->word;
        for (; lane < stop; lane += 16, out += 16) {
            const int some = stop - lane < 16 ? static_cast<int>(stop - lane) : 16;
            const __mmask16 mask = static_cast<__mmask16>((1u << some) - 1);
            const __m512i x = _mm512_maskz_loadu_epi32(mask, stream->states + lane);
            const __m512i slot = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, _mm512_and_si512(x, low), slots, 4);
            _mm512_mask_cvtepi32_storeu_epi8(out, mask, slot);
            const __m512i count = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(slot, 8), low), one);
            const __m512i y = _mm512_add_epi32(_mm512_mullo_epi32(count, _mm512_srli_epi32(x, kvk::kRansBits)),
                                               _mm512_srli_epi32(slot, 20));
            const __mmask16 wanting = _mm512_mask_cmplt_epu32_mask(mask, y, _mm512_set1_epi32(kvk::kRansLow));
            const int words = __builtin_popcount(wanting);
            if (stream->end - word < 2 * words) return false;
            const __m256i more = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << words) - 1), word);
            const __m512i given = _mm512_maskz_expand_epi32(wanting, _mm512_cvtepu16_epi32(more));
            const __m512i next = _mm512_mask_or_epi32(y, wanting, _mm512_slli_epi32(y, 16), given);
            _mm512_mask_storeu_epi32(stream->states + lane, mask, next);
            word += 2 * words;
        }
        stream->word = word;
        return true;
    }
};

}  // namespace
