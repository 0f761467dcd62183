// The centroids as the product of a pass sees them, and the kernels that run it (included by the drivers).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "kmeans_pass.h"

namespace wscl {

constexpr int64_t kLeastRows = 48;  // of a part
constexpr int64_t kBlockBytes = 128 * 1024;
// A product of bfloat16 halves the multiply-adds; with fewer of them what comes on top is more than that.
constexpr int64_t kLeastBfloat16Depth = 32, kLeastBfloat16Columns = 64;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline const KMeansKernels& kmeans_kernels() {
#if defined(__x86_64__)
  const std::string name = cpu_kernels().name;
  if (name == kKMeansAvx2.name) return kKMeansAvx2;
  if (name != kKMeansPortable.name) return kKMeansAvx512;
#endif
  return kKMeansPortable;
}

// The kernels whose product is of bfloat16, if the instruction set in use has one.
inline const KMeansTyped<float>* bfloat16_kernels() {
#if defined(__x86_64__)
  const std::string name = cpu_kernels().name;
  if (name == "amx_bf16") return &kKMeansAvx512Amx;
  if (name == "avx512_bf16") return &kKMeansAvx512Bfloat16;
#endif
  return nullptr;
}

// The kernels whose product is in T.
template <class T>
const KMeansTyped<T>& full_kernels() {
  if constexpr (std::is_same_v<T, double>)
    return kmeans_kernels().of_double;
  else
    return kmeans_kernels().of_float;
}

template <class T>
const KMeansTyped<T>& choose(const KMeansProblem<T>& p, bool* rounded) {
  *rounded = false;
  if constexpr (std::is_same_v<T, float>) {
    const bool pays = p.d >= kLeastBfloat16Depth && p.k >= kLeastBfloat16Columns;
    const KMeansTyped<float>* const typed = bfloat16_kernels();
    if (typed && (p.candidates == Candidates::kBfloat16 || (p.candidates == Candidates::kAuto && pays))) {
      *rounded = true;
      return *typed;
    }
  }
  return full_kernels<T>();
}

struct Free {
  void operator()(void* memory) const {
    std::free(memory);
  }
};
using Buffer = std::unique_ptr<void, Free>;

inline Buffer allocate(int64_t bytes) {
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

  // Columns come in `order`, [k] centroids; null: as they are.
  Prepared(const KMeansProblem<T>& p, const KMeansTyped<T>& typed, bool rounded, const Threads& threads,
           bool product = true, const int64_t* order = nullptr)
      : origin(p.d) {
    table.centroids = p.centroids;
    table.order = order;
    table.k = p.k;
    table.d = p.d;
    choose_terms(typed);
    table.cosine = p.cosine;
    if (p.cosine) find_lengths(p, threads);
    const Middle middle = find_origin(p, threads);
    int exponent = 0;
    if (middle.largest > 0) std::frexp(middle.largest, &exponent);
    constexpr int kMost = std::numeric_limits<T>::max_exponent - 8, kCommon = 20;
    table.as_they_are = !p.cosine && std::abs(exponent) <= kCommon && 16 * middle.squared < middle.spread;
    if (table.as_they_are)
      std::fill(origin.begin(), origin.end(), T(0));
    else
      table.scale = std::ldexp(T(1), -std::clamp(exponent, -kMost, kMost));
    table.origin = origin.data();
    table.length = length.data();
    if (product) pack(p, typed, rounded, threads);
  }

 private:
  // As many terms of a column side by side in the last vector as make the product smallest.
  void choose_terms(const KMeansTyped<T>& typed) {
    const int64_t vectors = ceil_div(table.k, typed.width), last = table.k - (vectors - 1) * typed.width;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t terms = 1; terms <= typed.most_terms && last * terms <= typed.width; terms *= 2) {
      const int64_t depth = ceil_div(table.d, typed.stretch * terms) * typed.stretch * terms;
      const int64_t steps = (vectors - 1) * depth + depth / terms;
      if (steps >= least) continue;
      least = steps;
      table.terms = terms;
      table.depth = depth;
    }
  }

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

  struct Middle {
    double largest = 0;  // number of the centroids seen from the middle
    double squared = 0;  // length of the middle
    double spread = 0;   // the mean of ‖c − middle‖²
  };

  // The mean, rounded.
  Middle find_origin(const KMeansProblem<T>& p, const Threads& threads) {
    std::vector<double> largest(p.d), spread(p.d);
    threads.ranges(p.d, 32, [&](int64_t begin, int64_t end) {
      std::vector<double> mean(end - begin);
      for (int64_t j = 0; j < p.k; ++j)
        for (int64_t c = begin; c < end; ++c) mean[c - begin] += at(p, j, c) / p.k;
      for (int64_t c = begin; c < end; ++c) origin[c] = static_cast<T>(mean[c - begin]);
      for (int64_t j = 0; j < p.k; ++j)
        for (int64_t c = begin; c < end; ++c) {
          const double apart = at(p, j, c) - origin[c];
          largest[c] = std::max(largest[c], std::abs(apart));
          spread[c] += apart * apart / p.k;
        }
    });
    Middle middle;
    for (int64_t c = 0; c < p.d; ++c) {
      middle.largest = std::max(middle.largest, largest[c]);
      middle.squared += double(origin[c]) * origin[c];
      middle.spread += spread[c];
    }
    return middle;
  }

  void pack(const KMeansProblem<T>& p, const KMeansTyped<T>& typed, bool rounded, const Threads& threads) {
    const int64_t vectors = ceil_div(p.k, typed.width), whole = vectors - (table.terms > 1);
    const int64_t n_panels = ceil_div(whole, typed.vectors) + (vectors - whole);
    const int64_t panel_bytes = vectors * typed.width * table.depth * typed.element_size;
    panels = allocate(panel_bytes);
    // Panels that the second cache level does not hold come from farther away once for each block.
    const int64_t level = second_level_bytes();
    table.block_bytes = panel_bytes > level / 2 ? std::max(level / 3, kBlockBytes) : kBlockBytes;
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
        const int64_t vector = std::min(panel * typed.vectors, whole), first = vector * typed.width;
        const bool narrow = table.terms > 1 && panel == n_panels - 1;
        const int64_t wide = narrow ? 1 : std::min(typed.vectors, whole - vector);
        const int64_t count = std::min(p.k - first, wide * typed.width);
        for (int64_t j = 0; j < wide * typed.width; ++j) {
          if (j >= count) {
            offsets[first + j] = std::numeric_limits<T>::max() / 4;
            continue;
          }
          double norm = 0, lost = 0, shift = 0;
          for (int64_t c = 0; c < p.d; ++c) {
            const T q = static_cast<T>((at(p, table.centroid(first + j), c) - origin[c]) * table.scale);
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
        typed.pack(rows.data(), count, wide, narrow ? table.terms : 1, p.d, table.depth,
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
    table.longest = longest;
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

}  // namespace wscl
