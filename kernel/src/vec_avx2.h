// AVX2, FMA and F16C: eight floats at a time.
#pragma once
#include <immintrin.h>

#include "by_block.h"
#include "convert.h"
#include "rans.h"
#include "tables.h"

// Calls would pass vectors through memory: the compiler's own limits keep some of these out of line.
#define KVK_INLINE __attribute__((always_inline)) static inline

namespace {

struct Avx2 : ByBlock<Avx2> {
    static constexpr bool kFused = true;
    static constexpr int kLanes = 8;
    static constexpr bool kColumns = false;

    // x minus y into out.
    static void load_difference(const float* x, const float* y, float* out, int n) {
        for (int i = 0; i < n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
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
    static __m256i rounded_bf16(__m256 x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        return _mm256_srli_epi32(rounded, 16);
    }
    static void store_bf16(const float* x, uint16_t* out, int n) {
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            const __m256i both = halves_bf16(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), both);
        }
        for (; i < n; ++i) out[i] = float_to_bf16(x[i]);
    }
    // out is 32-byte aligned.
    static void store_stream(const float* x, float* out, int n) {
        for (int i = 0; i < n; i += 8) _mm256_stream_ps(out + i, _mm256_loadu_ps(x + i));
    }
    static void fence() { _mm_sfence(); }

