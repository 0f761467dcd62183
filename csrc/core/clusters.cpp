#include "clusters.h"

#include <algorithm>

namespace wscl {
namespace {

constexpr int64_t kFindGrain = 1024;

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

// Indices whose segment is not kIgnored, ascending.
std::vector<int64_t> taking_part(const std::vector<int64_t>& segment, const int64_t* keep) {
  std::vector<int64_t> order;
  order.reserve(segment.size());
  for (size_t i = 0; i < segment.size(); ++i)
    if (segment[i] != kIgnored && (!keep || keep[i])) order.push_back(static_cast<int64_t>(i));
  return order;
}

// Members of every segment, and last, as a segment of their own, those that have none.
Grouping group_with_rest(const std::vector<int64_t>& segment, int64_t count) {
  std::vector<int64_t> renamed(segment);
  std::replace(renamed.begin(), renamed.end(), kNoSegment, count);
  return group(renamed, count + 1);
}

// Row p of `rows` has the members of its own segment in `columns` as its range.
void set_ranges(Meeting& meeting, const Grouping& rows, const Grouping& columns) {
  const size_t last = columns.start.size() - 1;
  for (size_t s = 0; s + 1 < rows.start.size(); ++s)
    for (int64_t p = rows.start[s]; p < rows.start[s + 1]; ++p) {
      meeting.begin.push_back(columns.start[std::min(s, last)]);
      meeting.end.push_back(columns.start[std::min(s + 1, last)]);
    }
}

// (row, column) of the pairs that may not meet.
void set_excluded(Meeting& meeting, const OwnKeys& own) {
  if (!own.any()) return;
  std::vector<int64_t> position;  // of each key; empty where it is the key's index
  if (!meeting.keys.empty() || meeting.key_count != own.m) position.assign(own.m, -1);
  for (size_t c = 0; c < meeting.keys.size(); ++c) position[meeting.keys[c]] = static_cast<int64_t>(c);
  for (size_t p = 0; p < meeting.queries.size(); ++p) {
    const int64_t j = own.of(meeting.queries[p]);
    if (j < 0) continue;
    const int64_t key = position.empty() ? j : position[j], query = static_cast<int64_t>(p);
    if (key >= 0) meeting.excluded.push_back(meeting.keys_are_rows ? Pair{key, query} : Pair{query, key});
  }
  if (meeting.keys_are_rows)
    std::sort(meeting.excluded.begin(), meeting.excluded.end(),
              [](Pair a, Pair b) { return a.row != b.row ? a.row < b.row : a.column < b.column; });
}

}  // namespace

bool Meeting::is_identity(const std::vector<int64_t>& order, int64_t count) {
  return static_cast<int64_t>(order.size()) == count && std::is_sorted(order.begin(), order.end());
}

void Meeting::keep_upper_triangle() {
  const int64_t size = static_cast<int64_t>(queries.size());
  if (end.empty()) {
    begin.assign(size, 0);
    end.assign(size, size);
  }
  for (int64_t i = 0; i < size; ++i) begin[i] = std::max(begin[i], i + 1);
  excluded.clear();
}

Segments find_segments(const int64_t* query_clusters, int64_t n, const int64_t* key_clusters, int64_t m,
                       bool self, int64_t ignore_index, const Threads& threads) {
  Segments found;
  found.self = self;
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
  if (!self) {
    found.of_key.resize(m);
    threads.ranges(m, kFindGrain, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        found.of_key[j] = key_clusters[j] == ignore_index ? kIgnored : table.find(key_clusters[j]);
    });
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

Meeting meet(Meets meets, const Segments& segments, const OwnKeys& own, const int64_t* keep,
             bool keys_are_rows) {
  Meeting meeting;
  meeting.keys_are_rows = keys_are_rows;
  meeting.outside = meets == Meets::kOther;
  if (meets == Meets::kAll) {
    meeting.queries = taking_part(segments.of_query, keep);
    const std::vector<int64_t>& of_key = segments.keys();
    meeting.key_count = static_cast<int64_t>(of_key.size());
    if ((segments.self && keep) || std::find(of_key.begin(), of_key.end(), kIgnored) != of_key.end()) {
      meeting.keys = taking_part(of_key, segments.self ? keep : nullptr);
      meeting.key_count = static_cast<int64_t>(meeting.keys.size());
    }
  } else {
    Grouping queries = group(segments.of_query, segments.count, keep);
    Grouping keys = segments.self           ? queries
                    : meets == Meets::kSame ? group(segments.keys(), segments.count)
                                            : group_with_rest(segments.keys(), segments.count);
    if (keys_are_rows)
      set_ranges(meeting, keys, queries);
    else
      set_ranges(meeting, queries, keys);
    meeting.queries = std::move(queries.order);
    meeting.keys = std::move(keys.order);
    meeting.key_count = static_cast<int64_t>(meeting.keys.size());
  }
  set_excluded(meeting, own);
  return meeting;
}

}  // namespace wscl
