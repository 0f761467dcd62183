// The CPU kernels against the definition in double, for every instruction set this processor has, with one
// thread and with several.

#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "core/clusters.h"
#include "core/infonce.h"
#include "core/reserve.h"

namespace {

struct Case {
  int64_t n, m, d;
  bool self, inner, own;
  int64_t clusters;
  double temperature, magnitude;
};

struct Gradients {
  std::vector<double> loss, queries, keys;
  double scale = 0;
};

// The definition, with gradients by hand, in double.
Gradients definition(const Case& c, const std::vector<double>& q, const std::vector<double>& k,
                     const std::vector<int64_t>& qc, const std::vector<int64_t>& kc,
                     const std::vector<int64_t>& own, const std::vector<double>& upstream) {
  const double s = 1 / c.temperature;
  Gradients result;
  result.loss.assign(c.n, 0);
  result.queries.assign(c.n * c.d, 0);
  result.keys.assign(c.m * c.d, 0);
  for (int64_t i = 0; i < c.n; ++i) {
    std::vector<double> logit(c.m, -std::numeric_limits<double>::infinity());
    std::vector<bool> positive(c.m, false);
    double top = -std::numeric_limits<double>::infinity(), top_positive = top, count = 0;
    for (int64_t j = 0; j < c.m; ++j) {
      if (kc[j] == -1 || own[i] == j) continue;
      double dot = 0;
      for (int64_t e = 0; e < c.d; ++e) dot += q[i * c.d + e] * k[j * c.d + e];
      logit[j] = s * dot;
      positive[j] = qc[i] != -1 && qc[i] == kc[j];
      count += positive[j];
      top = std::max(top, logit[j]);
      if (positive[j]) top_positive = std::max(top_positive, logit[j]);
    }
    if (count == 0) continue;
    double total = 0, total_positive = 0, mean = 0;
    for (int64_t j = 0; j < c.m; ++j) {
      total += std::exp(logit[j] - top);
      if (positive[j]) total_positive += std::exp(logit[j] - top_positive), mean += logit[j] / count;
    }
    const double lse = top + std::log(total), lse_positive = top_positive + std::log(total_positive);
    result.loss[i] = lse - (c.inner ? lse_positive - std::log(count) : mean);
    for (int64_t j = 0; j < c.m; ++j) {
      if (std::isinf(logit[j])) continue;
      double weight = std::exp(logit[j] - lse);
      if (positive[j]) weight -= c.inner ? std::exp(logit[j] - lse_positive) : 1 / count;
      weight *= upstream[i];
      result.scale += weight * logit[j] / s;
      for (int64_t e = 0; e < c.d; ++e) {
        result.queries[i * c.d + e] += s * weight * k[j * c.d + e];
        result.keys[j * c.d + e] += s * weight * q[i * c.d + e];
      }
    }
  }
  return result;
}

// The inputs in double, and what the definition says of them.
struct Problem {
  const Case& c;
  std::vector<double> queries, keys;
  std::vector<int64_t> query_clusters, key_clusters, own;
  std::map<std::vector<double>, Gradients> known;

  // By the upstream gradients, of which there are few for every instruction set and number of threads.
  const Gradients& want(const std::vector<double>& upstream) {
    const auto [found, is_new] = known.try_emplace(upstream);
    Gradients& result = found->second;
    if (is_new) {
      result = definition(c, queries, keys, query_clusters, key_clusters, own, upstream);
      if (c.self)
        for (size_t i = 0; i < result.queries.size(); ++i) result.queries[i] += result.keys[i];
    }
    return result;
  }
};

template <class T>
void compare(const char* what, const char* type, const std::string& isa, const Case& c,
             const std::vector<T>& got, const std::vector<double>& want, double tolerance) {
  // A logit's rounding error is relative to its size, and that of a probability to the logit's.
  const double logit = c.magnitude * c.magnitude / c.temperature;
  const double allowed = tolerance * (largest(want) + logit) * std::max(1.0, logit / 100);
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::abs(wscl::to_compute(got[i]) - want[i]) <= allowed)) {
      CHECK(false, "%s %s (%s) n=%ld m=%ld d=%ld self=%d inner=%d tau=%g at %zu: %g, expected %g", isa.c_str(),
            what, type, long(c.n), long(c.m), long(c.d), c.self, c.inner, c.temperature, i,
            double(wscl::to_compute(got[i])), want[i]);
      return;
    }
}

