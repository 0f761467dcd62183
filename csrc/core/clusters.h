// Cluster ids of any value become segments 0, 1, …: the clusters that queries name, in the order of their
// first query. Keys of other clusters have no segment: they can only be negatives.
#pragma once

#include <cstdint>
#include <vector>

#include "similarity.h"

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

// With `self` the queries are the keys, and key_clusters are not read.
Segments find_segments(const int64_t* query_clusters, int64_t n, const int64_t* key_clusters, int64_t m,
                       bool self, int64_t ignore_index, const Threads& threads);

// The key that each query may not meet.
struct OwnKeys {
  const int64_t* own = nullptr;  // [n] outside [0, m) for none; null: see `diagonal`
  bool diagonal = false;         // query i may not meet key i
  int64_t m = 0;

  bool any() const {
    return own || diagonal;
  }
  int64_t of(int64_t i) const {  // −1: none
    const int64_t j = own ? own[i] : diagonal ? i : -1;
    return j < m ? j : -1;
  }
};

// The members of every segment: segment s holds order[start[s] … start[s + 1]).
struct Grouping {
  std::vector<int64_t> order;
  std::vector<int64_t> start;  // [count + 1]
};

// Counting sort, stable. Elements of segment < 0 are left out, and those for which `keep` (if given) is 0.
Grouping group(const std::vector<int64_t>& segment, int64_t count, const int64_t* keep = nullptr);

enum class Meets { kAll, kSame, kOther };  // every key, keys of the query's own cluster, of other clusters

// The pairs of one pass: queries and keys that take part, in an order in which what a row meets, or what it
// does not, is one range of columns.
struct Meeting {
  std::vector<int64_t> queries;  // index at each position
  std::vector<int64_t> keys;     // the same; empty where all keys take part, as they stand
  int64_t key_count = 0;
  bool keys_are_rows = false;
  bool outside = false;             // a row meets the columns outside [begin, end)
  std::vector<int64_t> begin, end;  // of every row; empty where all rows meet all columns
  std::vector<Pair> excluded;       // positions, sorted by row

  // Where queries are keys in one order: leaves of the pairs (i, j) and (j, i) the one that comes first in its
  // row, and none of (i, i).
  void keep_upper_triangle();

  // Makes this meeting's pairs those of the pass; the meeting has to outlive it.
  template <class T>
  void set(SimilarityParams<T>& pass, Rows<T> all_queries, Rows<T> all_keys) const {
    const Rows<T> query_rows = chosen(all_queries, queries);
    const Rows<T> key_rows = key_count == all_keys.count && keys.empty() ? all_keys : chosen(all_keys, keys);
    pass.x = keys_are_rows ? key_rows : query_rows;
    pass.y = keys_are_rows ? query_rows : key_rows;
    pass.begin = begin.empty() ? nullptr : begin.data();
    pass.end = end.empty() ? nullptr : end.data();
    pass.outside = outside;
    pass.excluded = excluded.data();
    pass.excluded_count = static_cast<int64_t>(excluded.size());
  }

 private:
  template <class T>
  static Rows<T> chosen(Rows<T> rows, const std::vector<int64_t>& order) {
    if (!is_identity(order, rows.count)) rows.index = order.data();
    rows.count = static_cast<int64_t>(order.size());
    return rows;
  }
  static bool is_identity(const std::vector<int64_t>& order, int64_t count);
};

// Queries and keys of segment kIgnored take no part, nor do queries for which `keep` (if given) is 0.
Meeting meet(Meets meets, const Segments& segments, const OwnKeys& own, const int64_t* keep,
             bool keys_are_rows);

}  // namespace wscl
