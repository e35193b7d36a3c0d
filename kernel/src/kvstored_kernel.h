// The C ABI of the codec kernel. Every function is pure: it reads and writes only the buffers given, keeps
// no state, throws nothing, and may be called from any thread without Python's lock.
//
// REQUIRES of every call: lengths as stated below. The caller (kvstore/kernels/cpu.py) checks them against
// the tensor's spec; the kernel computes every offset from them and reads nothing outside.
// Bytes are those of kvstore/kernels/reference.py and reference_kv.py, on every instruction set.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVK_ABI 7
#define KVK_API __attribute__((visibility("default")))

// Element types. Do not renumber: Python passes them.
enum { KVK_F32 = 0, KVK_F16 = 1, KVK_BF16 = 2 };
// Instruction sets, in order of preference. Do not renumber.
enum { KVK_PORTABLE = 0, KVK_AVX2 = 1, KVK_AVX512 = 2, KVK_AVX512VBMI = 3 };
enum { KVK_OK = 0, KVK_NOT_FINITE = 1, KVK_BAD_ARGUMENT = 2, KVK_NO_MEMORY = 3 };

KVK_API int kvk_abi(void);
// The best instruction set of this machine.
KVK_API int kvk_isa(void);

// NF4 in blocks of 64. x: n values. codes: (n+1)/2 bytes. absmax: b = ceil(n/64) floats. sums: 3 b numbers, what the
// error is made of: for each block sum((u-l)^2), then for each sum((u-l)*l), then for each sum(u^2), where
// u = round(4064 z) of its normalized values z and l = round(4064 level) of their codes.
KVK_API int kvk_nf4_encode(int isa, int threads, int dtype, const void* x, int64_t n, uint8_t* codes, float* absmax,
                           int32_t* sums);
KVK_API int kvk_nf4_decode(int isa, int threads, int dtype, const uint8_t* codes, const float* absmax, int64_t n, void* out);

// Double quantization of b scales about their mean `offset`, in groups of 256. lut: 65,536 codes, of -1 + 2k/65535.
// map: the 256 levels they stand for. sums: as kvk_nf4_encode left them. codes: b bytes. nested: g = ceil(b/256) floats.
// squares: 2 g numbers, for each group the squared error and the energy of its values, both times 4064^2.
KVK_API int kvk_nf4_scales(int isa, int threads, const float* absmax, int64_t b, float offset, const uint8_t* lut,
                           const float* map, const int32_t* sums, uint8_t* codes, float* nested, double* squares);

// The shape of rows inside a larger tensor: outer slabs of tokens * inner * d values, a slab starting
// `stride` values after the one before. size: Hadamard size, a power of two up to 128 that divides d.
// block: 32 or 64. groups: means a slab has, 0 for none.
typedef struct {
    int64_t outer, tokens, inner, d, stride;
    int32_t size, block, groups;
} kvk_rows;

// Per-channel means of groups of 64 tokens. codes: outer*groups*inner*d; scales: outer*groups*inner;
// means: outer*groups*inner*d floats, the decoded means (input of kvk_kv_encode). content: null, or what kvk_kv_content
// gives, taken while the group is in the caches.
KVK_API int kvk_kv_means(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, int8_t* codes, float* scales,
                 float* means, int rotary, int interleaved, double* content);
// Floats of a mean from its code and scale, as kvk_kv_means leaves them.
KVK_API int kvk_kv_expand(const kvk_rows* rows, const int8_t* codes, const float* scales, float* means);

// The energy of each head in each of g groups of tokens (64, a rest below 32 joining the last; one group below 8 tokens):
// without the least of its means, one that stands still or one that turns, and as it is. For each of `pairings` ways of
// pairing channels, rotaries: how many turn in pairs, an even number up to d, and whether pairs are neighbours or half of
// those apart. rows->groups is not looked at. content: pairings*outer*g*inner*2.
KVK_API int kvk_kv_content(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, int pairings,
                   const int32_t* rotaries, double* content);

// The squared error of each head, from those of blocks as kvk_kv_encode leaves them: d is a multiple of block.
// missed: outer*inner.
KVK_API int kvk_kv_missed(const kvk_rows* rows, const float* error, double* missed);

// How each token of a slab lies to the means of its heads, taken over every `every`-th token from `first` on, at least two.
// distance: squared, from all of them together. lacking: what its key lacks of a mean, along it, in standard deviations of
// that head where that is most, of heads whose deviation is below `sure` and where it is over `most`; else 0. Both:
// outer*tokens. rows->groups is not looked at.
typedef struct {
    int64_t first, every;
    float sure, most;
} kvk_along;
KVK_API int kvk_kv_along(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, const kvk_along* how,
                 float* distance, float* lacking);

// Squared distance of two tensors of these rows, head by head. squares: outer*inner; not finite where a value is not.
KVK_API int kvk_kv_distance(int isa, int threads, int dtype, const void* x, const void* y, const kvk_rows* rows,
                    double* squares);

// Means that turn with the position (nf4-kv2). rotary: channels that turn in pairs, even, 2 to d; interleaved: whether
// pairs are neighbours or half of `rotary` apart. tangents: outer*rotary/2, tan(w/2) of the angle w that a pair turns by
// from one token to the next. turning: outer*inner*ceil(rotary/16) bytes, a bit for each pair of each head, low bits first.
typedef struct {
    const float* tangents;
    const uint8_t* turning;
    int32_t rotary, interleaved;
} kvk_turns;

