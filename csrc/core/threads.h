// Where the kernels run their tasks: the caller's threads (torch's pool, or std::thread in the C++ tests).
#pragma once

#include <cstdint>

namespace wscl {

struct Threads {
  int count = 1;
  // Runs task(i, context) for every i in [0, tasks), on up to `count` threads; returns when all are done.
  void (*run)(int64_t tasks, void (*task)(int64_t, void*), void* context) = nullptr;

  template <class F>
  void each(int64_t tasks, const F& task) const {
    if (tasks <= 1 || count <= 1 || !run) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    run(
        tasks, [](int64_t i, void* context) { (*static_cast<const F*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&task)));
  }

  // task(begin, end) over [0, size) cut into equal ranges of at least `grain`.
  template <class F>
  void ranges(int64_t size, int64_t grain, const F& task) const {
    int64_t parts = size / (grain > 0 ? grain : 1);
    parts = parts < 1 ? 1 : parts > count ? count : parts;
    each(parts, [&](int64_t i) { task(size * i / parts, size * (i + 1) / parts); });
  }
};

}  // namespace wscl
