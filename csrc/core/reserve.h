// Memory that stays for the next call: logits and weights for a backward pass, gradients that were let go. On a
// virtual machine fresh pages cost more than what is gained by what is kept in them.
#pragma once

#include <cstdint>

namespace wscl {

// At least `bytes`, of any content, in whole cache lines; throws std::bad_alloc. From any thread.
void* take_from_reserve(int64_t bytes);

// What was taken. Blocks that nobody uses stay up to 256 MiB, together; the others go back to the system.
void give_back_to_reserve(void* memory);

// All that nobody uses goes back to the system.
void empty_reserve();

// Room for `count` numbers while it lives.
template <class T>
class Reserved {
 public:
  explicit Reserved(int64_t count) : data_(static_cast<T*>(take_from_reserve(count * int64_t(sizeof(T))))) {}
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  ~Reserved() {
    give_back_to_reserve(data_);
  }
  T* data() const {
    return data_;
  }

 private:
  T* data_;
};

}  // namespace wscl
