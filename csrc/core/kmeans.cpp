// Prepares the centroids, cuts the rows among the threads, and puts their parts together in order.
#include "kmeans.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "kmeans_pass.h"

namespace wscl {
namespace {

// A thread's own sums may take this much together; beyond, clusters are summed in a second pass.
constexpr int64_t kSumBytes = 32 << 20;
constexpr int64_t kLeastRows = 48;  // of a part
// A product of bfloat16 halves the multiply-adds; with fewer of them what comes on top is more than that.
constexpr int64_t kLeastBfloat16Depth = 32, kLeastBfloat16Columns = 64;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

const KMeansKernels& kernels() {
  const std::string name = cpu_kernels().name;
#if defined(__x86_64__)
  if (name == kKMeansAvx512.name || name == "avx512_bf16") return kKMeansAvx512;
  if (name == kKMeansAvx2.name) return kKMeansAvx2;
#endif
  return kKMeansPortable;
}

template <class T>
const KMeansTyped<T>& choose(const KMeansProblem<T>& p, bool* rounded) {
  *rounded = false;
  if constexpr (std::is_same_v<T, double>) {
    return kernels().of_double;
  } else {
#if defined(__x86_64__)
    const bool pays = p.d >= kLeastBfloat16Depth && p.k >= kLeastBfloat16Columns;
    if (has_bfloat16_candidates() &&
        (p.candidates == Candidates::kBfloat16 || (p.candidates == Candidates::kAuto && pays))) {
      *rounded = true;
      return kKMeansAvx512Bfloat16;
    }
#endif
    return kernels().of_float;
  }
}

struct Free {
  void operator()(void* memory) const {
    std::free(memory);
  }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  Buffer memory(std::aligned_alloc(64, ceil_div(std::max<int64_t>(bytes, 1), 64) * 64));
  if (!memory) std::abort();
  return memory;
}

// The centroids as the product sees them; see CentroidTable.
template <class T>
struct Prepared {
  CentroidTable<T> table;
  std::vector<T> origin;
  std::vector<double> length;
  Buffer panels, offset;

  Prepared(const KMeansProblem<T>& p, const KMeansTyped<T>& typed, bool rounded, const Threads& threads,
           bool product = true)
      : origin(p.d) {
    table.centroids = p.centroids;
    table.k = p.k;
    table.d = p.d;
    table.depth = ceil_div(p.d, typed.step) * typed.step;
    table.cosine = p.cosine;
    if (p.cosine) find_lengths(p, threads);
    const double largest = find_origin(p, threads);
    int exponent = 0;
    if (largest > 0) std::frexp(largest, &exponent);
    constexpr int kMost = std::numeric_limits<T>::max_exponent - 8;
    table.scale = std::ldexp(T(1), -std::clamp(exponent, -kMost, kMost));
    table.origin = origin.data();
    table.length = length.data();
    if (product) pack(p, typed, rounded, threads);
  }

 private:
  double at(const KMeansProblem<T>& p, int64_t j, int64_t c) const {
    const double value = p.centroids[j * p.d + c];
    return p.cosine && length[j] > 0 ? value / length[j] : value;
  }

  void find_lengths(const KMeansProblem<T>& p, const Threads& threads) {
    length.resize(p.k);
    threads.ranges(p.k, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const T* centroid = p.centroids + j * p.d;
        double largest = 0, sum = 0;
        for (int64_t c = 0; c < p.d; ++c) largest = std::max<double>(largest, std::abs(centroid[c]));
        const double scale = largest > 0 ? std::ldexp(1., std::min(1000, -std::ilogb(largest))) : 1;
        for (int64_t c = 0; c < p.d; ++c) sum += centroid[c] * scale * (centroid[c] * scale);
        length[j] = std::sqrt(sum) / scale;
      }
    });
  }

  // The mean, rounded; returns the largest number of the centroids seen from there.
  double find_origin(const KMeansProblem<T>& p, const Threads& threads) {
    std::vector<double> largest(p.d);
    threads.ranges(p.d, 32, [&](int64_t begin, int64_t end) {
      std::vector<double> mean(end - begin);
      for (int64_t j = 0; j < p.k; ++j)
        for (int64_t c = begin; c < end; ++c) mean[c - begin] += at(p, j, c) / p.k;
      for (int64_t c = begin; c < end; ++c) origin[c] = static_cast<T>(mean[c - begin]);
      for (int64_t j = 0; j < p.k; ++j)
        for (int64_t c = begin; c < end; ++c)
          largest[c] = std::max(largest[c], std::abs(at(p, j, c) - origin[c]));
    });
    return p.d > 0 ? *std::max_element(largest.begin(), largest.end()) : 0;
  }

