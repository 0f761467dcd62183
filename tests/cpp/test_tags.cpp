// Sums weighed by common tags against their definition in double, for every instruction set this processor has,
// with one thread and with several.

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "core/cpu.h"
#include "core/tags.h"

namespace {

struct Case {
  int64_t n, m, d, words;
  wscl::TagWeight weight;
};

int bits(int64_t word) {
  return __builtin_popcountll(static_cast<uint64_t>(word));
}

template <class T>
void run(const Case& c, int threads) {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  const auto tags = [&](int64_t rows) {
    std::vector<int64_t> words(rows * c.words);
    for (int64_t& word : words) word = static_cast<int64_t>(random() & random() & random() & random());
    for (int64_t r = 0; r < rows; r += 5) std::fill_n(words.begin() + r * c.words, c.words, 0);
    return words;
  };
  const std::vector<int64_t> rows = tags(c.n), columns = tags(c.m);
  const int64_t stride = c.d + 3;
  std::vector<T> values(c.m * stride);
  for (T& value : values) value = static_cast<T>(normal(random));

  std::vector<T> sums(c.n * c.d);
  std::vector<double> totals(c.n);
  wscl::TagProblem<T> p;
  p.row_tags = rows.data();
  p.n = c.n;
  p.column_tags = columns.data();
  p.m = c.m;
  p.words = c.words;
  p.values = values.data();
  p.value_stride = stride;
  p.d = c.d;
  p.weight = c.weight;
  wscl::tag_weighted_sum<T>(p, sums.data(), totals.data(), test_threads(threads));

  for (int64_t i = 0; i < c.n; ++i) {
    std::vector<double> want(c.d, 0);
    double total = 0, size = 1e-30;
    for (int64_t j = 0; j < c.m; ++j) {
      int common = 0, any = 0;
      for (int64_t w = 0; w < c.words; ++w) {
        common += bits(rows[i * c.words + w] & columns[j * c.words + w]);
        any += bits(rows[i * c.words + w] | columns[j * c.words + w]);
      }
      double weight = common > 0;
      if (common && c.weight == wscl::TagWeight::kJaccard) weight = double(common) / any;
      total += weight;
      for (int64_t e = 0; e < c.d; ++e) want[e] += weight * values[j * stride + e];
    }
    for (double value : want) size = std::max(size, std::abs(value));
    CHECK(std::abs(totals[i] - total) <= 1e-12 * (1 + total), "row %ld: %g, not %g", long(i), totals[i], total);
    for (int64_t e = 0; e < c.d; ++e)
      CHECK(std::abs(sums[i * c.d + e] - want[e]) <= Precision<T>::tolerance * (size + total),
            "row %ld, column %ld: %g, not %g", long(i), long(e), double(sums[i * c.d + e]), want[e]);
  }
}

}  // namespace

int main() {
  for (const std::string& name : wscl::supported_instruction_sets()) {
    wscl::use_instruction_set(name);
    for (const wscl::TagWeight weight : {wscl::TagWeight::kShared, wscl::TagWeight::kJaccard})
      for (const Case& c : {Case{1, 1, 1, 1, weight}, Case{3, 700, 33, 2, weight}, Case{70, 300, 64, 1, weight},
                            Case{41, 9, 130, 3, weight}, Case{5, 0, 7, 1, weight}, Case{0, 5, 7, 1, weight}})
        for (const int threads : {1, 3}) {
          run<float>(c, threads);
          run<double>(c, threads);
        }
  }
  std::printf("tags: %d failures\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
