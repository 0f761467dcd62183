#include "cpu.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#if defined(__linux__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

namespace wscl {
namespace {

struct Candidate {
  const SimilarityKernels* kernels;
  bool supported;
  bool pays = true;  // else it is used where it is asked for, and one that comes before is the best
};

#if defined(__x86_64__)
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Asked of the processor itself, since __builtin_cpu_supports of older clangs does not know the names.
Registers ask_processor(unsigned leaf, unsigned part = 0) {
  Registers r;
  __get_cpuid_count(leaf, part, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool has_half_conversions() {  // F16C
  return ask_processor(1).ecx >> 29 & 1;
}

bool has_bfloat16_dot() {  // AVX512-BF16
  return ask_processor(7, 1).eax >> 5 & 1;
}

// Intel's processors take a dot instruction every other cycle, half the speed of float32: of no use but to
// tiles.
bool has_fast_bfloat16_dot() {
  return ask_processor(0).ebx != 0x756e6547;  // "Genu"
}

// AMX-TILE and AMX-BF16, and the operating system's leave to use them: it has more to save for each thread
// then.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kOsxsave = 1u << 27, kTiles = 1u << 24, kTilesOfBfloat16 = 1u << 22;
  if (!(ask_processor(1).ecx & kOsxsave)) return false;
  const unsigned features = ask_processor(7).edx;
  if (!(features & kTiles) || !(features & kTilesOfBfloat16)) return false;
  unsigned low = 0, high = 0;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // their shape and their contents
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The AVX-512 kernels, with others for bfloat16.
SimilarityKernels with_bfloat16(const char* name, const BFloat16Kernels& kernels) {
  SimilarityKernels all = kSimilarityAvx512;
  all.name = name;
  all.of_bfloat16 = kernels.of_bfloat16;
  all.bfloat16_dot = kernels.dot;
  return all;
}
#endif

std::vector<Candidate> find_candidates() {
  std::vector<Candidate> list = {{&kSimilarityPortable, true}};
#if defined(__x86_64__)
  static const SimilarityKernels avx512_bf16 = with_bfloat16("avx512_bf16", kSimilarityAvx512Bf16);
  static const SimilarityKernels amx_bf16 = with_bfloat16("amx_bf16", kSimilarityAvx512Amx);
  __builtin_cpu_init();
  const bool basics = __builtin_cpu_supports("fma") && has_half_conversions();
  list.push_back({&kSimilarityAvx2, basics && __builtin_cpu_supports("avx2")});
  list.push_back(
      {&kSimilarityAvx512, basics && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
  list.push_back({&avx512_bf16, list.back().supported && has_bfloat16_dot(), has_fast_bfloat16_dot()});
  list.push_back({&amx_bf16, list.back().supported && has_tiles()});
#endif
  return list;
}

// Looked for once: on a virtual machine each question to the processor takes many microseconds.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> found = find_candidates();
  return found;
}

const SimilarityKernels* find(const std::string& name) {
  for (const Candidate& c : candidates())
    if (c.supported && name == c.kernels->name) return c.kernels;
  return nullptr;
}

const SimilarityKernels* initial() {
  const SimilarityKernels* best = nullptr;
  for (const Candidate& c : candidates())
    if (c.supported && c.pays) best = c.kernels;
  const char* wanted = std::getenv("WSCL_CPU_CAPABILITY");
  if (wanted && *wanted) {
    if (const SimilarityKernels* found = find(wanted)) return found;
    std::string there;
    for (const std::string& name : supported_instruction_sets()) there += (there.empty() ? "" : ", ") + name;
    std::fprintf(stderr, "wscl_fast: WSCL_CPU_CAPABILITY: expected one of %s, got '%s'; using %s\n",
                 there.c_str(), wanted, best->name);
  }
  return best;
}

std::atomic<const SimilarityKernels*>& current() {
  static std::atomic<const SimilarityKernels*> kernels{initial()};
  return kernels;
}

}  // namespace

const SimilarityKernels& cpu_kernels() {
  return *current().load(std::memory_order_relaxed);
}

int64_t instruction_set_number() {
  const SimilarityKernels* const now = &cpu_kernels();
  int64_t number = 0;
  while (candidates()[number].kernels != now) ++number;
  return number;
}

std::vector<std::string> built_instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.kernels->name);
  return names;
}

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates())
    if (c.supported) names.push_back(c.kernels->name);
  return names;
}

bool use_instruction_set(const std::string& name) {
  const SimilarityKernels* found = find(name);
  if (found) current().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

namespace {

double peak(double (*work)(int64_t rounds), int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 1 << 14;
  std::vector<double> speed(threads);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t)
    workers.emplace_back([&, t] {
      const Clock::time_point start = Clock::now();
      double flops = 0, elapsed = 0;
      do {
        flops += work(kRounds);
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      } while (elapsed < seconds);
      speed[t] = flops / elapsed;
    });
  for (std::thread& worker : workers) worker.join();
  double sum = 0;
  for (double s : speed) sum += s;
  return sum;
}

}  // namespace

int64_t second_level_bytes() {
  int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return found > 0 ? found : 1 << 20;
}

double multiply_add_peak(int threads, double seconds) {
  return peak(cpu_kernels().multiply_add, threads, seconds);
}

double bfloat16_dot_peak(int threads, double seconds) {
  return cpu_kernels().bfloat16_dot ? peak(cpu_kernels().bfloat16_dot, threads, seconds) : 0;
}

}  // namespace wscl
