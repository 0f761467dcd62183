// The weights of kTags: bits that a row and a column have in common, in the place of similarities. There is no
// first product; the gather is that of all epilogues.
#pragma once

#include "similarity_mainloop.cuh"

namespace wscl::cuda {

template <class T>
struct TagWeights {
  double total[T::kRowTiles][2] = {};  // of this lane's columns

  // Bits are counted a word at a time; |a ∪ b| = |a| + |b| − |a ∩ b|.
  __device__ __forceinline__ void weigh(const SimilarityParams& p, const WarpRows<T>& rows, int column0,
                                        Logits<T>& s) {
    constexpr int kEach = T::kColumns / 4;  // columns of a lane
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt) {
      int common[2][kEach] = {}, in_row[2] = {}, in_column[kEach] = {};
#pragma unroll 1
      for (int64_t w = 0; w < p.words; ++w) {
        uint64_t row[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t r = rows.row(rt, h);
          row[h] = r < p.x.count ? p.row_tags[r * p.words + w] : 0;
          in_row[h] += __popcll(row[h]);
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int64_t column = column0 + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
          const uint64_t tags = column < p.y.count ? p.column_tags[column * p.words + w] : 0;
          in_column[i] += __popcll(tags);
#pragma unroll
          for (int h = 0; h < 2; ++h) common[h][i] += __popcll(row[h] & tags);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float part = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int both = common[h][i], either = in_row[h] + in_column[i] - both;
          float weight = both ? 1.f : 0.f;
          if (p.jaccard)
            weight = either ? __fdiv_rn(static_cast<float>(both), static_cast<float>(either)) : 0.f;
          s[rt][i / 2][h * 2 + i % 2] = weight;
          part += weight;
        }
        total[rt][h] += part;
      }
    }
  }

  __device__ __forceinline__ void store(const SimilarityParams& p, const WarpRows<T>& rows, int split) const {
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const double sum = sum_of_row(total[rt][h]);
        const int r = rows.row(rt, h);
        if (threadIdx.x % 4 == 0 && r < p.x.count) p.total[part_place(p, split, r)] = sum;
      }
  }
};

}  // namespace wscl::cuda
