// AVX-512 (F, BW, DQ, VL): sixteen floats at a time where it pays; the rest is AVX2's.
#pragma once
#include "vec_avx2.h"

namespace {

struct Avx512 : Avx2 {
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
    // find the code. Exact: no threshold is within 1e-3 of a bucket's edge (tests/engine/test_kernel.py).
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
    static void codes32(const float* x, float inverse, uint8_t* out) {
        const __m512 by = _mm512_set1_ps(inverse);
        const __m128i a = _mm512_cvtepi32_epi8(codes16(_mm512_mul_ps(_mm512_loadu_ps(x), by)));
        const __m128i b = _mm512_cvtepi32_epi8(codes16(_mm512_mul_ps(_mm512_loadu_ps(x + 16), by)));
        const __m128i weights = _mm_set1_epi16(0x0110);
        const __m128i packed = _mm_packus_epi16(_mm_maddubs_epi16(a, weights), _mm_maddubs_epi16(b, weights));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
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
    // out is 64-byte aligned.
    static void levels32_stream(const uint8_t* codes, float scale, float* out) {
        alignas(64) float v[32];
        levels32(codes, scale, v);
        _mm512_stream_ps(out, _mm512_load_ps(v));
        _mm512_stream_ps(out + 16, _mm512_load_ps(v + 16));
    }
};

}  // namespace
