// Which instruction set's kernels run, decided once: the best that the processor has, or what the
// environment variable WSCL_CPU_CAPABILITY (portable, avx2, avx512, avx512_bf16, amx_bf16) asks for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "similarity.h"

namespace wscl {

const SimilarityKernels& cpu_kernels();

// Of those kernels among all that were built: below kInstructionSets.
int64_t instruction_set_number();
constexpr int64_t kInstructionSets = 5;

// Names of the instruction sets that were built, and of those this processor can run, best last.
std::vector<std::string> built_instruction_sets();
std::vector<std::string> supported_instruction_sets();

// Uses the named instruction set from here on; false where it was not built or the processor lacks it.
bool use_instruction_set(const std::string& name);

// Bytes of a core's second cache level, as the system tells; 1 MiB where it does not.
int64_t second_level_bytes();

// Flops a second of independent float32 multiply-adds on `threads` threads at once, for about `seconds`:
// what a kernel's speed is held against.
double multiply_add_peak(int threads, double seconds);

// The same of the instruction in use for products of bfloat16; 0 where there is none.
double bfloat16_dot_peak(int threads, double seconds);

}  // namespace wscl
