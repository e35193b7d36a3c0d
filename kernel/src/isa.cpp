// Compiled once for each instruction set, with KVK_USE_AVX2, KVK_USE_AVX512 or neither defined.
#include "content.h"
#include "kv.h"
#include "means.h"
#include "nf4.h"
#include "ops.h"

#if defined(KVK_USE_AVX512)
#define KVK_TABLE kAvx512
typedef Avx512 Isa;
#elif defined(KVK_USE_AVX2)
#define KVK_TABLE kAvx2
typedef Avx2 Isa;
#else
#define KVK_TABLE kPortable
typedef Portable Isa;
#endif

namespace kvk {

const Ops KVK_TABLE = {
    Nf4<Isa>::encode, Nf4<Isa>::encode_tail, Nf4<Isa>::decode, Nf4<Isa>::decode_tail, Nf4<Isa>::scales,
    Kv<Isa>::means,   Content<Isa>::energy,  Content<Isa>::distance, Turn<Isa>::lags, Turn<Isa>::sums,
    Turn<Isa>::gains, Turn<Isa>::means,      Kv<Isa>::encode,        Kv<Isa>::decode,
};

}  // namespace kvk
