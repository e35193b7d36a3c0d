// nf4-kv over one instruction set: centre, rotate, search, code, in one pass over pieces that stay in L1.
// The arithmetic and its order are kvstore/kernels/reference_kv.py's.
#pragma once
#include "ops.h"
#include "turn.h"
#include "vec_any.h"

namespace {

// A walk over the coded values of rows in flat order, a run inside one row at a time. Divides only at its start.
struct Walk {
    const kvk_rows& rows;
    int64_t width, slab, token, column;

    Walk(const kvk_rows& r, int64_t flat) : rows(r), width(r.inner * r.d) {
        const int64_t slab_size = r.tokens * width;
        slab = flat / slab_size;
        token = flat % slab_size / width;
        column = flat % width;
    }
    // Offset in the tensor.
    int64_t value() const { return slab * rows.stride + token * width + column; }
    // Offset in the means.
    int64_t mean() const {
        const int64_t last = rows.groups - 1, group = token / kvk::kGroup;
        return (slab * rows.groups + (group < last ? group : last)) * width + column;
    }
    // As advance, over any number of values.
    void skip(int64_t n) {
        column += n;
        if (column < width) return;
        if (column == width) {
            column = 0;
            ++token;
        } else {
            token += column / width;
            column %= width;
        }
        if (token < rows.tokens) return;
        slab += token / rows.tokens;
        token %= rows.tokens;
    }
    int run(int most) const { return static_cast<int>(width - column < most ? width - column : most); }
    void advance(int n) {
        column += n;
        if (column < width) return;
        column = 0;
        if (++token < rows.tokens) return;
        token = 0;
        ++slab;
    }
};

template <class Isa>
struct Kv {
    static constexpr int kPiece = 1024;  // values: 4 KiB of scratch; a multiple of every block and rotation
    static constexpr int kFar = 4096;    // values ahead that the caches are told of what is read

    static void load(int dtype, const void* x, int64_t at, float* out, int n) {
        const int whole = n & ~7;
        const float* single = static_cast<const float*>(x) + at;
        const uint16_t* half = static_cast<const uint16_t*>(x) + at;
        if (dtype == KVK_F32) {
            Isa::load(single, out, whole);
            for (int i = whole; i < n; ++i) out[i] = single[i];
        } else if (dtype == KVK_F16) {
            Isa::load_f16(half, out, whole);
            for (int i = whole; i < n; ++i) out[i] = f16_to_float(half[i]);
        } else {
            Isa::load_bf16(half, out, whole);
            for (int i = whole; i < n; ++i) out[i] = bf16_to_float(half[i]);
        }
    }

    static void store(int dtype, const float* v, int n, bool stream, void* out, int64_t at) {
        const int whole = n & ~7;
        float* single = static_cast<float*>(out) + at;
        uint16_t* half = static_cast<uint16_t*>(out) + at;
        if (dtype == KVK_F32) {
            if (stream && reinterpret_cast<uintptr_t>(single) % 32 == 0)
                Isa::store_stream(v, single, whole);
            else
                Isa::load(v, single, whole);
            for (int i = whole; i < n; ++i) single[i] = v[i];
        } else if (dtype == KVK_F16) {
            Isa::store_f16(v, half, whole);
            for (int i = whole; i < n; ++i) half[i] = float_to_f16(v[i]);
        } else {
            Isa::store_bf16(v, half, whole);
            for (int i = whole; i < n; ++i) half[i] = float_to_bf16(v[i]);
        }
    }

    static void add(float* x, const float* y, int64_t n) {
        const int whole = static_cast<int>(n) & ~7;
        Isa::add(x, y, whole);
        for (int64_t i = whole; i < n; ++i) x[i] += y[i];
    }