// The loss with its gradients, for the mean over the queries that have a positive and for the sum.
template <class In>
void check_reduced(const wscl::InfoNCEProblem<In>& p, Problem& problem, bool mean, const std::string& isa,
                   bool need_keys, const wscl::Threads& threads) {
  const Case& c = problem.c;
  using T = wscl::Compute<In>;
  using P = Precision<In>;
  std::vector<T> grad_queries(c.n * c.d);
  std::vector<In> grad_keys(need_keys ? c.m * c.d : 0);
  for (In& v : grad_keys) wscl::from_compute(T(7), &v);  // every one has to be written
  std::vector<int64_t> count(c.n);
  double grad_scale = 0;
  const double reduced = wscl::infonce_reduced<In>(
      p, mean, count.data(), grad_queries.data(), need_keys ? grad_keys.data() : nullptr, &grad_scale, threads);
  double anchors = 0;
  for (int64_t n : count) anchors += n > 0;
  const double size = mean ? std::max(anchors, 1.0) : 1;
  const Gradients& want = problem.want(std::vector<double>(c.n, 1 / size));
  double total = 0;
  for (size_t i = 0; i < want.loss.size(); ++i) total += count[i] > 0 ? want.loss[i] : 0;
  const double tolerance = P::tolerance, gradient = 5 * P::tolerance + P::rounding;
  compare<double>("reduced", P::name, isa, c, {reduced * size / c.n}, {total / c.n}, tolerance);
  const double alone = wscl::infonce_reduced<In>(p, mean, count.data(), nullptr, nullptr, nullptr, threads);
  compare<double>("reduced alone", P::name, isa, c, {alone * size / c.n}, {total / c.n}, tolerance);
  compare<T>("grad_queries with it", P::name, isa, c, grad_queries, want.queries, gradient);
  if (need_keys) compare<In>("grad_keys with it", P::name, isa, c, grad_keys, want.keys, gradient);
  compare<double>("grad_scale with it", P::name, isa, c, {grad_scale}, {want.scale},
                  gradient * std::sqrt(double(c.n)) * (1 + 1 / size));
}