    // x plus y into out, past the caches where `stream` (out is then 32-byte aligned).
    static void store_sum(const float* x, const float* y, float* out, int n, bool stream) {
        for (int i = 0; i < n; i += 8) {
            const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i));
            if (stream)
                _mm256_stream_ps(out + i, sum);
            else
                _mm256_storeu_ps(out + i, sum);
        }
    }
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

    // Minus the codes, by a search of four comparisons: exact for every float, with no table of buckets to
    // trust. A comparison is -1 where true, so indexes count down from 0 and tables are laid out for that.
    static __m256i minus_codes8(__m256 z) {
        const uint32_t* t = kvk::kThresholdBits;
        const __m256 eighth = _mm256_castsi256_ps(_mm256_setr_epi32(
            int(t[1]), int(t[13]), int(t[9]), int(t[5]), int(t[1]), int(t[13]), int(t[9]), int(t[5])));
        const __m256 last = _mm256_castsi256_ps(_mm256_setr_epi32(int(t[0]), int(t[14]), int(t[12]), int(t[10]),
                                                                  int(t[8]), int(t[6]), int(t[4]), int(t[2])));
        const __m256 above = _mm256_cmp_ps(z, _mm256_set1_ps(from_bits(t[7])), _CMP_GT_OQ);
        const __m256 quarter = _mm256_blendv_ps(_mm256_set1_ps(from_bits(t[3])), _mm256_set1_ps(from_bits(t[11])), above);
        __m256i index = _mm256_castps_si256(above);
        index = narrowed(index, _mm256_cmp_ps(z, quarter, _CMP_GT_OQ));
        index = narrowed(index, _mm256_cmp_ps(z, _mm256_permutevar_ps(eighth, index), _CMP_GT_OQ));
        return narrowed(index, _mm256_cmp_ps(z, _mm256_permutevar8x32_ps(last, index), _CMP_GT_OQ));
    }
    static __m256i narrowed(__m256i index, __m256 above) {
        return _mm256_add_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(above));
    }
    // 32 codes as bytes; in each half the even fours of the values, then the odd ones: 0-3 8-11 16-19 24-27 | 4-7 ...
    static __m256i code_bytes(const float* x, __m256 by) {
        __m256i c[4];
        for (int i = 0; i < 4; ++i) c[i] = minus_codes8(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), by));
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
        return _mm256_abs_epi8(bytes);
    }
    static void store_packed(__m256i bytes, uint8_t* out) {
        const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const __m256i pairs = _mm256_maddubs_epi16(ordered, _mm256_set1_epi16(0x0110));
        const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
    }
    static void codes32(const float* x, float inverse, uint8_t* out) {
        store_packed(code_bytes(x, _mm256_set1_ps(inverse)), out);
    }

    // What nf4_tile looks up by nibbles, numbers in one table of 16 for each of their bytes.
    struct StepTables {
        // By the high nibble of u >> 5: thresholds below its run of 16, and the at most two inside it.
        alignas(16) int8_t base[16], first[16], second[16];
        alignas(16) uint8_t level[2][16], threshold[4][16];
        constexpr StepTables() : base(), first(), second(), level(), threshold() {
            for (int i = 0; i < 16; ++i) {
                const int low = 16 * (i < 8 ? i : i - 16);
                int below = 0, inside = 0, found[2] = {127, 127};
                for (int t = 0; t < 15; ++t) {
                    if (kvk::kStepThresholds[t] < low)
                        ++below;
                    else if (kvk::kStepThresholds[t] < low + 15)
                        found[inside++] = kvk::kStepThresholds[t];
                }
                base[i] = static_cast<int8_t>(below);
                first[i] = static_cast<int8_t>(found[0]);
                second[i] = static_cast<int8_t>(found[1]);
                // Above the last threshold there is +inf.
                const uint32_t bits = i < 15 ? kvk::kThresholdBits[i] : 0x7f800000u;
                for (int b = 0; b < 4; ++b) threshold[b][i] = static_cast<uint8_t>(bits >> (8 * b));
                for (int b = 0; b < 2; ++b)
                    level[b][i] = static_cast<uint8_t>(static_cast<uint32_t>(kvk::kLevelSteps[i]) >> (8 * b));
            }
        }
    };
    static __m256i table(const void* at) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(at)));
    }
    // 32 values coded and measured. u >> 5 leaves one threshold that may lie on either side: a single comparison of
    // floats decides, so the codes are exact.
    static void nf4_step(const float* x, __m256 inverse, uint8_t* codes, __m256i* error, __m256i* cross, __m256i* energy) {
        static constexpr StepTables kTables;
        const __m256 by = _mm256_set1_ps(kvk::kSteps);
        __m256 z[4];
        __m256i u[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            z[i] = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse);
            u[i] = _mm256_cvtps_epi32(_mm256_mul_ps(z[i], by));
        }
        const __m256i ua = _mm256_packs_epi32(u[0], u[1]), ub = _mm256_packs_epi32(u[2], u[3]);
        const __m256i coarse = _mm256_packs_epi16(_mm256_srai_epi16(ua, 5), _mm256_srai_epi16(ub, 5));
        const __m256i bucket = _mm256_and_si256(_mm256_srli_epi16(coarse, 4), _mm256_set1_epi8(15));
        __m256i code = _mm256_shuffle_epi8(table(kTables.base), bucket);
        code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(coarse, _mm256_shuffle_epi8(table(kTables.first), bucket)));
        code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(coarse, _mm256_shuffle_epi8(table(kTables.second), bucket)));
        __m256 threshold[4];
        looked_up(kTables.threshold, code, threshold);
        __m256i above[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) above[i] = _mm256_castps_si256(_mm256_cmp_ps(z[i], threshold[i], _CMP_GT_OQ));
        code = _mm256_sub_epi8(
            code, _mm256_packs_epi16(_mm256_packs_epi32(above[0], above[1]), _mm256_packs_epi32(above[2], above[3])));
        store_packed(code, codes);
        const __m256i low = _mm256_shuffle_epi8(table(kTables.level[0]), code);
        const __m256i high = _mm256_shuffle_epi8(table(kTables.level[1]), code);
        const __m256i la = _mm256_unpacklo_epi8(low, high), lb = _mm256_unpackhi_epi8(low, high);
        const __m256i da = _mm256_sub_epi16(ua, la), db = _mm256_sub_epi16(ub, lb);
        *error = _mm256_add_epi32(*error, _mm256_add_epi32(_mm256_madd_epi16(da, da), _mm256_madd_epi16(db, db)));
        *cross = _mm256_add_epi32(*cross, _mm256_add_epi32(_mm256_madd_epi16(da, la), _mm256_madd_epi16(db, lb)));
        *energy = _mm256_add_epi32(*energy, _mm256_add_epi32(_mm256_madd_epi16(ua, ua), _mm256_madd_epi16(ub, ub)));
    }
    // Sums of eight vectors, each into its lane.
    static __m256i sums8(const __m256i* v) {
        const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
        return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    }
    static __m256i most_of(__m256i a, __m256i b) {
        return _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    }
    // Largest of eight vectors each, into its lane.
    static __m256i most8(const __m256i* v) {
        __m256i half[2];
        for (int i = 0; i < 2; ++i) {
            const __m256i a = most_of(v[4 * i], v[4 * i + 1]), b = most_of(v[4 * i + 2], v[4 * i + 3]);
            half[i] = _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
        }
        return _mm256_max_epi32(_mm256_permute2x128_si256(half[0], half[1], 0x20),
                                _mm256_permute2x128_si256(half[0], half[1], 0x31));
    }
    // Eight blocks of 64, coded and measured; scales first, for one division and no chain from block to block.
    static uint32_t nf4_tile(const float* x, uint8_t* codes, float* absmax, kvk::Measured out) {
        __m256i lanes[8];
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        for (int block = 0; block < 8; ++block) {
            const __m256i* at = reinterpret_cast<const __m256i*>(x + 64 * block);
            __m256i a = _mm256_and_si256(_mm256_loadu_si256(at), magnitude);
            __m256i b = _mm256_and_si256(_mm256_loadu_si256(at + 1), magnitude);
#pragma GCC unroll 3
            for (int i = 2; i < 8; i += 2) {
                a = _mm256_max_epi32(a, _mm256_and_si256(_mm256_loadu_si256(at + i), magnitude));
                b = _mm256_max_epi32(b, _mm256_and_si256(_mm256_loadu_si256(at + i + 1), magnitude));
            }
            lanes[block] = _mm256_max_epi32(a, b);
        }
        const __m256i most = most8(lanes);
        const __m256 scale = _mm256_castsi256_ps(most);
        _mm256_storeu_ps(absmax, scale);
        alignas(32) float inverse[8];
        _mm256_store_ps(inverse, _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_max_ps(scale, _mm256_set1_ps(1e-38f))));
        __m256i error[8], cross[8], energy[8];
        for (int block = 0; block < 8; ++block) {
            const __m256 by = _mm256_broadcast_ss(inverse + block);
            __m256i e = _mm256_setzero_si256(), c = e, s = e;
            nf4_step(x + 64 * block, by, codes + 32 * block, &e, &c, &s);
            nf4_step(x + 64 * block + 32, by, codes + 32 * block + 16, &e, &c, &s);
            error[block] = e;
            cross[block] = c;
            energy[block] = s;
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.error), sums8(error));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.cross), sums8(cross));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.energy), sums8(energy));
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
    }

    // The four bytes of each level, a table of 16 apiece: a level is looked up as four byte shuffles of 32 codes.
    struct Planes {
        alignas(16) uint8_t byte[4][16];
        constexpr Planes() : byte() {
            for (int b = 0; b < 4; ++b)
                for (int i = 0; i < 16; ++i) byte[b][i] = static_cast<uint8_t>(kvk::kCodeBits[i] >> (8 * b));
        }
    };
    // Levels of 32 codes in the order of code_bytes, as four vectors in the order of the values.
    KVK_INLINE void level_vectors(__m256i bytes, __m256* out) {
        static constexpr Planes kPlanes;
        looked_up(kPlanes.byte, bytes, out);
    }
    KVK_INLINE void looked_up(const uint8_t (*planes)[16], __m256i bytes, __m256* out) {
        const __m256i b0 = _mm256_shuffle_epi8(table(planes[0]), bytes);
        const __m256i b1 = _mm256_shuffle_epi8(table(planes[1]), bytes);
        const __m256i b2 = _mm256_shuffle_epi8(table(planes[2]), bytes);
        const __m256i b3 = _mm256_shuffle_epi8(table(planes[3]), bytes);
        const __m256i low_a = _mm256_unpacklo_epi8(b0, b1), high_a = _mm256_unpacklo_epi8(b2, b3);
        const __m256i low_b = _mm256_unpackhi_epi8(b0, b1), high_b = _mm256_unpackhi_epi8(b2, b3);
        out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_a, high_a));
        out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_a, high_a));
        out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_b, high_b));
        out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_b, high_b));
    }
    KVK_INLINE void scaled_levels(const uint8_t* codes, float scale, __m256* v) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m128i nibble = _mm_set1_epi8(15);
        const __m128i first = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble), second = _mm_and_si128(packed, nibble);
        const __m256i ordered = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
        level_vectors(_mm256_permutevar8x32_epi32(ordered, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)), v);
        const __m256 by = _mm256_set1_ps(scale);
        for (int i = 0; i < 4; ++i) v[i] = _mm256_mul_ps(v[i], by);
    }
    // 64 levels times scale; registers 2q and 2q + 1 have the even and the odd ones of 16q to 16q + 15.
    KVK_INLINE void levels_by_pairs(const uint8_t* codes, float scale, __m256* v) {
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i bytes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), odd = _mm256_and_si256(bytes, nibble);
        level_vectors(_mm256_unpacklo_epi32(even, odd), v);
        level_vectors(_mm256_unpackhi_epi32(even, odd), v + 4);
        const __m256 by = _mm256_set1_ps(scale);
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) v[r] = _mm256_mul_ps(v[r], by);
    }
    static void levels32(const uint8_t* codes, float scale, float* out) {
        __m256 v[4];
        scaled_levels(codes, scale, v);
        for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + 8 * i, v[i]);
    }

    template <int kHalf>
    static void halved(__m256* a, __m256* b, __m256* c) {
#pragma GCC unroll 8
        for (int r = 0; r < kHalf; ++r) {
            a[r] = _mm256_add_ps(a[r], a[r + kHalf]);
            b[r] = _mm256_add_ps(b[r], b[r + kHalf]);
            c[r] = _mm256_add_ps(c[r], c[r + kHalf]);
        }
        if constexpr (kHalf > 1) halved<kHalf / 2>(a, b, c);
    }

    // Codes of a block, and the sums x.x, x.L and L.L over its levels L, halves added to halves.
    template <int kSize>
    static kvk::Sums code_block(const float* x, float inverse, uint8_t* codes) {
        constexpr int kRegisters = kSize / 8;
        __m256 energy[kRegisters], cross[kRegisters], size[kRegisters];
        const __m256 by = _mm256_set1_ps(inverse);
        for (int i = 0; i < kSize / 32; ++i) {
            const __m256i bytes = code_bytes(x + 32 * i, by);
            store_packed(bytes, codes + 16 * i);
            __m256 level[4];
            level_vectors(bytes, level);
            for (int r = 0; r < 4; ++r) {
                const __m256 v = _mm256_loadu_ps(x + 32 * i + 8 * r);
                energy[4 * i + r] = _mm256_mul_ps(v, v);
                cross[4 * i + r] = _mm256_mul_ps(v, level[r]);
                size[4 * i + r] = _mm256_mul_ps(level[r], level[r]);
            }
        }
        halved<kRegisters / 2>(energy, cross, size);
        return {tree8(energy[0]), tree8(cross[0]), tree8(size[0])};
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
    // a - b, on the multipliers: the adders have the sums beside it. One rounding, as 1 * a is exact.
    KVK_INLINE __m256 minus(__m256 a, __m256 b) { return _mm256_fmsub_ps(a, _mm256_set1_ps(1.0f), b); }
    // Stages of distance kStage registers and up. By recursion: as a loop over distances the compiler keeps v in memory.
    template <int kRegisters, int kStage>
    KVK_INLINE void butterflies(__m256* v) {
        if constexpr (kStage < kRegisters) {
#pragma GCC unroll 16
            for (int r = 0; r < kRegisters; ++r)
                if (!(r & kStage)) {
                    const __m256 a = v[r], b = v[r + kStage];
                    v[r] = _mm256_add_ps(a, b);
                    v[r + kStage] = minus(a, b);
                }
            butterflies<kRegisters, 2 * kStage>(v);
        }
    }
    template <int kRegisters>
    static void rotate_runs(float* x, int n) {
        for (int i = 0; i < n; i += 8 * kRegisters) {
            __m256 v[kRegisters];
#pragma GCC unroll 16
            for (int r = 0; r < kRegisters; ++r) v[r] = rotate8(_mm256_loadu_ps(x + i + 8 * r));
            butterflies<kRegisters, 1>(v);
#pragma GCC unroll 16
            for (int r = 0; r < kRegisters; ++r) _mm256_storeu_ps(x + i + 8 * r, v[r]);
        }
    }

    // 64 levels times their blocks' scales, in registers by their index modulo 8: register r has the values r, 8 + r,
    // 16 + r ... So the first three stages of the rotation need no shuffle. scales: of 0-31 and of 32-63.
    KVK_INLINE void levels_by_columns(const uint8_t* codes, float low, float high, __m256* v) {
        const __m256i turned = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                                13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i bytes = _mm256_shuffle_epi8(packed, turned), nibble = _mm256_set1_epi8(15);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), odd = _mm256_and_si256(bytes, nibble);
        level_vectors(_mm256_unpacklo_epi32(even, odd), v);
        level_vectors(_mm256_unpackhi_epi32(even, odd), v + 4);
        const __m256 by = _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low));
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) v[r] = _mm256_mul_ps(v[r], by);
    }
    // Four registers, each half of them a 4 x 4 matrix, transposed.
    KVK_INLINE void transpose4(__m256* v) {
        const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
        const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
        v[0] = _mm256_shuffle_ps(a, c, 0x44);
        v[1] = _mm256_shuffle_ps(a, c, 0xee);
        v[2] = _mm256_shuffle_ps(b, d, 0x44);
        v[3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    // Stage 32 of rows that lie in the halves of a and b, which then have its sums and its differences.
    KVK_INLINE void last_stage(__m256* a, __m256* b) {
        const __m256 low = _mm256_permute2f128_ps(*a, *b, 0x20), high = _mm256_permute2f128_ps(*a, *b, 0x31);
        *a = _mm256_add_ps(low, high);
        *b = minus(low, high);
    }
    // 64 values by columns, rotated (stages in the order of `rotate`). Register r then has the values 8r to 8r + 7; or, by
    // pairs, 2q and 2q + 1 have the even and the odd ones of 16q to 16q + 15, which 16-bit types need no shuffle to join.
    template <bool kPairs>
    KVK_INLINE void rotate_columns(__m256* v) {
        butterflies<8, 1>(v);
        constexpr int kNext = kPairs ? 2 : 1;
        __m256 a[4], b[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            a[r] = v[kNext * r];
            b[r] = kPairs ? v[2 * r + 1] : v[4 + r];
        }
        transpose4(a);
        transpose4(b);
        butterflies<4, 1>(a);
        butterflies<4, 1>(b);
        if constexpr (kPairs) {
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) {
                last_stage(a + 2 * r, a + 2 * r + 1);
                last_stage(b + 2 * r, b + 2 * r + 1);
                v[2 * r] = a[2 * r];
                v[2 * r + 1] = b[2 * r];
                v[2 * r + 4] = a[2 * r + 1];
                v[2 * r + 5] = b[2 * r + 1];
            }
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                last_stage(a + r, b + r);
                v[r] = a[r];
                v[r + 4] = b[r];
            }
        }
    }
    template <class Vector>
    KVK_INLINE void put(char* out, Vector value, bool stream) {
        if (stream)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(out), value);
        else
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), value);
    }
    // 64 values in their order to out as kDtype.
    template <int kDtype>
    KVK_INLINE void store64(const __m256* v, bool stream, char* out) {
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
            if constexpr (kDtype == KVK_F32)
                put(out + 32 * r, _mm256_castps_si256(v[r]), stream);
            else if (r % 2 == 0)
                put(out + 16 * r, kDtype == KVK_F16 ? halves_f16(v[r], v[r + 1]) : halves_bf16(v[r], v[r + 1]), stream);
        }
    }
    // 64 values by pairs to out as bfloat16. Half a unit is added; only where that hits a tie does the last bit matter.
    KVK_INLINE void store64_pairs(const __m256* v, bool stream, char* out) {
        const __m256i half = _mm256_set1_epi32(0x8000);
        __m256i x[8];
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) x[r] = _mm256_add_epi32(_mm256_castps_si256(v[r]), half);
        __m256i a = _mm256_min_epu16(x[0], x[1]), b = _mm256_min_epu16(x[2], x[3]);
