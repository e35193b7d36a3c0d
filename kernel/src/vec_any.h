// The instruction set this translation unit is compiled for, as the type `ThisIsa` names.
#pragma once
#include "kvstored_kernel.h"

#if defined(KVK_USE_AVX512VBMI)
#include "vec_avx512vbmi.h"
typedef Avx512Vbmi ThisIsa;
#elif defined(KVK_USE_AVX512)
#include "vec_avx512.h"
typedef Avx512 ThisIsa;
#elif defined(KVK_USE_AVX2)
#include "vec_avx2.h"
typedef Avx2 ThisIsa;
#else
#include "vec_portable.h"
typedef Portable ThisIsa;
#endif
