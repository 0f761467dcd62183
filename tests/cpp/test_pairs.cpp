// The passes over pairs that no cluster loss has: both directions' log-sum-exps and the sum of softplus,
// against the definition in double, for every instruction set this processor has, with one thread and with
// several.

#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "core/softplus.h"
#include "core/two_way.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
  int64_t n, m, d;
  wscl::Meets meets;
  bool own;
  double scale, magnitude;
};

template <class T>
struct Problem {
  std::vector<T> q, k;
  std::vector<int64_t> qc, kc, own;
  std::optional<Fenced<T>> queries, keys;  // the same where the kernels read them

  explicit Problem(const Case& c) : q(c.n * c.d), k(c.m * c.d), qc(c.n), kc(c.m), own(c.n, -1) {
    std::mt19937 random(23);
    std::normal_distribution<double> normal(0, c.magnitude / std::sqrt(double(c.d)));
    const int64_t least = c.d % 32 == 0 ? 0 : -1;  // where none is left out, tiles read keys where they lie
    std::uniform_int_distribution<int64_t> cluster(least, 4), key(-1, c.m - 1);
    for (T& v : q) wscl::from_compute(wscl::Compute<T>(normal(random)), &v);
    for (T& v : k) wscl::from_compute(wscl::Compute<T>(normal(random)), &v);
    for (int64_t& v : qc) v = cluster(random);
    for (int64_t& v : kc) v = cluster(random);
    if (c.own)
      for (int64_t& v : own) v = key(random);
  }

  // −∞ where query i does not meet key j.
  double logit(const Case& c, int64_t i, int64_t j) const {
    if (qc[i] == -1 || kc[j] == -1 || own[i] == j) return -kInfinity;
    if (c.meets != wscl::Meets::kAll && (qc[i] == kc[j]) != (c.meets == wscl::Meets::kSame)) return -kInfinity;
    double sum = 0;
    for (int64_t e = 0; e < c.d; ++e)
      sum += double(wscl::to_compute(q[i * c.d + e])) * wscl::to_compute(k[j * c.d + e]);
    return c.scale * sum;
  }

  wscl::PairsProblem<T> pairs(const Case& c) {
    queries.emplace(q), keys.emplace(k);
    return {queries->data(), c.d,       c.n,        keys->data(), c.d, c.m,    c.d,
            qc.data(),       kc.data(), own.data(), c.meets,      -1,  c.scale};
  }
};

double logsumexp(const std::vector<double>& values) {
  double top = -kInfinity, sum = 0;
  for (double v : values) top = std::max(top, v);
  if (top == -kInfinity) return top;
  for (double v : values) sum += std::exp(v - top);
  return top + std::log(sum);
}

template <class T>
void compare(const char* what, const char* type, const std::string& isa, const Case& c,
             const std::vector<T>& got, const std::vector<double>& want, double tolerance) {
  double top = 0;
  for (double v : want)
    if (std::isfinite(v)) top = std::max(top, std::abs(v));
  const double logit = c.magnitude * c.magnitude * std::abs(c.scale);
  const double allowed = tolerance * (top + logit) * std::max(1.0, logit / 100);
  for (size_t i = 0; i < want.size(); ++i) {
    const double value = wscl::to_compute(got[i]);
    if (value == want[i] || std::abs(value - want[i]) <= allowed) continue;
    CHECK(false, "%s %s (%s) n=%ld m=%ld d=%ld meets=%d scale=%g at %zu: %g, expected %g", isa.c_str(), what,
          type, long(c.n), long(c.m), long(c.d), int(c.meets), c.scale, i, value, want[i]);
    return;
  }
}