#pragma GCC unroll 2
        for (int r = 4; r < 8; r += 2) {
            a = _mm256_min_epu16(a, x[r]);
            b = _mm256_min_epu16(b, x[r + 1]);
        }
        const __m256i ties = _mm256_cmpeq_epi16(_mm256_min_epu16(a, b), _mm256_setzero_si256());
        if (__builtin_expect(_mm256_movemask_epi8(ties) & 0x33333333, 0)) {
            for (int r = 0; r < 8; ++r)
                x[r] = _mm256_slli_epi32(rounded_bf16(_mm256_castsi256_ps(_mm256_sub_epi32(x[r], half))), 16);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 8; r += 2)
            put(out + 16 * r, _mm256_blend_epi16(_mm256_srli_epi32(x[r], 16), x[r + 1], 0xaa), stream);
    }
    // One block of nf4.
    template <int kDtype>
    static void decode_block(const uint8_t* codes, float scale, bool stream, char* out) {
        __m256 v[8];
        if constexpr (kDtype == KVK_BF16) {
            levels_by_pairs(codes, scale, v);
            store64_pairs(v, stream, out);
        } else {
            scaled_levels(codes, scale, v);
            scaled_levels(codes + 16, scale, v + 4);
            store64<kDtype>(v, stream, out);
        }
    }
    static __m256i halves_f16(__m256 a, __m256 b) {
        return _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static __m256i halves_bf16(__m256 a, __m256 b) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bf16(a), rounded_bf16(b)), 0xd8);
    }
    // The even values of each 16, then the odd ones: means in the order of `rotate_columns` by pairs. n: a multiple of 16.
    static constexpr int kJoined = 16;
    static void by_pairs(const float* x, int64_t n, float* out) {
        for (int64_t i = 0; i < n; i += 16) {
            const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
            const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
            _mm256_storeu_ps(out + i, _mm256_shuffle_ps(low, high, 0x88));
            _mm256_storeu_ps(out + i + 8, _mm256_shuffle_ps(low, high, 0xdd));
        }
    }
    // turn: offsets of the step and the chord of each mean, which then goes on to the next token's (turn.h); null: none.
    template <int kDtype, bool kPairs>
    KVK_INLINE void store_sum64(const __m256* v, float* mean, const int64_t* turn, bool stream, char* out) {
        __m256 sum[8];
        if (turn) {
#if defined(__AVX512F__)
#pragma GCC unroll 4
            for (int r = 0; r < 8; r += 2) {
                const __m512 m = gone_on16(mean + 8 * r, turn);
                sum[r] = _mm256_add_ps(v[r], _mm512_castps512_ps256(m));
                sum[r + 1] = _mm256_add_ps(v[r + 1], _mm512_extractf32x8_ps(m, 1));
            }
#else
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r) {
                float* const at = mean + 8 * r;
                const __m256 m = _mm256_loadu_ps(at), step = _mm256_loadu_ps(at + turn[0]);
                sum[r] = _mm256_add_ps(v[r], m);
                const __m256 next = _mm256_add_ps(m, step);
                _mm256_storeu_ps(at, next);
                _mm256_storeu_ps(at + turn[0], _mm256_sub_ps(step, _mm256_mul_ps(_mm256_loadu_ps(at + turn[1]), next)));
            }
#endif
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r) sum[r] = mean ? _mm256_add_ps(v[r], _mm256_loadu_ps(mean + 8 * r)) : v[r];
        }
        if constexpr (kPairs)
            store64_pairs(sum, stream, out);
        else
            store64<kDtype>(sum, stream, out);
    }
    // Rows of nf4-kv from codes to values without leaving the registers: runs of kSize, 64 or 128, n values in all, that
    // lie one behind the other. scales: one for each block, the rotation's 1/size in it. mean: of the first value, or
    // null; at `end` the row's means begin again at `row`. stream: out is 64-byte aligned.
    template <int kSize, int kDtype, bool kPairs>
    static void decode_runs(const uint8_t* codes, const float* scales, int block, int64_t n, float* mean, float* row,
                            const float* end, const int64_t* turn, bool stream, char* out) {
        constexpr int kBytes = kDtype == KVK_F32 ? 4 : 2;
        const int per = 64 / block;
        for (int64_t i = 0; i < n; i += kSize) {
            __m256 v[8];
            page_ahead(out, kSize * kBytes);
            levels_by_columns(codes, scales[0], scales[per - 1], v);
            rotate_columns<kPairs>(v);
            if constexpr (kSize == 64) {
                store_sum64<kDtype, kPairs>(v, mean, turn, stream, out);
            } else {
                alignas(32) float first[64];
#pragma GCC unroll 8
                for (int r = 0; r < 8; ++r) _mm256_store_ps(first + 8 * r, v[r]);
                levels_by_columns(codes + 32, scales[per], scales[2 * per - 1], v);
                rotate_columns<kPairs>(v);
                __m256 sum[8];
#pragma GCC unroll 8
                for (int r = 0; r < 8; ++r) {
                    const __m256 a = _mm256_load_ps(first + 8 * r);
                    sum[r] = _mm256_add_ps(a, v[r]);
                    v[r] = _mm256_sub_ps(a, v[r]);
                }
                store_sum64<kDtype, kPairs>(sum, mean, turn, stream, out);
                store_sum64<kDtype, kPairs>(v, mean ? mean + 64 : nullptr, turn, stream, out + 64 * kBytes);
            }
            codes += kSize / 2;
            out += kSize * kBytes;
            scales += kSize / block;
            if (mean) mean = mean + kSize == end ? row : mean + kSize;
        }
    }
    // Scales from their bytes under a top, times `shrink`: kv.h's scale_of.
    static void scales(const uint8_t* codes, int n, int32_t top, float shrink, float* out) {
        const __m256i zero = _mm256_setzero_si256();
        for (int i = 0; i < n; i += 8) {
            const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
            // The larger of both ways to count is the one that is meant.
            const __m256i fine = _mm256_sub_epi32(_mm256_set1_epi32(255), code);
            const __m256i coarse = _mm256_sub_epi32(_mm256_set1_epi32(192 + 4 * 63), _mm256_slli_epi32(code, 2));
            const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(top), _mm256_max_epi32(fine, coarse));
            const __m256i bits = _mm256_slli_epi32(_mm256_max_epi32(left, zero), 17);
            const __m256 scale = _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(code, zero), bits));
            _mm256_storeu_ps(out + i, _mm256_mul_ps(scale, _mm256_set1_ps(shrink)));
        }
    }

    static float tree8(__m256 v) {
        __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        q = _mm_add_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
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

    static __m256i integers8(const float* x, __m256 by) {
        return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), by));
    }
    // The clip whose A*A/B is largest, A = sum(u L) and B = sum(L L) for u = round(x * inverse).
    static int best_clip(const float* x, int n, float inverse) {
        static constexpr Buckets kBuckets;
        const __m256 by = _mm256_set1_ps(inverse);
        const __m256i ones = _mm256_set1_epi16(1), levels = table(kBuckets.levels);
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
                __m256i code = _mm256_shuffle_epi8(table(kBuckets.base[clip]), bucket);
                const __m256i first = _mm256_shuffle_epi8(table(kBuckets.first[clip]), bucket);
                const __m256i second = _mm256_shuffle_epi8(table(kBuckets.second[clip]), bucket);
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
        const __m256i rest = _mm256_hadd_epi32(_mm256_hadd_epi32(sa[4], sa[4]), _mm256_hadd_epi32(sb[4], sb[4]));
        const __m128i last = halves(rest);  // A, A, B, B of the fifth
        const __m256 cross = _mm256_cvtepi32_ps(_mm256_set_m128i(last, halves(a4)));
        const __m256 size = _mm256_cvtepi32_ps(_mm256_set_m128i(_mm_shuffle_epi32(last, 0xee), halves(b4)));
        const __m256 score = _mm256_div_ps(_mm256_mul_ps(cross, cross), size);
        // Lanes 5 to 7 hold nothing that may win.
        const __m256 valid = _mm256_blend_ps(score, _mm256_set1_ps(-1.0f), 0xe0);
        __m128 most = _mm_max_ps(_mm256_castps256_ps128(valid), _mm256_extractf128_ps(valid, 1));
        most = _mm_max_ps(most, _mm_movehl_ps(most, most));
        most = _mm_max_ss(most, _mm_shuffle_ps(most, most, 1));
        const __m256 best = _mm256_broadcastss_ps(most);
        return __builtin_ctz(static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(valid, best, _CMP_EQ_OQ))) | 256u);
    }
