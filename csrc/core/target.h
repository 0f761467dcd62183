// WSCL_TARGET("features") … WSCL_TARGET_END: the functions between them may use these instructions, whatever
// the compiler's flags. Only code that the processor was asked for may call them (cpu.cpp).
//
// Neither compiler defines __AVX512F__ and the like for it: what is there follows from WSCL_VECTOR_BYTES.
#pragma once

#define WSCL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define WSCL_TARGET(features) \
  WSCL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define WSCL_TARGET_END WSCL_PRAGMA(clang attribute pop)
#else
#define WSCL_TARGET(features) WSCL_PRAGMA(GCC target(features))
#define WSCL_TARGET_END
#endif

#define WSCL_TARGET_AVX2 "avx2,fma,f16c"
#define WSCL_TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define WSCL_TARGET_AVX512_BFLOAT16 "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
