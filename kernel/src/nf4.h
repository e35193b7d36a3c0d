// NF4 in blocks of 64 over one instruction set. Works on whole blocks; the caller splits threads at blocks.
#pragma once
#include "vec_any.h"

namespace {

template <class Isa>
struct Nf4 {
    static constexpr int kBlock = 64;

    static constexpr int kTile = 8;  // blocks coded at once
    static constexpr int kFar = 64;  // blocks ahead that the caches are told of what is read

    // n values as floats: x itself or a copy in scratch, padded with zeros to a whole tile.
    static const float* floats(int dtype, const char* x, int n, float* scratch) {
        if (dtype == KVK_F32) {
            if (n == kTile * kBlock) return reinterpret_cast<const float*>(x);
            memcpy(scratch, x, static_cast<size_t>(n) * 4);
        } else if (dtype == KVK_F16) {
            Isa::load_f16(reinterpret_cast<const uint16_t*>(x), scratch, n);
        } else {
            Isa::load_bf16(reinterpret_cast<const uint16_t*>(x), scratch, n);
        }
        for (int i = n; i < kTile * kBlock; ++i) scratch[i] = 0.0f;
        return scratch;
    }

    // Full blocks [begin, end). Returns the bits of the largest magnitude seen.
    static uint32_t encode(int dtype, const void* x, int64_t begin, int64_t end, uint8_t* codes, float* absmax,
                           kvk::Measured out) {
        const char* source = static_cast<const char*>(x);
        const int64_t itemsize = dtype == KVK_F32 ? 4 : 2;
        uint32_t most = 0;
        alignas(64) float scratch[kTile * kBlock];
        for (int64_t block = begin; block < end; block += kTile) {
            const int n = static_cast<int>(end - block < kTile ? end - block : kTile);
            lines_ahead(source + (block + kFar) * kBlock * itemsize, kTile * kBlock * itemsize);
            const float* v = floats(dtype, source + block * kBlock * itemsize, n * kBlock, scratch);
            uint32_t bits;
            if (n == kTile) {
                const kvk::Measured at = {out.error + block, out.cross + block, out.energy + block};
                bits = Isa::nf4_tile(v, codes + block * 32, absmax + block, at);
            } else {
                uint8_t some_codes[32 * kTile];
                float some_scales[kTile];
                int32_t sums[3][kTile];
                bits = Isa::nf4_tile(v, some_codes, some_scales, {sums[0], sums[1], sums[2]});
                memcpy(codes + block * 32, some_codes, static_cast<size_t>(n) * 32);
                memcpy(absmax + block, some_scales, static_cast<size_t>(n) * 4);
                memcpy(out.error + block, sums[0], static_cast<size_t>(n) * 4);
                memcpy(out.cross + block, sums[1], static_cast<size_t>(n) * 4);
                memcpy(out.energy + block, sums[2], static_cast<size_t>(n) * 4);
            }
            most = bits > most ? bits : most;
        }
        return most;
    }

    // The short last block: n values, 0 < n < 64. It divides and stores at least 1e-38 (a bitsandbytes quirk).
    static uint32_t encode_tail(int dtype, const void* x, int n, uint8_t* codes, float* absmax, kvk::Measured out) {
        alignas(64) float v[kBlock] = {};
        for (int i = 0; i < n; ++i) {
            if (dtype == KVK_F32)
                v[i] = static_cast<const float*>(x)[i];
            else if (dtype == KVK_F16)
                v[i] = f16_to_float(static_cast<const uint16_t*>(x)[i]);
            else
                v[i] = bf16_to_float(static_cast<const uint16_t*>(x)[i]);
        }
        const uint32_t bits = Isa::absmax_bits(v, kBlock);
        const float scale = from_bits(bits);
        absmax[0] = scale > 1e-38f ? scale : 1e-38f;
        for (int i = 0; i < n; ++i) v[i] = v[i] / absmax[0];
        uint8_t packed[32];
        Isa::codes32(v, 1.0f, packed);
        Isa::codes32(v + 32, 1.0f, packed + 16);
        memcpy(codes, packed, static_cast<size_t>((n + 1) / 2));
        *out.error = *out.cross = *out.energy = 0;
        for (int i = 0; i < n && bits < 0x7f800000u; ++i) {
            const int u = static_cast<int>(__builtin_nearbyintf(v[i] * kvk::kSteps));
            const int level = kvk::kLevelSteps[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4], d = u - level;
            *out.error += d * d;
            *out.cross += d * level;
            *out.energy += u * u;
        }
        return bits;
    }