    static void means(int dtype, const void* x, const kvk_rows& rows, int64_t begin, int64_t end, int8_t* codes,
                      float* scales, float* means) {
        const int64_t width = rows.inner * rows.d, size = dtype == KVK_F32 ? 4 : 2;
        for (int64_t at = begin; at < end; ++at) {
            const int64_t slab = at / rows.groups, group = at % rows.groups;
            const int64_t start = group * kvk::kGroup;
            const int64_t stop = group == rows.groups - 1 ? rows.tokens : start + kvk::kGroup;
            float* total = means + at * width;
            for (int64_t i = 0; i < width; ++i) total[i] = 0.0f;
            for (int64_t t = start; t < stop; ++t) {
                const int64_t value = slab * rows.stride + t * width;
                lines_ahead(static_cast<const char*>(x) + (value + kFar) * size, width * size);
                add_row(dtype, x, value, width, total);
            }
            const float inverse = 1.0f / static_cast<float>(stop - start);
            for (int64_t i = 0; i < rows.inner; ++i)
                scales[at * rows.inner + i] =
                    code_mean(total + i * rows.d, inverse, static_cast<int>(rows.d), codes + at * width + i * rows.d);
        }
    }

    static void add_row(int dtype, const void* x, int64_t at, int64_t width, float* total) {
        if (dtype == KVK_F32) return add(total, static_cast<const float*>(x) + at, width);
        alignas(64) float row[kPiece];
        for (int64_t i = 0; i < width; i += kPiece) {
            const int n = static_cast<int>(width - i < kPiece ? width - i : kPiece);
            load(dtype, x, at + i, row, n);
            add(total + i, row, n);
        }
    }

    // Turns a sum into a mean of 8 bits, in place; its codes; returns its scale.
    static float code_mean(float* total, float inverse_count, int d, int8_t* codes) {
        uint32_t most = 0;
        for (int i = 0; i < d; ++i) {
            total[i] = total[i] * inverse_count;
            const uint32_t bits = to_bits(total[i]) & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        float scale = from_bits(most) / 127.0f;
        if (scale < 1e-37f) scale = 0.0f;
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        for (int i = 0; i < d; ++i) {
            const float scaled = total[i] * inverse;
            // Comparisons in this order also put NaN into range: the conversion below must be defined.
            const float bounded = scaled > -127.0f ? (scaled < 127.0f ? scaled : 127.0f) : -127.0f;
            codes[i] = static_cast<int8_t>(__builtin_nearbyintf(bounded));
            total[i] = static_cast<float>(codes[i]) * scale;
        }
        return scale;
    }

    using Sums = kvk::Sums;

    // Codes of one block at its best clip. False where a value is not finite.
    static bool encode_block(const float* v, int block, uint8_t* codes, Sums* sums) {
        const uint32_t bits = Isa::absmax_bits(v, block);
        if (bits >= 0x7f800000u) return false;
        const float absmax = from_bits(bits);
        if (absmax < 1e-15f) {
            memset(codes, 0x77, static_cast<size_t>(block / 2));
            *sums = {0.0f, 1.0f, 0.0f};
            return true;
        }
        const int clip = Isa::best_clip(v, block, 127.0f / absmax);
        const float inverse = 1.0f / (absmax * from_bits(kvk::kClipBits[clip]));
        *sums = block == 32 ? Isa::template code_block<32>(v, inverse, codes)
                            : Isa::template code_block<64>(v, inverse, codes);
        return true;
    }

    // Codes of a piece's blocks, step by step for all of them: no block waits for its own sums and divisions.
    static bool encode_piece(const float* v, int n, int block, uint8_t* codes, const kvk::BlockSums& sums) {
        constexpr int kMost = kPiece / 32;
        alignas(64) float most[kMost], by[kMost];
        alignas(64) int clips[kMost];
        const int blocks = (n + block - 1) / block;
        Isa::absmaxes(v, blocks, block, most);
        bool usual = true;
        for (int b = 0; b < blocks; ++b) usual &= to_bits(most[b]) < 0x7f800000u && most[b] >= 1e-15f;
        if (!usual) {
            for (int b = 0; b < blocks; ++b) {
                Sums own;
                if (!encode_block(v + b * block, block, codes + b * block / 2, &own)) return false;
                sums.set(b, own);
            }
            return true;
        }
        for (int b = 0; b < blocks; ++b) by[b] = 127.0f / most[b];
        Isa::best_clips(v, blocks, block, by, clips);
        for (int b = 0; b < blocks; ++b) by[b] = 1.0f / (most[b] * from_bits(kvk::kClipBits[clips[b]]));
        if (block == 32)
            Isa::template code_blocks<32>(v, blocks, by, codes, sums);
        else
            Isa::template code_blocks<64>(v, blocks, by, codes, sums);
        return true;
    }

    // Scales of a tile as bytes under its top, and each block's squared error. False where one is not finite.
    static bool code_scales(const kvk::BlockSums& sums, int n, uint8_t* scales, int16_t* top_out, float* error) {
        alignas(64) int32_t rounded[kvk::kScaleGroup], code[kvk::kScaleGroup];
        int32_t top = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t bits = to_bits(sums.energy[i] / sums.cross[i]);
            rounded[i] = static_cast<int32_t>((bits + (1u << 16)) >> 17);
            top = rounded[i] > top ? rounded[i] : top;
        }
        // Of all bits of floats that are not negative: those that round to no finite scale are the largest.
        if (top >= 0x7f800000 >> 17) return false;
        for (int i = 0; i < n; ++i) {
            const int32_t steps = top - rounded[i];
            const int32_t coarse = 63 - ((steps - 192 + 2) >> 2), fine = 255 - steps;
            const int32_t found = steps < 192 ? fine : coarse < 1 ? 1 : coarse;
            code[i] = rounded[i] == 0 ? 0 : found;
        }
        for (int i = 0; i < n; ++i) scales[i] = static_cast<uint8_t>(code[i]);
        for (int i = 0; i < n; ++i) {
            const int32_t steps = code[i] >= 64 ? 255 - code[i] : 192 + ((63 - code[i]) << 2);
            const int32_t left = top - steps;
            const float scale = from_bits(code[i] == 0 || left < 0 ? 0u : static_cast<uint32_t>(left) << 17);
            const float saved = scale * (sums.cross[i] - scale * sums.size[i]);
            const float missed = sums.energy[i] - scale * sums.cross[i] - saved;
            error[i] = missed > 0.0f ? missed : 0.0f;
        }
        *top_out = static_cast<int16_t>(top);
        return true;
    }

