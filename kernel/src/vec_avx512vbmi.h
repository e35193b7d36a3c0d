// AVX-512 with VBMI and VNNI (Ice Lake, Zen 4 and later): the search looks 64 levels up at a time and sums them at once.
#pragma once
#include "vec_avx512.h"

namespace {

struct Avx512Vbmi : Avx512 {
    // |level| of each integer u under each clip: by its low seven bits where it is positive, and where it is negative.
    struct Magnitudes {
        alignas(64) uint8_t positive[kvk::kClips][128], negative[kvk::kClips][128];
        constexpr Magnitudes() : positive(), negative() {
            for (int clip = 0; clip < kvk::kClips; ++clip)
                for (int i = 0; i < 128; ++i) {
                    int above = 0, below = 0;
                    for (int t = 0; t < 15; ++t) {
                        above += i > kvk::kSearchThresholds[clip][t];
                        below += i - 128 > kvk::kSearchThresholds[clip][t];
                    }
                    const int p = kvk::kSearchLevels[above], n = kvk::kSearchLevels[below];
                    positive[clip][i] = static_cast<uint8_t>(p < 0 ? -p : p);
                    negative[clip][i] = static_cast<uint8_t>(n < 0 ? -n : n);
                }
        }
    };

    static void best_clips(const float* x, int blocks, int block, const float* inverse, int* clips) {
        int b = 0;
        for (; b + 16 <= blocks; b += 16) sixteen(x + b * block, block, inverse + b, clips + b);
        for (; b < blocks; ++b) clips[b] = best_clip(x + b * block, block, inverse[b]);
    }

    // Of sixteen blocks: A = sum(u L) and B = sum(L L) for each clip, then A*A/B, the largest, the first of equals.
    static void sixteen(const float* x, int block, const float* inverse, int* clips) {
        __m512 a[kvk::kClips][16], b[kvk::kClips][16];
        const int registers = block == 64 ? 16 : 8;
        for (int i = 0; i < registers; ++i) {
            const __m512i u = block == 64 ? integers_of_64(x + 64 * i, inverse[i]) : integers_of_32s(x + 64 * i, inverse + 2 * i);
            levels_of(u, i, a, b);
        }
        __m512 best = _mm512_set1_ps(-1.0f);
        __m512i found = _mm512_setzero_si512();
#pragma GCC unroll 5
        for (int clip = 0; clip < kvk::kClips; ++clip) {
            const __m512 cross = summed(a[clip], block), size = summed(b[clip], block);
            const __m512 score = _mm512_div_ps(_mm512_mul_ps(cross, cross), size);
            const __mmask16 better = _mm512_cmp_ps_mask(score, best, _CMP_GT_OQ);
            best = _mm512_mask_mov_ps(best, better, score);
            found = _mm512_mask_mov_epi32(found, better, _mm512_set1_epi32(clip));
        }
        _mm512_storeu_si512(clips, found);
    }
    KVK_INLINE __m512 summed(const __m512* v, int block) {
        const __m512 sums = block == 64 ? reduced<AddIntegers>(v) : reduced_halves<AddIntegers>(v);
        return _mm512_cvtepi32_ps(_mm512_castps_si512(sums));
    }
    // 64 integers of a block as bytes. Packing mixes their order; only their sums are wanted.
    KVK_INLINE __m512i integers_of_64(const float* x, float inverse) {
        const __m512 by = _mm512_set1_ps(inverse);
        __m512i u[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) u[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), by));
        return _mm512_packs_epi16(_mm512_packs_epi32(u[0], u[1]), _mm512_packs_epi32(u[2], u[3]));
    }
    // Those of two blocks of 32, the first one in the low half.
    KVK_INLINE __m512i integers_of_32s(const float* x, const float* inverse) {
        const __m512 by = _mm512_insertf32x8(_mm512_set1_ps(inverse[0]), _mm256_set1_ps(inverse[1]), 1);
        __m512i u[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512 first = _mm512_castps256_ps512(_mm256_loadu_ps(x + 8 * i));
            u[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_insertf32x8(first, _mm256_loadu_ps(x + 8 * i + 32), 1), by));
        }
        return _mm512_packs_epi16(_mm512_packs_epi32(u[0], u[1]), _mm512_packs_epi32(u[2], u[3]));
    }
    KVK_INLINE void levels_of(__m512i u, int to, __m512 (*a)[16], __m512 (*b)[16]) {
        static constexpr Magnitudes kMagnitudes;
        const __mmask64 below = _mm512_movepi8_mask(u);
        const __m512i magnitude = _mm512_abs_epi8(u), zero = _mm512_setzero_si512();
#pragma GCC unroll 5
        for (int clip = 0; clip < kvk::kClips; ++clip) {
            const uint8_t *above = kMagnitudes.positive[clip], *under = kMagnitudes.negative[clip];
            const __m512i p = _mm512_permutex2var_epi8(_mm512_load_si512(above), u, _mm512_load_si512(above + 64));
            const __m512i n = _mm512_permutex2var_epi8(_mm512_load_si512(under), u, _mm512_load_si512(under + 64));
            const __m512i level = _mm512_mask_mov_epi8(p, below, n);
            a[clip][to] = _mm512_castsi512_ps(_mm512_dpbusd_epi32(zero, magnitude, level));
            b[clip][to] = _mm512_castsi512_ps(_mm512_dpbusd_epi32(zero, level, level));
        }
    }
};

}  // namespace
