// Cuts the rows among the threads, and puts their parts together in order.
#include "kmeans.h"

#include <algorithm>
#include <vector>

#include "kmeans_prepared.h"

namespace wscl {
namespace {

// A thread's own sums may take this much together; beyond, clusters are summed in a second pass.
constexpr int64_t kSumBytes = 32 << 20;

template <class T>
void clear(const KMeansProblem<T>& p, const KMeansPart& part) {
  std::fill_n(part.sums, p.k * p.d, 0.);
  if (part.weight_sums)
    std::fill_n(part.weight_sums, p.k, 0.);
  else
    std::fill_n(part.counts, p.k, int64_t(0));
}

}  // namespace

bool has_bfloat16_candidates() {
  return bfloat16_kernels() != nullptr;
}

template <class T>
int64_t kmeans_pass(const KMeansProblem<T>& p, const Threads& threads) {
  bool rounded;
  const KMeansTyped<T>& typed = choose(p, &rounded);
  const Prepared<T> prepared(p, typed, rounded, threads);
  const int64_t n = p.x.count;
  const int64_t n_parts = std::clamp<int64_t>(n / kLeastRows, 1, threads.count);
  const int64_t sum_bytes = p.k * (p.d + 1) * static_cast<int64_t>(sizeof(double));
  const bool own_sums = p.sums && (n_parts - 1) * sum_bytes <= kSumBytes;

  // The first part's sums are the results themselves; the others' are added to them in order.
  std::vector<KMeansPart> parts(n_parts);
  std::vector<Buffer> memory;
  for (int64_t i = 0; i < n_parts; ++i) {
    parts[i] = {n * i / n_parts, n * (i + 1) / n_parts, nullptr, nullptr, nullptr, 0, -1};
    if (!own_sums) continue;
    parts[i].sums = p.sums;
    parts[i].counts = p.counts;
    parts[i].weight_sums = p.weight_sums;
    if (i == 0) continue;
    memory.push_back(allocate(sum_bytes));
    parts[i].sums = static_cast<double*>(memory.back().get());
    void* counts = parts[i].sums + p.k * p.d;
    if (p.weight_sums)
      parts[i].weight_sums = static_cast<double*>(counts);
    else
      parts[i].counts = static_cast<int64_t*>(counts);
  }
  threads.each(n_parts, [&](int64_t i) {
    if (own_sums) clear(p, parts[i]);
    typed.run(p, prepared.table, parts[i]);
  });

  for (const KMeansPart& part : parts)
    if (part.bad_row >= 0) return part.bad_row;
  if (p.inertia) {
    *p.inertia = 0;
    for (const KMeansPart& part : parts) *p.inertia += part.inertia;
  }
  if (own_sums) {
    threads.ranges(p.k, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = 1; i < n_parts; ++i) {
        for (int64_t e = begin * p.d; e < end * p.d; ++e) p.sums[e] += parts[i].sums[e];
        for (int64_t j = begin; j < end; ++j)
          if (p.weight_sums)
            p.weight_sums[j] += parts[i].weight_sums[j];
          else
            p.counts[j] += parts[i].counts[j];
      }
    });
  } else if (p.sums) {
    clear(p, KMeansPart{0, n, p.sums, p.counts, p.weight_sums, 0, -1});
    threads.ranges(p.k, 64, [&](int64_t begin, int64_t end) { typed.sum(p, begin, end); });
  }
  return -1;
}

template <class T>
void kmeans_distances(const KMeansProblem<T>& p, const Threads& threads) {
  const KMeansTyped<T>& typed = full_kernels<T>();
  const Prepared<T> prepared(p, typed, false, threads, false);
  const int64_t n = p.x.count, n_parts = std::clamp<int64_t>(n / kLeastRows, 1, threads.count);
  std::vector<double> inertia(n_parts);
  threads.each(n_parts, [&](int64_t i) {
    inertia[i] = typed.distances(p, prepared.table, n * i / n_parts, n * (i + 1) / n_parts);
  });
  if (!p.inertia) return;
  *p.inertia = 0;
  for (double part : inertia) *p.inertia += part;
}

template void kmeans_distances<float>(const KMeansProblem<float>&, const Threads&);
template void kmeans_distances<double>(const KMeansProblem<double>&, const Threads&);

template <class T>
void kmeans_potentials(const PotentialsProblem<T>& p, const Threads& threads) {
  const KMeansTyped<T>& typed = full_kernels<T>();
  const int64_t n_parts = std::clamp<int64_t>(p.x.count / kLeastRows, 1, threads.count);
  std::vector<double> sums(n_parts * p.m);
  threads.each(n_parts, [&](int64_t i) {
    std::vector<double> own(p.m);  // apart from the others' cache lines
    typed.potentials(p, p.x.count * i / n_parts, p.x.count * (i + 1) / n_parts, own.data());
    std::copy(own.begin(), own.end(), sums.begin() + i * p.m);
  });
  for (int64_t j = 0; j < p.m; ++j) {
    p.potential[j] = 0;
    for (int64_t i = 0; i < n_parts; ++i) p.potential[j] += sums[i * p.m + j];
  }
}

template void kmeans_potentials<float>(const PotentialsProblem<float>&, const Threads&);
template void kmeans_potentials<double>(const PotentialsProblem<double>&, const Threads&);
template int64_t kmeans_pass<float>(const KMeansProblem<float>&, const Threads&);
template int64_t kmeans_pass<double>(const KMeansProblem<double>&, const Threads&);

}  // namespace wscl