    static int encode(int dtype, const void* x, const kvk_rows& rows, const float* means, const kvk_turns* turns,
                      int64_t begin, int64_t end, uint8_t* codes, uint8_t* scales, int16_t* tops, float* error) {
        const int64_t total = kvk::values_of(rows), tile = int64_t{kvk::kScaleGroup} * rows.block;
        alignas(64) float piece[kPiece];
        alignas(64) float energy[kvk::kScaleGroup], cross[kvk::kScaleGroup], size[kvk::kScaleGroup];
        const kvk::BlockSums sums = {energy, cross, size};
        const Turned<Isa> turned(rows, turns, means, false);
        if (!turned.ready()) return KVK_NO_MEMORY;
        for (int64_t t = begin; t < end; ++t) {
            const int64_t stop = (t + 1) * tile < total ? (t + 1) * tile : total;
            int done = 0;
            Walk walk(rows, t * tile);
            for (int64_t at = t * tile; at < stop; at += kPiece) {
                const int n = static_cast<int>(stop - at < kPiece ? stop - at : kPiece);
                gather(dtype, x, means, turned.get(), n, &walk, piece);
                Isa::rotate(piece, n, rows.size);
                for (int i = n; i % rows.block; ++i) piece[i] = 0.0f;
                if (!encode_piece(piece, n, rows.block, codes + at / 2, sums.from(done))) return KVK_NOT_FINITE;
                done += (n + rows.block - 1) / rows.block;
            }
            const int64_t first = t * kvk::kScaleGroup;
            if (!code_scales(sums, done, scales + first, tops + t, error + first)) return KVK_NOT_FINITE;
        }
        return KVK_OK;
    }

    // The means of the values where a walk is, up to the end of their row.
    static const float* mean_at(const float* means, Turner<Isa>* turner, const Walk& walk) {
        if (turner) return turner->row(walk.slab, walk.token) + walk.column;
        return means + (walk.rows.groups ? walk.mean() : 0);
    }