// What keys show of how they turn. For each pair of each head, over the first `sampled` groups of tokens: energy e without a
// still mean, energy E, and sums L of z[t] conj z[t - lag] for three lags, in floats. From these, in doubles in the order of
// heads and pairs: power, outer*inner, the sum of min(e, |E - whole |L3||) over the pairs of a head; pooled,
// outer*rotary/2*3*2, the sum of L / power over heads; shown, outer*rotary/2, whether some head's |L3| > seen E and
// whole |L3| - (E - e) > worth power; heads, outer, how many heads show it of a pair. Of turns, rotary and interleaved are
// read. rows->groups: at least 1.
typedef struct {
    int32_t sampled, lags[3];
    double whole, seen, worth;
} kvk_phases;
KVK_API int kvk_kv_phases(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, const kvk_turns* turns,
                const kvk_phases* how, double* power, double* pooled, uint8_t* shown, int32_t* heads);
// Sums over each group of tokens. still: outer*groups*inner*d. With turns->tangents also: turned, the same sums in the frame
// that turns by them, written in the channels of pairs; gains: outer*inner*rotary/2, the energy that turning means take
// beyond still ones. content: null, or what kvk_kv_content gives for this pairing. Of turns, `turning` is not read.
KVK_API int kvk_kv_sums(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, const kvk_turns* turns,
                float* still, float* turned, float* gains, double* content);
// Means of those sums, turned ones where a bit of turns->turning is set. codes: outer*groups*inner*d; scales:
// outer*groups*inner*ceil(d/8), a mean is code * 2^(scale - 127), or 0 where scale is 0. means: these as floats.
KVK_API int kvk_kv_code_means(int isa, int threads, const kvk_rows* rows, const kvk_turns* turns, const float* still,
                const float* turned, int8_t* codes, uint8_t* scales, float* means);
// Floats of the means, as kvk_kv_code_means leaves them.
KVK_API int kvk_kv_expand_eights(const kvk_rows* rows, const int8_t* codes, const uint8_t* scales, float* means);

// b = ceil(outer*tokens*inner*d / block) blocks. codes: b*block/2; scales: b; tops: ceil(b/256); error: b.
// turns: null where means stand still.
KVK_API int kvk_kv_encode(int isa, int threads, int dtype, const void* x, const kvk_rows* rows, const float* means,
                  const kvk_turns* turns, uint8_t* codes, uint8_t* scales, int16_t* tops, float* error);
KVK_API int kvk_kv_decode(int isa, int threads, int dtype, const uint8_t* codes, const uint8_t* scales, const int16_t* tops,
                  const float* means, const kvk_turns* turns, const kvk_rows* rows, void* out);

// Interleaved rANS (kv-learned). rows * width symbols + 128 as bytes; classes: rows, each below `tables`; lanes: 1 to 4,096.
// slots: tables*4096, of each slot the symbol in 8 bits, then its frequency less 1, then the slot less what lies before the
// symbol, 12 bits each, low ones first.
// Decode: KVK_BAD_ARGUMENT where the bytes are no stream of so many symbols.
KVK_API int kvk_rans_decode(int isa, const uint8_t* data, int64_t nbytes, int64_t rows, int64_t width, const uint8_t* classes,
                    int64_t tables, const uint32_t* slots, int64_t lanes, uint8_t* out);
// counts, starts: tables*256, frequencies that sum to 4,096 and what lies before each. out: 2*rows*width + 4*lanes bytes,
// filled from its end. written: how many bytes of it. KVK_BAD_ARGUMENT for a symbol without a frequency.
KVK_API int kvk_rans_encode(const uint8_t* symbols, int64_t rows, int64_t width, const uint8_t* classes, int64_t tables,
                    const uint16_t* counts, const uint16_t* starts, int64_t lanes, uint8_t* out, int64_t* written);

// A group of layers of kv-learned: n = layers*heads*d coefficients, of which `live` have symbols. values: 40*256, what each
// symbol + 128 of each class stands for; matrix: n*n; mean: n. pairs: channels that turn in pairs, 0 where none do, up to
// d / 2; cosine, sine: tables*tokens*pairs; of: layers, the table of each. stride: values from one layer to the next in
// `out`, whose tokens lie heads*d apart.
typedef struct {
    int64_t layers, heads, d, tokens, stride, live;
    const float *values, *matrix, *mean, *cosine, *sine;
    const int32_t* of;
    int32_t pairs, interleaved;
} kvk_learned;
// symbols: live*tokens; columns: live, each below n; classes: live, each below 40. Symbol 0 takes the next of the escapes.
// used: how many it took. KVK_BAD_ARGUMENT where there are too few; KVK_NOT_FINITE where a value of `out` is not finite.
KVK_API int kvk_learned_decode(int isa, int dtype, const kvk_learned* how, const uint8_t* symbols, const int32_t* columns,
                    const uint8_t* classes, const int16_t* escapes, int64_t escaped, void* out, int64_t* used);

#ifdef __cplusplus
}
#endif