#if defined(__AVX512F__)
    // Sixteen means, which then go on to the next token's.
    KVK_INLINE __m512 gone_on16(float* at, const int64_t* turn) {
        const __m512 m = _mm512_loadu_ps(at), step = _mm512_loadu_ps(at + turn[0]), next = _mm512_add_ps(m, step);
        _mm512_storeu_ps(at, next);
        _mm512_storeu_ps(at + turn[0], _mm512_sub_ps(step, _mm512_mul_ps(_mm512_loadu_ps(at + turn[1]), next)));
        return m;
    }
#endif
    // x minus turning means into out, and each mean to its next token's (turn.h). turn: offsets of its step and chord.
    static void subtract_turning(const float* x, float* mean, const int64_t* turn, int n, float* out) {
        int i = 0;
#if defined(__AVX512F__)
        for (; i + 16 <= n; i += 16)
            _mm512_storeu_ps(out + i, _mm512_sub_ps(_mm512_loadu_ps(x + i), gone_on16(mean + i, turn)));
#endif
        for (; i < n; i += 8) {
            float* const at = mean + i;
            const __m256 m = _mm256_loadu_ps(at), step = _mm256_loadu_ps(at + turn[0]);
            _mm256_storeu_ps(out + i, _mm256_sub_ps(_mm256_loadu_ps(x + i), m));
            const __m256 next = _mm256_add_ps(m, step);
            _mm256_storeu_ps(at, next);
            _mm256_storeu_ps(at + turn[0], _mm256_sub_ps(step, _mm256_mul_ps(_mm256_loadu_ps(at + turn[1]), next)));
        }
    }
    static __m128i halves(__m256i v) {
        return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    }

    static bool rans_run(kvk::RansStream* stream, int64_t lane, int64_t stop, const uint32_t* slots, uint8_t* out) {
        return kvk::rans_run(stream, lane, stop, slots, out);
    }
};

}  // namespace