    // The next n values, as floats, their means taken off.
    static void gather(int dtype, const void* x, const float* means, Turner<Isa>* turner, int n, Walk* walk, float* piece) {
        for (int i = 0, run; i < n; i += run, walk->advance(run)) {
            run = walk->run(n - i);
            const int itemsize = dtype == KVK_F32 ? 4 : 2;
            lines_ahead(static_cast<const char*>(x) + (walk->value() + kPiece) * itemsize, run * itemsize);
            const bool centred = walk->rows.groups && !turner;
            const float* mean = centred ? means + walk->mean() : nullptr;
            int done = 0;
            if (dtype == KVK_F32 && centred) {
                done = run & ~7;
                Isa::load_difference(static_cast<const float*>(x) + walk->value(), mean, piece + i, done);
            }
            if (turner && dtype == KVK_F32) {
                const float* from = static_cast<const float*>(x) + walk->value();
                turner->subtract(walk->slab, walk->token, walk->column, run, from, piece + i);
                continue;
            }
            load(dtype, x, walk->value() + done, piece + i + done, run - done);
            if (turner) turner->subtract(walk->slab, walk->token, walk->column, run, piece + i, piece + i);
            if (!centred) continue;
            const int whole = done ? done : run & ~7;
            if (!done) Isa::sub(piece + i, mean, whole);
            for (int j = whole; j < run; ++j) piece[i + j] -= mean[j];
        }
    }

    static int decode(int dtype, const uint8_t* codes, const uint8_t* scales, const int16_t* tops, const float* means,
                      const kvk_turns* turns, const kvk_rows& rows, int64_t begin, int64_t end, bool stream, void* out) {
        const int64_t total = kvk::values_of(rows), tile = int64_t{kvk::kScaleGroup} * rows.block;
        const float shrink = 1.0f / static_cast<float>(rows.size);
        float scale[kvk::kScaleGroup];
        const bool fused = Isa::kFused && rows.size >= 64;
        const Turned<Isa> turned(rows, turns, means, fused && dtype == KVK_BF16);
        if (!turned.ready()) return KVK_NO_MEMORY;
        for (int64_t t = begin; t < end; ++t) {
            const int64_t start = t * tile, stop = start + tile < total ? start + tile : total;
            const int blocks = static_cast<int>((stop - start + rows.block - 1) / rows.block);
            const uint8_t* scale_codes = scales + t * kvk::kScaleGroup;
            Isa::scales(scale_codes, blocks & ~7, tops[t], shrink, scale);
            for (int i = blocks & ~7; i < blocks; ++i) scale[i] = kvk::scale_of(scale_codes[i], tops[t]) * shrink;
            if (turns) {  // rows are read across: the caches are told of the next tile front to back
                lines_ahead(codes + stop / 2, tile / 2);
                lines_ahead(scale_codes + kvk::kScaleGroup, kvk::kScaleGroup);
            }
            if (fused)
                decode_fused(dtype, codes, scale, means, turned.get(), rows, start, stop, stream, out);
            else
                decode_tile(dtype, codes, scale, means, turned.get(), rows, start, stop, stream, out);
        }
        if (stream) Isa::fence();
        return KVK_OK;
    }

    // Values [start, stop) of one tile, any rotation: levels, rotation and means each over a piece in L1.
    static void decode_tile(int dtype, const uint8_t* codes, const float* scale, const float* means, Turner<Isa>* turner,
                            const kvk_rows& rows, int64_t start, int64_t stop, bool stream, void* out) {
        alignas(64) float piece[kPiece];
        Walk walk(rows, start);
        for (int64_t at = start; at < stop; at += kPiece) {
            const int n = static_cast<int>(stop - at < kPiece ? stop - at : kPiece);
            for (int i = 0; i < n; i += rows.block)
                for (int j = 0; j < rows.block; j += 32)
                    Isa::levels32(codes + (at + i + j) / 2, scale[(at - start + i) / rows.block], piece + i + j);
            Isa::rotate(piece, n, rows.size);
            scatter(dtype, piece, means, turner, n, stream, &walk, out);
        }
    }