template <class In>
void check(const Case& c) {
  using T = wscl::Compute<In>;
  using P = Precision<In>;
  std::mt19937 random(17);
  std::normal_distribution<double> normal(0, c.magnitude / std::sqrt(double(c.d)));
  const int64_t least = c.d % 32 == 0 ? 0 : -1;  // where none is left out, tiles read keys where they lie
  std::uniform_int_distribution<int64_t> cluster(least, c.clusters - 1), key(-1, c.m - 1);
  std::vector<In> q(c.n * c.d), k(c.m * c.d);
  std::vector<T> upstream(c.n);
  std::vector<int64_t> qc(c.n), kc(c.m), own(c.n, -1);
  for (In& v : q) wscl::from_compute(T(normal(random)), &v);
  for (In& v : k) wscl::from_compute(T(normal(random)), &v);
  for (int64_t& v : qc) v = cluster(random);
  for (int64_t& v : kc) v = cluster(random);
  for (int64_t i = 0; i < c.n; ++i) upstream[i] = T(0.5 + i % 7);
  if (c.self) k = q, kc = qc;
  for (int64_t i = 0; i < c.n; ++i) own[i] = c.self ? i : c.own ? key(random) : -1;

  Problem problem{c, {}, {}, qc, kc, own, {}};
  for (const In& v : q) problem.queries.push_back(wscl::to_compute(v));
  for (const In& v : k) problem.keys.push_back(wscl::to_compute(v));
  const std::vector<double> up64(upstream.begin(), upstream.end());
  const Gradients& want = problem.want(up64);

  const Fenced<In> queries(q), keys(k);
  wscl::InfoNCEProblem<In> p{queries.data(),
                             c.d,
                             c.n,
                             c.self ? nullptr : keys.data(),
                             c.d,
                             c.m,
                             c.d,
                             qc.data(),
                             c.self ? nullptr : kc.data(),
                             c.own && !c.self ? own.data() : nullptr,
                             c.self,
                             c.inner,
                             -1,
                             1 / c.temperature};
  everywhere([&](const std::string& isa, int thread_count) {
    const wscl::Threads threads = test_threads(thread_count);
    std::vector<T> loss(c.n), direction(c.n * c.d), grad_queries(c.n * c.d);
    std::vector<In> grad_keys(c.m * c.d);
    std::vector<int64_t> count(c.n);
    std::vector<double> stats(4 * c.n);
    double grad_scale = 0;
    wscl::infonce_forward<In>(p, loss.data(), count.data(), stats.data(), c.self ? nullptr : direction.data(),
                              threads);
    wscl::infonce_backward<In>(p, upstream.data(), count.data(), stats.data(), direction.data(),
                               grad_queries.data(), c.self ? nullptr : grad_keys.data(), &grad_scale, threads);
    const double tolerance = P::tolerance, gradient = 4 * P::tolerance + P::rounding;
    compare<T>("loss", P::name, isa, c, loss, want.loss, tolerance);
    compare<T>("grad_queries", P::name, isa, c, grad_queries, want.queries, gradient);
    if (!c.self) compare<In>("grad_keys", P::name, isa, c, grad_keys, want.keys, gradient);
    compare<double>("grad_scale", P::name, isa, c, {grad_scale}, {want.scale},
                    gradient * std::sqrt(double(c.n)) * (1 + largest(up64)));

    for (const bool mean : {true, false}) {
      check_reduced<In>(p, problem, mean, isa, false, threads);
      if (std::is_same_v<In, T> && !c.self && !c.inner) check_reduced<In>(p, problem, mean, isa, true, threads);
    }

    if (c.self) {  // with room for all logits, and for some of them: the same bits
      for (const int64_t size : {(c.n + 16) * (c.n + 128 * thread_count) + 16, c.n * c.n / 3 + 16}) {
        std::vector<T> room(size), kept_loss(c.n), kept_queries(c.n * c.d);
        std::vector<double> kept_stats(4 * c.n);
        double kept_scale = 0;
        wscl::infonce_forward<In>(p, kept_loss.data(), count.data(), kept_stats.data(), nullptr, threads,
                                  {room.data(), size});
        wscl::infonce_backward<In>(p, upstream.data(), count.data(), kept_stats.data(), nullptr,
                                   kept_queries.data(), nullptr, &kept_scale, threads, {room.data(), size});
        CHECK(kept_loss == loss && kept_queries == grad_queries && kept_scale == grad_scale,
              "%s (%s) n=%ld d=%ld tau=%g: kept logits gave other bits", isa.c_str(), P::name, long(c.n),
              long(c.d), c.temperature);
      }
    }

    // The same bits from the same call.
    std::vector<T> again(c.n);
    wscl::infonce_forward<In>(p, again.data(), count.data(), stats.data(), nullptr, threads);
    wscl::infonce_forward<In>(p, loss.data(), count.data(), stats.data(), nullptr, threads);
    CHECK(again == loss, "%s: a second call gave other bits", isa.c_str());
  });
}

void check_segments() {
  const int64_t huge = std::numeric_limits<int64_t>::max(), low = std::numeric_limits<int64_t>::min();
  const std::vector<int64_t> queries = {7, huge, -1, 7, low}, keys = {low, 5, -1, huge, 7};
  const wscl::Segments found =
      wscl::find_segments(queries.data(), 5, keys.data(), 5, false, -1, wscl::Threads());
  CHECK(found.count == 3, "count %ld", long(found.count));
  CHECK((found.of_query == std::vector<int64_t>{0, 1, wscl::kIgnored, 0, 2}), "queries' segments");
  CHECK((found.of_key == std::vector<int64_t>{2, wscl::kNoSegment, wscl::kIgnored, 1, 0}), "keys' segments");
  const wscl::Grouping grouped = wscl::group(found.of_query, found.count);
  CHECK((grouped.order == std::vector<int64_t>{0, 3, 1, 4}), "order");
  CHECK((grouped.start == std::vector<int64_t>{0, 2, 3, 4}), "start");
}

