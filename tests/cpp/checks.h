// What the C++ tests share: checks that count failures, threads, how exact each dtype is.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "core/cpu.h"
#include "core/dtypes.h"
#include "core/threads.h"

inline int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      ++failures;                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

inline void run_on_threads(int64_t tasks, void (*task)(int64_t, void*), void* context) {
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < tasks; ++i) pool.emplace_back(task, i, context);
  for (std::thread& thread : pool) thread.join();
}

inline wscl::Threads test_threads(int count) {
  wscl::Threads threads;
  threads.count = count;
  threads.run = run_on_threads;
  return threads;
}

// A copy that ends where the memory of this process does, and begins close behind such an end: who reads beyond
// it is stopped, be it by an instruction that no sanitizer knows.
template <class T>
class Fenced {
 public:
  explicit Fenced(const std::vector<T>& values) : page_(sysconf(_SC_PAGESIZE)) {
    const size_t bytes = values.size() * sizeof(T), inside = (bytes + page_ - 1) / page_ * page_;
    size_ = inside + 2 * page_;
    memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + page_, inside, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(memory_ + page_ + inside - bytes);
    std::copy(values.begin(), values.end(), data_);
  }
  ~Fenced() {
    munmap(memory_, size_);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  const T* data() const {
    return data_;
  }

 private:
  size_t page_, size_ = 0;
  char* memory_ = nullptr;
  T* data_ = nullptr;
};

// For every instruction set this processor has, with one thread and with several. What is expected depends on
// neither, and takes longer to compute: once, before.
template <class Run>
void everywhere(Run run) {
  for (const std::string& isa : wscl::supported_instruction_sets()) {
    CHECK(wscl::use_instruction_set(isa), "%s", isa.c_str());
    for (int threads : {1, 3}) run(isa, threads);
  }
}

inline void say_where(size_t cases) {
  for (const std::string& isa : wscl::supported_instruction_sets())
    std::printf("%s: %zu cases\n", isa.c_str(), cases);
}

// `check(c, a number of the dtype)` of every case.
template <class Case, class Check>
void check_every_dtype(const std::vector<Case>& cases, Check check) {
  for (const Case& c : cases) {
    check(c, float());
    check(c, double());
    check(c, wscl::BFloat16());
    check(c, wscl::Float16());
  }
  say_where(cases.size());
}

inline double largest(const std::vector<double>& values) {
  double top = 0;
  for (double v : values) top = std::max(top, std::abs(v));
  return top;
}

// How exact: `tolerance` of what is computed, `rounding` of weights and gradients.
template <class In>
struct Precision;
template <>
struct Precision<float> {
  static constexpr double tolerance = 2e-6, rounding = 0;
  static constexpr const char* name = "float";
};
template <>
struct Precision<double> {
  static constexpr double tolerance = 1e-13, rounding = 0;
  static constexpr const char* name = "double";
};
template <>
struct Precision<wscl::BFloat16> {
  static constexpr double tolerance = 2e-6, rounding = 8e-3;
  static constexpr const char* name = "bfloat16";
};
template <>
struct Precision<wscl::Float16> {
  static constexpr double tolerance = 2e-6, rounding = 5e-4;
  static constexpr const char* name = "float16";
};

inline int report() {
  std::printf(failures ? "FAILED: %d\n" : "all passed\n", failures);
  return failures != 0;
}
