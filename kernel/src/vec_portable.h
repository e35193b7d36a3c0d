// The portable instruction set: plain loops that any compiler turns into what the machine has.
#pragma once
#include <math.h>

#include "by_block.h"
#include "convert.h"
#include "rans.h"
#include "tables.h"

namespace {

struct Portable : ByBlock<Portable> {
    static constexpr bool kFused = false;
    static constexpr int kJoined = 16;
    static constexpr int kLanes = 8;
    static constexpr bool kColumns = false;

    static float code(int i) { return from_bits(kvk::kCodeBits[i]); }

    static void load(const float* x, float* out, int n) { memcpy(out, x, 4u * static_cast<unsigned>(n)); }
    static void load_f16(const uint16_t* x, float* out, int n) {
        for (int i = 0; i < n; ++i) out[i] = f16_to_float(x[i]);
    }
    static void load_bf16(const uint16_t* x, float* out, int n) {
        for (int i = 0; i < n; ++i) out[i] = bf16_to_float(x[i]);
    }
    static void store_f16(const float* x, uint16_t* out, int n) {
        for (int i = 0; i < n; ++i) out[i] = float_to_f16(x[i]);
    }
    static void store_bf16(const float* x, uint16_t* out, int n) {
        for (int i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
    }
    static void store_stream(const float* x, float* out, int n) { memcpy(out, x, 4u * static_cast<unsigned>(n)); }
    static void fence() {}

    // Scales from their bytes under a top, times `shrink`: n a multiple of 8.
    static void scales(const uint8_t* codes, int n, int32_t top, float shrink, float* out) {
        for (int i = 0; i < n; ++i) out[i] = kvk::scale_of(codes[i], top) * shrink;
    }

    // x plus y into out; nothing here bypasses the caches.
    static void store_sum(const float* x, const float* y, float* out, int n, bool) {
        for (int i = 0; i < n; ++i) out[i] = x[i] + y[i];
    }
    // x minus y into out.
    static void load_difference(const float* x, const float* y, float* out, int n) {
        for (int i = 0; i < n; ++i) out[i] = x[i] - y[i];
    }
    static void add(float* x, const float* y, int n) {
        for (int i = 0; i < n; ++i) x[i] += y[i];
    }
    static void sub(float* x, const float* y, int n) {
        for (int i = 0; i < n; ++i) x[i] -= y[i];
    }

    // Bits of the largest magnitude: an integer maximum, so that NaN counts as the largest.
    static uint32_t absmax_bits(const float* x, int n) {
        uint32_t most = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t bits = to_bits(x[i]) & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        return most;
    }

    static uint8_t code_of(float z) {
        int count = 0;
        for (int i = 0; i < 15; ++i) count += z > from_bits(kvk::kThresholdBits[i]);
        return static_cast<uint8_t>(count);
    }

    // 32 values times inverse, as 16 bytes of codes.
    static void codes32(const float* x, float inverse, uint8_t* out) {
        for (int i = 0; i < 16; ++i)
            out[i] = static_cast<uint8_t>(code_of(x[2 * i] * inverse) << 4 | code_of(x[2 * i + 1] * inverse));
    }
    // Eight blocks of 64, coded and measured.
    static uint32_t nf4_tile(const float* x, uint8_t* codes, float* absmax, kvk::Measured out) {
        uint32_t most = 0;
        for (int block = 0; block < 8; ++block, x += 64, codes += 32) {
            const uint32_t bits = absmax_bits(x, 64);
            most = bits > most ? bits : most;
            const float scale = absmax[block] = from_bits(bits);
            const float inverse = 1.0f / (scale > 1e-38f ? scale : 1e-38f);
            codes32(x, inverse, codes);
            codes32(x + 32, inverse, codes + 16);
            int32_t error = 0, cross = 0, energy = 0;
            for (int i = 0; i < 64; ++i) {
                const int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
                const float steps = nearbyintf(x[i] * inverse * kvk::kSteps);
                // Within bounds for NaN too, whose block is refused: it must convert to something, and its sums fit.
                const int u = static_cast<int>(steps > -4096.0f ? (steps < 4096.0f ? steps : 4096.0f) : -4096.0f);
                const int level = kvk::kLevelSteps[code], d = u - level;
                error += d * d;
                cross += d * level;
                energy += u * u;
            }
            out.error[block] = error;
            out.cross[block] = cross;
            out.energy[block] = energy;
        }
        return most;
    }
    // 16 bytes of codes as 32 levels times scale.
    static void levels32(const uint8_t* codes, float scale, float* out) {
        for (int i = 0; i < 16; ++i) {
            out[2 * i] = code(codes[i] >> 4) * scale;
            out[2 * i + 1] = code(codes[i] & 15) * scale;
        }
    }

    static void rotate(float* x, int n, int size) {
        for (int h = 1; h < size; h *= 2)
            for (int i = 0; i < n; i += 2 * h)
                for (int j = i; j < i + h; ++j) {
                    const float a = x[j], b = x[j + h];
                    x[j] = a + b;
                    x[j + h] = a - b;
                }
    }

    // Sum of x[i]*y[i] over n = 32, 64 or 256, halves added to halves.
    static float dot(const float* x, const float* y, int n) {
        float s[256];
        for (int i = 0; i < n; ++i) s[i] = x[i] * y[i];
        for (int half = n / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) s[i] = s[i] + s[i + half];
        return s[0];
    }
    // Codes of a block, and the sums x.x, x.L and L.L over its levels L.
    template <int kSize>
    static kvk::Sums code_block(const float* x, float inverse, uint8_t* codes) {
        float levels[kSize];
        for (int i = 0; i < kSize; i += 32) {
            codes32(x + i, inverse, codes + i / 2);
            levels32(codes + i / 2, 1.0f, levels + i);
        }
        return {dot(x, x, kSize), dot(x, levels, kSize), dot(levels, levels, kSize)};
    }

    // The clip whose A*A/B is largest, the first of equals: A = sum(u L), B = sum(L L) for u = round(x * inverse).
    static int best_clip(const float* x, int n, float inverse) {
        int32_t a[kvk::kClips] = {}, b[kvk::kClips] = {};
        for (int i = 0; i < n; ++i) {
            const float scaled = nearbyintf(x[i] * inverse);
            const int u = static_cast<int>(scaled < -127.0f ? -127.0f : scaled > 127.0f ? 127.0f : scaled);
            for (int clip = 0; clip < kvk::kClips; ++clip) {
                int count = 0;
                for (int t = 0; t < 15; ++t) count += u > kvk::kSearchThresholds[clip][t];
                const int level = kvk::kSearchLevels[count];
                a[clip] += u * level;
                b[clip] += level * level;
            }
        }
        float best = -1.0f;
        int found = 0;
        for (int clip = 0; clip < kvk::kClips; ++clip) {
            const float cross = static_cast<float>(a[clip]);
            const float score = cross * cross / static_cast<float>(b[clip]);
            if (score > best) {
                best = score;
                found = clip;
            }
        }
        return found;
    }
    // x minus turning means into out, and each mean to its next token's (turn.h). turn: offsets of its step and chord.
    static void subtract_turning(const float* x, float* mean, const int64_t* turn, int n, float* out) {
        float *m = mean, *step = mean + turn[0];
        const float* chord = mean + turn[1];
        for (int i = 0; i < n; ++i) {
            out[i] = x[i] - m[i];
            m[i] += step[i];
            step[i] -= chord[i] * m[i];
        }
    }

    static bool rans_run(kvk::RansStream* stream, int64_t lane, int64_t stop, const uint32_t* slots, uint8_t* out) {
        return kvk::rans_run(stream, lane, stop, slots, out);
    }
};

}  // namespace
