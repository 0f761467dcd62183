// Cluster ids of any value become segments 0, 1, …: the clusters that queries name, in the order of their
// first query. Keys of other clusters have no segment: they can only be negatives.
#pragma once

#include <cstdint>
#include <vector>

namespace wscl {

constexpr int64_t kNoSegment = -1;  // a key of a cluster that no query names
constexpr int64_t kIgnored = -2;    // no cluster at all

struct Segments {
  int64_t count = 0;
  std::vector<int64_t> of_query;  // [n] segment or kIgnored
  std::vector<int64_t> of_key;    // [m] segment, kNoSegment or kIgnored; unused where queries are the keys
  bool self = false;              // the queries are the keys

  const std::vector<int64_t>& keys() const {
    return self ? of_query : of_key;
  }
};

// Without key_clusters the queries are the keys.
Segments find_segments(const int64_t* query_clusters, int64_t n, const int64_t* key_clusters, int64_t m,
                       int64_t ignore_index);

// The members of every segment: segment s holds order[start[s] … start[s + 1]).
struct Grouping {
  std::vector<int64_t> order;
  std::vector<int64_t> start;  // [count + 1]
};

// Counting sort, stable. Elements of segment < 0 are left out, and those for which `keep` (if given) is 0.
Grouping group(const std::vector<int64_t>& segment, int64_t count, const int64_t* keep = nullptr);

}  // namespace wscl