template <class In>
void check_two_way(const Case& c) {
  using T = wscl::Compute<In>;
  using P = Precision<In>;
  Problem<In> problem(c);
  std::vector<double> want_rows(c.n), want_columns(c.m), want_q(c.n * c.d), want_k(c.m * c.d);
  std::vector<std::vector<double>> logits(c.n, std::vector<double>(c.m));
  for (int64_t j = 0; j < c.m; ++j) {
    std::vector<double> column(c.n);
    for (int64_t i = 0; i < c.n; ++i) column[i] = logits[i][j] = problem.logit(c, i, j);
    want_columns[j] = logsumexp(column);
  }
  for (int64_t i = 0; i < c.n; ++i) want_rows[i] = logsumexp(logits[i]);
  std::vector<T> of_rows(c.n), of_columns(c.m);
  for (int64_t i = 0; i < c.n; ++i) of_rows[i] = T(0.5 + i % 7);
  for (int64_t j = 0; j < c.m; ++j) of_columns[j] = T(j % 5);
  for (int64_t i = 0; i < c.n; ++i)
    for (int64_t j = 0; j < c.m; ++j) {
      if (logits[i][j] == -kInfinity) continue;
      const double weight = c.scale * (of_rows[i] * std::exp(logits[i][j] - want_rows[i]) +
                                       of_columns[j] * std::exp(logits[i][j] - want_columns[j]));
      for (int64_t e = 0; e < c.d; ++e) {
        want_q[i * c.d + e] += weight * wscl::to_compute(problem.k[j * c.d + e]);
        want_k[j * c.d + e] += weight * wscl::to_compute(problem.q[i * c.d + e]);
      }
    }

  everywhere([&](const std::string& isa, int thread_count) {
    const wscl::Threads threads = test_threads(thread_count);
    std::vector<T> rows(c.n), columns(c.m), grad_q(c.n * c.d), grad_k(c.m * c.d);
    std::vector<double> row_stats(2 * c.n), column_stats(2 * c.m);
    wscl::two_way_forward<In>(problem.pairs(c), {rows.data(), row_stats.data(), row_stats.data() + c.n},
                              {columns.data(), column_stats.data(), column_stats.data() + c.m}, threads);
    const double gradient = 4 * P::tolerance + P::rounding;
    compare<T>("row_lse", P::name, isa, c, rows, want_rows, P::tolerance);
    compare<T>("column_lse", P::name, isa, c, columns, want_columns, P::tolerance);
    for (int needs : {3, 1, 2}) {
      wscl::two_way_backward<In>(problem.pairs(c), {of_rows.data(), row_stats.data(), row_stats.data() + c.n},
                                 {of_columns.data(), column_stats.data(), column_stats.data() + c.m},
                                 needs & 1 ? grad_q.data() : nullptr, needs & 2 ? grad_k.data() : nullptr,
                                 threads);
      if (needs & 1) compare<T>("grad_queries", P::name, isa, c, grad_q, want_q, gradient);
      if (needs & 2) compare<T>("grad_keys", P::name, isa, c, grad_k, want_k, gradient);
    }
  });
}

template <class In>
void check_softplus(const Case& original) {
  using T = wscl::Compute<In>;
  using P = Precision<In>;
  for (double sign : {1.0, -1.0}) {
    Case c = original;
    c.scale *= sign;
    Problem<In> problem(c);
    std::vector<T> offset(c.n), upstream(c.n);
    for (int64_t i = 0; i < c.n; ++i) offset[i] = T(i % 9 - 6), upstream[i] = T(0.5 + i % 7);
    std::vector<double> want(c.n), want_slope(c.n), want_direction(c.n * c.d), want_k(c.m * c.d);
    for (int64_t i = 0; i < c.n; ++i)
      for (int64_t j = 0; j < c.m; ++j) {
        const double logit = problem.logit(c, i, j);
        if (logit == -kInfinity) continue;
        const double t = logit + offset[i], sigmoid = 1 / (1 + std::exp(-t));
        want[i] += std::max(t, 0.0) + std::log1p(std::exp(-std::abs(t)));
        want_slope[i] += sigmoid;
        for (int64_t e = 0; e < c.d; ++e) {
          want_direction[i * c.d + e] += sigmoid * wscl::to_compute(problem.k[j * c.d + e]);
          want_k[j * c.d + e] += c.scale * upstream[i] * sigmoid * wscl::to_compute(problem.q[i * c.d + e]);
        }
      }
    everywhere([&](const std::string& isa, int thread_count) {
      const wscl::Threads threads = test_threads(thread_count);
      std::vector<T> sum(c.n), slope(c.n), direction(c.n * c.d);
      std::vector<In> grad_keys(c.m * c.d);
      wscl::softplus_forward<In>(problem.pairs(c), offset.data(), sum.data(), slope.data(), direction.data(),
                                 threads);
      wscl::softplus_key_gradient<In>(problem.pairs(c), offset.data(), upstream.data(), grad_keys.data(),
                                      threads);
      const double gradient = 4 * P::tolerance + P::rounding;
      compare<T>("softplus", P::name, isa, c, sum, want, P::tolerance);
      compare<T>("slope", P::name, isa, c, slope, want_slope, P::tolerance);
      compare<T>("direction", P::name, isa, c, direction, want_direction, gradient);
      compare<In>("grad_keys of softplus", P::name, isa, c, grad_keys, want_k, gradient);
    });
  }
}

template <class In>
void check(const Case& c) {
  check_two_way<In>(c);
  check_softplus<In>(c);
}

}  // namespace

int main() {
  std::vector<Case> cases;
  for (wscl::Meets meets : {wscl::Meets::kAll, wscl::Meets::kSame, wscl::Meets::kOther}) {
    for (int64_t d : {1, 8, 31, 32, 33, 130}) cases.push_back({60, 140, d, meets, true, 2, 1});
    cases.push_back({1, 1, 5, meets, false, 2, 1});
    cases.push_back({49, 13, 16, meets, true, 2, 1});
    cases.push_back({13, 700, 16, meets, false, 14, 1});
    cases.push_back({700, 13, 16, meets, false, 14, 1});
    cases.push_back({150, 310, 24, meets, true, 14, 1});
    cases.push_back({90, 70, 16, meets, false, 100, 10});  // logits to 1e4: a maximum for rows and columns
    cases.push_back({200, 300, 16, meets, true, 10, 2});
  }
  cases.push_back({100, 101, 2800, wscl::Meets::kAll, false, 5, 1});  // several chunks of rows
  check_every_dtype(cases, [](const Case& c, auto number) { check<decltype(number)>(c); });
  return report();
}