    // Full blocks [begin, end) into out, past the caches where `stream` (out is then 64-byte aligned).
    static void decode(int dtype, const uint8_t* codes, const float* absmax, int64_t begin, int64_t end, bool stream,
                       void* out) {
        alignas(64) float v[kBlock];
        for (int64_t block = begin; block < end; ++block) {
            const uint8_t* packed = codes + block * 32;
            if constexpr (Isa::kFused) {
                const int nbytes = kBlock * (dtype == KVK_F32 ? 4 : 2);
                char* to = static_cast<char*>(out) + block * nbytes;
                page_ahead(to, nbytes);
                if (dtype == KVK_F32)
                    Isa::template decode_block<KVK_F32>(packed, absmax[block], stream, to);
                else if (dtype == KVK_F16)
                    Isa::template decode_block<KVK_F16>(packed, absmax[block], stream, to);
                else
                    Isa::template decode_block<KVK_BF16>(packed, absmax[block], stream, to);
                continue;
            }
            float* into = dtype == KVK_F32 ? static_cast<float*>(out) + block * kBlock : v;
            Isa::levels32(packed, absmax[block], into);
            Isa::levels32(packed + 16, absmax[block], into + 32);
            uint16_t* half = static_cast<uint16_t*>(out) + block * kBlock;
            if (dtype == KVK_F16)
                Isa::store_f16(v, half, kBlock);
            else if (dtype == KVK_BF16)
                Isa::store_bf16(v, half, kBlock);
        }
        if (stream) Isa::fence();
    }

    static void decode_tail(int dtype, const uint8_t* codes, float absmax, int n, void* out) {
        alignas(64) float v[kBlock];
        uint8_t packed[32] = {};
        memcpy(packed, codes, static_cast<size_t>((n + 1) / 2));
        Isa::levels32(packed, absmax, v);
        Isa::levels32(packed + 16, absmax, v + 32);
        for (int i = 0; i < n; ++i) {
            if (dtype == KVK_F32)
                static_cast<float*>(out)[i] = v[i];
            else
                static_cast<uint16_t*>(out)[i] = dtype == KVK_F16 ? float_to_f16(v[i]) : float_to_bf16(v[i]);
        }
    }

    // Double quantization: scales about their mean, as a place among 65,536 in [-1, 1], as its code. Groups [begin,
    // end) of 256; squares gets each one's squared error and energy.
    static void scales(const float* absmax, int64_t b, float offset, const uint8_t* lut, const float* map,
                       kvk::Measured in, int64_t begin, int64_t end, uint8_t* codes, float* nested, double* squares) {
        for (int64_t group = begin; group < end; ++group) {
            const int64_t first = group * kNested;
            const int n = static_cast<int>(b - first < kNested ? b - first : kNested);
            alignas(64) float centred[kNested] = {};
            int32_t position[kNested];
            for (int i = 0; i < n; ++i) centred[i] = absmax[first + i] - offset;
            const float most = from_bits(Isa::absmax_bits(centred, kNested));
            nested[group] = most;
            const float inverse = 1.0f / most;
            for (int i = 0; i < kNested; ++i) {
                const float scaled = centred[i] * inverse;
                // NaN, of a group of equal scales, fails the first comparison and takes code 0.
                const float low = scaled > -1.0f ? scaled : -1.0f;
                const float z = low < 1.0f ? low : 1.0f;
                const double exact = static_cast<double>((z + 1.0f) * 0.5f) * 65535.0 + 0.5;
                position[i] = static_cast<int32_t>(static_cast<float>(exact));
            }
            for (int i = 0; i < n; ++i) codes[first + i] = lut[position[i] < 65535 ? position[i] : 65535];
            measure(absmax + first, n, offset, most, map, codes + first,
                    {in.error + first, in.cross + first, in.energy + first}, squares + 2 * group);
        }
    }

    // Of n <= 256 blocks whose values are u * scale and come back as l * decoded, in steps: the squared error
    // sum((scale (u - l) - (decoded - scale) l)^2), and the energy.
    static void measure(const float* absmax, int n, float offset, float nested, const float* map, const uint8_t* codes,
                        kvk::Measured in, double* squares) {
        double total[2][8] = {};  // sums that a vector can hold, added up in one order on every instruction set
        for (int i = 0; i < n; ++i) {
            const float scale = absmax[i] > 1e-38f ? absmax[i] : 1e-38f;
            const float decoded = map[codes[i]] * nested + offset;
            // In double: squares of what float32 holds may be out of its range.
            const double s = static_cast<double>(scale), off = static_cast<double>(decoded) - s;
            const double d = in.error[i], x = in.cross[i], e = in.energy[i];
            const double missed = s * s * d - 2.0 * s * off * x + off * off * (e - 2.0 * x - d);
            total[0][i % 8] += missed;
            total[1][i % 8] += s * s * e;
        }
        squares[0] = squares[1] = 0.0;
        for (int j = 0; j < 8; ++j) {
            squares[0] += total[0][j];
            squares[1] += total[1][j];
        }
    }

    static constexpr int kNested = 256;
};

}  // namespace
