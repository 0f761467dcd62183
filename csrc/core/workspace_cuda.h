// One block of device memory, cut into aligned pieces. Without memory it only counts.
#pragma once

#include <cstdint>

namespace wscl::cuda {

class Workspace {
 public:
  explicit Workspace(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }
  int64_t bytes() const {
    return bytes_;
  }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace wscl::cuda