void check_reserve() {
  constexpr int64_t kMiB = 1 << 20;
  void* const first = wscl::take_from_reserve(5 * kMiB);
  void* const second = wscl::take_from_reserve(3 * kMiB + 1);
  CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0, "a block that is not aligned");
  std::memset(first, 1, 5 * kMiB);
  std::memset(second, 2, 3 * kMiB + 1);
  wscl::give_back_to_reserve(first);
  wscl::give_back_to_reserve(second);
  CHECK(wscl::take_from_reserve(2 * kMiB) == second, "the smallest block that is large enough");
  CHECK(wscl::take_from_reserve(4 * kMiB) == first, "the other one");
  wscl::give_back_to_reserve(first);
  wscl::give_back_to_reserve(second);
  // More than is kept goes back to the system, and leaves the others alone.
  wscl::give_back_to_reserve(wscl::take_from_reserve(257 * kMiB));
  CHECK(wscl::take_from_reserve(2 * kMiB) == second, "a block that is still there");
  wscl::give_back_to_reserve(second);
  // All together more than is kept: the oldest go.
  void* const third = wscl::take_from_reserve(252 * kMiB);
  wscl::give_back_to_reserve(third);
  void* const fourth = wscl::take_from_reserve(1);
  CHECK(fourth == second, "the one that came back last but one, the older one has gone");
  void* const fifth = wscl::take_from_reserve(20 * kMiB);
  CHECK(fifth != third, "a block of which too much would lie unused");
  CHECK(wscl::take_from_reserve(126 * kMiB) == third, "a block that is large enough");
  for (void* const taken : {third, fourth, fifth}) wscl::give_back_to_reserve(taken);
  wscl::empty_reserve();
  test_threads(4).each(64, [&](int64_t i) {
    const wscl::Reserved<char> room(1000 + 300 * i);
    std::memset(room.data(), static_cast<int>(i), 1000 + 300 * i);
    CHECK(room.data()[999] == char(i), "a block that two have");
  });
}

}  // namespace

int main() {
  check_segments();
  check_reserve();
  std::vector<Case> cases;
  for (bool inner : {false, true}) {
    for (double temperature : {0.005, 0.07, 1.0, 10.0})
      cases.push_back({40, 300, 48, false, inner, false, 6, temperature, 1});
    for (int64_t d : {1, 8, 31, 32, 33, 64, 200}) {
      cases.push_back({30, 129, d, false, inner, true, 4, 0.5, 2});
      cases.push_back({77, 77, d, true, inner, false, 5, 0.5, 2});
    }
    for (int64_t n : {1, 11, 12, 13, 127}) {
      cases.push_back({n, 64, 16, false, inner, true, 3, 0.2, 1});
      cases.push_back({n, n, 16, true, inner, false, 3, 0.2, 1});
    }
    cases.push_back({3, 5000, 20, false, inner, false, 9, 0.1, 1});  // few rows: split over columns
    cases.push_back({300, 400, 20, false, inner, true, 3, 0.1, 1});  // a chunk of rows for each thread
    if (!inner) {
      cases.push_back({400, 100, 1100, false, inner, false, 2, 0.1, 1});  // more chunks than threads
      cases.push_back({150, 50000, 2, false, inner, true, 9, 0.1, 1});    // room for the weights of 144 rows
    }
    cases.push_back({700, 3, 20, false, inner, true, 2, 0.1, 1});
    cases.push_back({35, 549, 70, false, inner, true, 7, 0.1, 1});  // blocks of columns, the last one ragged
    cases.push_back({64, 1, 20, false, inner, false, 1, 0.1, 1});
    cases.push_back({300, 300, 24, true, inner, false, 1, 0.1, 1});       // one cluster
    cases.push_back({300, 300, 24, true, inner, false, 100000, 0.1, 1});  // hardly a positive
    cases.push_back({50, 400, 16, false, inner, false, 3, 0.01, 10});     // logits to 1e4
    cases.push_back({90, 90, 16, true, inner, false, 3, 0.01, 10});
  }
  check_every_dtype(cases, [](const Case& c, auto number) { check<decltype(number)>(c); });
  CHECK(!wscl::use_instruction_set("abacus"), "an unknown instruction set was accepted");
  // No keys at all, which is not the same as queries that are the keys.
  const float query[4] = {1, 2, 3, 4}, no_keys[1] = {0};
  const int64_t cluster[2] = {0, 0}, no_cluster[1] = {0};
  for (bool inner : {false, true}) {
    const wscl::InfoNCEProblem<float> p{query,   2,          2,       no_keys, 2,     0,  2,
                                        cluster, no_cluster, nullptr, false,   inner, -1, 10};
    float loss[2] = {7, 7}, direction[4];
    int64_t count[2];
    double stats[8];
    wscl::infonce_forward<float>(p, loss, count, stats, direction, wscl::Threads());
    CHECK(loss[0] == 0 && loss[1] == 0 && count[0] == 0 && count[1] == 0, "a loss without keys");
  }
  return report();
}
