// The blocks of reserve.h: idle ones in a list, each with its size in a line before it.

#include "reserve.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace wscl {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kMostIdle = 256 << 20;
constexpr int64_t kUnused = 4 << 20;  // may lie idle in a block that is given to who asks for less than half

int64_t& size_of(char* block) {
  return *reinterpret_cast<int64_t*>(block);
}

struct Idle {
  std::mutex mutex;
  std::vector<char*> blocks;
};

// Never destroyed: tensors may outlive what is static here.
Idle& idle() {
  static Idle& found = *new Idle;
  return found;
}

}  // namespace

void* take_from_reserve(int64_t bytes) {
  bytes = (bytes + kLine - 1) / kLine * kLine;
  {
    const std::lock_guard<std::mutex> lock(idle().mutex);
    std::vector<char*>& blocks = idle().blocks;
    size_t best = blocks.size();  // the smallest that is large enough
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int64_t size = size_of(blocks[i]);
      if (size >= bytes && size - bytes <= std::max(bytes, kUnused) &&
          (best == blocks.size() || size < size_of(blocks[best])))
        best = i;
    }
    if (best < blocks.size()) {
      char* const block = blocks[best];
      blocks.erase(blocks.begin() + static_cast<int64_t>(best));
      return block + kLine;
    }
  }
  char* const block = static_cast<char*>(std::aligned_alloc(kLine, static_cast<size_t>(bytes + kLine)));
  if (!block) throw std::bad_alloc();
  size_of(block) = bytes;
  return block + kLine;
}

void give_back_to_reserve(void* memory) {
  char* const block = static_cast<char*>(memory) - kLine;
  if (size_of(block) > kMostIdle) return std::free(block);
  const std::lock_guard<std::mutex> lock(idle().mutex);
  std::vector<char*>& blocks = idle().blocks;
  blocks.push_back(block);
  int64_t total = 0;
  for (char* one : blocks) total += size_of(one);
  while (total > kMostIdle) {  // the oldest first: sizes that are not asked for any more
    total -= size_of(blocks.front());
    std::free(blocks.front());
    blocks.erase(blocks.begin());
  }
}

void empty_reserve() {
  const std::lock_guard<std::mutex> lock(idle().mutex);
  for (char* block : idle().blocks) std::free(block);
  idle().blocks.clear();
}

}  // namespace wscl