  void pack(const KMeansProblem<T>& p, const KMeansTyped<T>& typed, bool rounded, const Threads& threads) {
    const int64_t vectors = ceil_div(p.k, typed.width), n_panels = ceil_div(vectors, typed.vectors);
    panels = allocate(vectors * typed.width * table.depth * typed.element_size);
    offset = allocate(vectors * typed.width * sizeof(T));
    T* offsets = static_cast<T*>(offset.get());
    table.panels = panels.get();
    table.offset = offsets;
    while (int64_t(1) << table.index_bits < std::min(vectors, kGroupVectors)) ++table.index_bits;
    struct Norms {
      double full = 0, kept = 0, lost = 0, offset = 0;
    };
    std::vector<Norms> norms(n_panels);
    threads.ranges(n_panels, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> rows(typed.vectors * typed.width * p.d);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t vector = panel * typed.vectors, first = vector * typed.width;
        const int64_t wide = std::min(typed.vectors, vectors - vector);
        const int64_t count = std::min(p.k - first, wide * typed.width);
        for (int64_t j = 0; j < wide * typed.width; ++j) {
          if (j >= count) {
            offsets[first + j] = std::numeric_limits<T>::max() / 4;
            continue;
          }
          double norm = 0, lost = 0, shift = 0;
          for (int64_t c = 0; c < p.d; ++c) {
            const T q = static_cast<T>((at(p, first + j, c) - origin[c]) * table.scale);
            rows[j * p.d + c] = q;
            const double loss = rounded ? q - to_bfloat16_and_back(q) : 0;
            norm += double(q) * q;
            lost += loss * loss;
            shift += double(q) * (double(origin[c]) * table.scale);
          }
          offsets[first + j] = static_cast<T>(p.cosine ? -shift : norm / 2);
          norms[panel].full = std::max(norms[panel].full, norm);
          norms[panel].lost = std::max(norms[panel].lost, lost);
          norms[panel].offset = std::max(norms[panel].offset, norm / 2);
        }
        typed.pack(rows.data(), count, wide, p.d, table.depth,
                   static_cast<char*>(panels.get()) + first * table.depth * typed.element_size);
      }
    });
    Norms most;
    for (const Norms& norm : norms) {
      most.full = std::max(most.full, norm.full);
      most.lost = std::max(most.lost, norm.lost);
      most.offset = std::max(most.offset, norm.offset);
    }
    bound(std::sqrt(most.full), std::sqrt(most.lost), most.offset);
  }

  static double to_bfloat16_and_back(T value) {
    float number = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&number, &bits, sizeof(number));
    return number;
  }

  // The rounding error of a score, by Cauchy-Schwarz. A sum of d products in any order is off by at most (d +
  // 1) u times the sum of their sizes (Higham, Accuracy and Stability of Numerical Algorithms, §3.1), to first
  // order; 12 more cover the operands' own rounding, the offset's, the sums of the norms and the second order.
  void bound(double longest, double lost, double offset_bound) {
    const double unit = std::numeric_limits<T>::epsilon() / 2, tiny = std::numeric_limits<T>::min();
    double origin_norm = 0;
    for (T value : origin) origin_norm += double(value) * table.scale * (double(value) * table.scale);
    origin_norm = std::sqrt(origin_norm);
    // A bfloat16 instruction rounds twice for every pair, and takes what is below the normal range for zero.
    const double sum = (lost > 0 ? 2 : 1) * unit * (p_depth() + 12);
    // What the low bits of a score were; |score| ≤ ‖p̃‖ · ‖q̃‖ + offset.
    const double index = unit * 2 * (int64_t(1) << table.index_bits);
    table.per_norm = 1.001 * ((sum + index) * (longest + lost) + lost);
    table.per_loss = 1.001 * ((sum + index) * (longest + lost) + lost + longest);
    table.constant = 1.001 * ((sum + index) * offset_bound + tiny * 4 * (p_depth() + 12));
    // Unit vectors are rounded before they are moved, and the offset is a product with the origin.
    if (table.cosine)
      table.constant += 1.001 * longest * (4 * unit * table.scale + (sum + index) * origin_norm);
  }

  double p_depth() const {
    return static_cast<double>(table.depth);
  }
};

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
#if defined(__x86_64__)
  return kernels().name == kKMeansAvx512.name && has_bfloat16_dot();
#else
  return false;
#endif
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
  bool rounded;
  const KMeansTyped<T>& typed = choose(p, &rounded);
  const Prepared<T> prepared(p, typed, rounded, threads, false);
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
  bool rounded;
  KMeansProblem<T> any;
  any.candidates = Candidates::kFull;
  const KMeansTyped<T>& typed = choose(any, &rounded);
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
