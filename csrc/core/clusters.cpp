#include "clusters.h"

namespace wscl {
namespace {

// Open addressing over a power of two: about one probe an id at a load of at most one half.
class IdTable {
 public:
  explicit IdTable(int64_t ids) {
    int64_t size = 16;
    while (size < 2 * ids) size *= 2;
    mask_ = static_cast<uint64_t>(size - 1);
    ids_.resize(size);
    segments_.assign(size, kNoSegment);
  }

  int64_t find(int64_t id) const {
    return segments_[slot(id)];
  }

  int64_t find_or_add(int64_t id, int64_t segment) {
    const uint64_t at = slot(id);
    if (segments_[at] == kNoSegment) {
      ids_[at] = id;
      segments_[at] = segment;
    }
    return segments_[at];
  }

 private:
  uint64_t slot(int64_t id) const {
    uint64_t h = static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15ull;  // Fibonacci hashing
    h ^= h >> 32;
    for (uint64_t at = h & mask_;; at = (at + 1) & mask_)
      if (segments_[at] == kNoSegment || ids_[at] == id) return at;
  }

  uint64_t mask_;
  std::vector<int64_t> ids_;
  std::vector<int64_t> segments_;
};

}  // namespace

Segments find_segments(const int64_t* query_clusters, int64_t n, const int64_t* key_clusters, int64_t m,
                       int64_t ignore_index) {
  Segments found;
  found.self = !key_clusters;
  found.of_query.resize(n);
  IdTable table(n);
  for (int64_t i = 0; i < n; ++i) {
    if (query_clusters[i] == ignore_index) {
      found.of_query[i] = kIgnored;
      continue;
    }
    found.of_query[i] = table.find_or_add(query_clusters[i], found.count);
    if (found.of_query[i] == found.count) ++found.count;
  }
  if (key_clusters) {
    found.of_key.resize(m);
    for (int64_t j = 0; j < m; ++j)
      found.of_key[j] = key_clusters[j] == ignore_index ? kIgnored : table.find(key_clusters[j]);
  }
  return found;
}

Grouping group(const std::vector<int64_t>& segment, int64_t count, const int64_t* keep) {
  Grouping grouping;
  grouping.start.assign(count + 1, 0);
  const int64_t size = static_cast<int64_t>(segment.size());
  const auto taken = [&](int64_t i) { return segment[i] >= 0 && (!keep || keep[i]); };
  for (int64_t i = 0; i < size; ++i)
    if (taken(i)) ++grouping.start[segment[i] + 1];
  for (int64_t s = 0; s < count; ++s) grouping.start[s + 1] += grouping.start[s];
  grouping.order.resize(grouping.start[count]);
  std::vector<int64_t> next(grouping.start.begin(), grouping.start.end() - 1);
  for (int64_t i = 0; i < size; ++i)
    if (taken(i)) grouping.order[next[segment[i]]++] = i;
  return grouping;
}

}  // namespace wscl