    // The same where runs are 64 or 128 long, as many at a time as lie one behind the other under the same means.
    static void decode_fused(int dtype, const uint8_t* codes, const float* scale, const float* means, Turner<Isa>* turner,
                             const kvk_rows& rows, int64_t start, int64_t stop, bool stream, void* out) {
        const int64_t width = rows.inner * rows.d;
        alignas(64) float turned[kTurned];
        Walk walk(rows, start);
        for (int64_t at = start, n; at < stop; at += n) {
            int64_t left = rows.tokens - walk.token;
            const int64_t group = walk.token / kvk::kGroup;
            if (group < rows.groups - 1) left = (group + 1) * kvk::kGroup - walk.token;
            const int64_t whole = walk.column ? 0 : left * width < stop - at ? left : (stop - at) / width;
            const bool columns = Isa::kColumns && turner && whole > 1;
            float *row = nullptr, *mean = nullptr;  // written to only where they turn
            if (turner) {
                left = columns ? whole : 1;  // else these are one token's means, and become the next one's
                row = turner->row_from(walk.slab, walk.token, walk.column);
                mean = row + walk.column;
            } else if (rows.groups) {
                mean = const_cast<float*>(means) + walk.mean();
                row = mean - walk.column;
            }
            n = left * width - walk.column;
            if (n > stop - at) n = stop - at;
            const float* by = scale + (at - start) / rows.block;
            char* to = static_cast<char*>(out) + walk.value() * (dtype == KVK_F32 ? 4 : 2);
            const bool past = stream && reinterpret_cast<uintptr_t>(to) % 64 == 0;
            if constexpr (Isa::kColumns) {
                if (columns) {
                    const auto decode = rows.size == 64 ? columns_of<64>(dtype) : columns_of<128>(dtype);
                    decode(codes + at / 2, by, rows.block, left, width, row, turner->offsets(), past, to);
                }
            }
            if constexpr (Isa::kFused) {
                const bool pairs = dtype == KVK_BF16 && (turner || !row || width <= kTurned);
                if (pairs && row && !turner) {
                    Isa::by_pairs(row, width, turned);
                    row = turned;
                    mean = turned + walk.column;
                }
                const auto decode = rows.size == 64 ? runs_of<64>(dtype, pairs) : runs_of<128>(dtype, pairs);
                if (!columns)
                    decode(codes + at / 2, by, rows.block, n, mean, row, row ? row + width : nullptr,
                           turner ? turner->offsets() : nullptr, past, to);
            }
            if (turner) turner->gone_on(n);
            walk.skip(n);
        }
    }
    static constexpr int64_t kTurned = 4096;

    using Runs = void (*)(const uint8_t*, const float*, int, int64_t, float*, float*, const float*, const int64_t*, bool,
                          char*);
    template <int kSize>
    static Runs runs_of(int dtype, bool pairs) {
        if (dtype == KVK_F32) return Isa::template decode_runs<kSize, KVK_F32, false>;
        if (dtype == KVK_F16) return Isa::template decode_runs<kSize, KVK_F16, false>;
        return pairs ? Isa::template decode_runs<kSize, KVK_BF16, true> : Isa::template decode_runs<kSize, KVK_BF16, false>;
    }

    using Columns = void (*)(const uint8_t*, const float*, int, int64_t, int64_t, float*, const int64_t*, bool, char*);
    template <int kSize>
    static Columns columns_of(int dtype) {
        if (dtype == KVK_F32) return Isa::template decode_turning<kSize, KVK_F32>;
        return dtype == KVK_F16 ? Isa::template decode_turning<kSize, KVK_F16> : Isa::template decode_turning<kSize, KVK_BF16>;
    }

    // Writes the next n values, their means put back.
    static void scatter(int dtype, float* piece, const float* means, Turner<Isa>* turner, int n, bool stream, Walk* walk,
                        void* out) {
        for (int i = 0, run; i < n; i += run, walk->advance(run)) {
            run = walk->run(n - i);
            int done = 0;
            if (walk->rows.groups) {
                const float* mean = mean_at(means, turner, *walk);
                if (dtype == KVK_F32) {
                    float* single = static_cast<float*>(out) + walk->value();
                    done = run & ~7;
                    Isa::store_sum(piece + i, mean, single, done,
                                   stream && reinterpret_cast<uintptr_t>(single) % 32 == 0);
                }
                add(piece + i + done, mean + done, run - done);
            }
            store(dtype, piece + i + done, run - done, stream, out, walk->value() + done);
        }
    }
};

}  // namespace
