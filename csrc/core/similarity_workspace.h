// What a chunk of the similarity pass works in: its memory, and how its operands are kept.
#pragma once

#include <cmath>
#include <cstdlib>

#include "similarity_operands.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int64_t kKeptBytes = 4 << 20;  // a larger workspace is given back at once

// A thread's last workspace, for its next part: fresh pages cost more than the work of a small part.
class Kept {
 public:
  ~Kept() {
    std::free(memory_);
  }
  char* take(int64_t size) {
    if (size > size_) {
      std::free(memory_);
      memory_ = nullptr;
    }
    char* const taken = memory_ ? memory_ : static_cast<char*>(std::aligned_alloc(64, larger(size, 64)));
    size_ = memory_ ? size_ : larger(size, 64);
    memory_ = nullptr;
    return taken;
  }
  void give_back(char* memory) {
    if (size_ <= kKeptBytes)
      memory_ = memory;
    else
      std::free(memory);
    if (!memory_) size_ = 0;
  }
  static Kept& of_this_thread() {
    static thread_local Kept kept;
    return kept;
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;  // of `memory_`, or of what was taken
};

// A part's memory: one allocation, cut into aligned pieces.
class Workspace {
 public:
  ~Workspace() {
    if (memory_) Kept::of_this_thread().give_back(memory_);
  }
  // Called once for every piece to measure, and after `allocate` once more to cut.
  template <class T>
  void cut(T*& piece, int64_t count) {
    piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
  }
  void allocate() {
    memory_ = Kept::of_this_thread().take(used_);
    used_ = 0;
  }

 private:
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

// Rows of the panel that begins at one of `rows`. Whole vectors but for the last panel: 3, but 4 as 2 and 2,
// since one alone would wait for its sums.
template <class T>
int64_t panel_rows(int64_t rows, int64_t row) {
  constexpr int kWidth = Simd<T>::kWidth;
  const int64_t left = rows - row;
  return left > 3 * kWidth && left <= 4 * kWidth ? 2 * kWidth : smaller(left, kPanel<T>);
}

// A panel of x meets some rows of y.
template <class In>
struct Panel {
  int64_t row, live;            // rows of this part
  int64_t c0, count;            // columns
  const Element<In>* const* y;  // their rows
  int64_t excluded, excluded_end;
};

// Everything that a part of a pass keeps. `kBoth`: the weights go to the columns as well as to the rows.
template <class In, Epilogue kEpilogue, bool kGather, bool kBoth>
struct PartState {
  using T = Compute<In>;
  using Element = WSCL_ISA::Element<In>;
  using Packed = WSCL_ISA::Packed<In>;
  static constexpr int kWidth = Simd<T>::kWidth;
  static constexpr T kInfinity = __builtin_huge_val();
  // Of a block's rows, for a whole tile.
  static constexpr int64_t kSpare = Operands<In>::kWhole - 1;
  static constexpr int64_t kMostColumns = Operands<In>::kMostColumns;  // of a block
  static constexpr bool kTwoWay = kEpilogue == Epilogue::kTwoWay;
  static constexpr bool kSoftmax = kTwoWay || kEpilogue == Epilogue::kSoftmax;
  static constexpr bool kSoftplus = kEpilogue == Epilogue::kSoftplus;
  static constexpr bool kRowShifts = kSoftplus || kEpilogue == Epilogue::kSymmetric;
  static constexpr bool kRowWeights = kEpilogue == Epilogue::kSymmetric || kEpilogue == Epilogue::kShared;

  const SimilarityParams<In>& params;
  const SimilarityPart<T>& part;
  const int64_t rows;      // of this part
  const int64_t d_padded;  // d as the second product sees it
  const int64_t block;     // rows of y in a block
  const int64_t depth;     // steps of the first product
  const bool in_place;     // y is read where it is; by tiles, where they do not reach beyond its end
  const bool x_in_place;   // and so is x, for the columns
  int64_t first_excluded;  // of this part's rows
  T row_norm = 0;          // the largest of this part's
  T column_norm = 0;       // the largest of the block's

  Workspace memory;
  Packed* x_packed;                // [panel][depth][lanes]
  Element* y_copy;                 // [block][d_padded] where y cannot be read in place
  uint32_t* y_pairs;               // [block / 2][d_padded] for the second product; of tiles transposed
  T* output;                       // [rows][d_padded]; of tiles [panel][d_padded][lanes]
  T* logits;                       // [block][lanes], then the weights
  T *norms, *shifts, *weights;     // [rows]
  double *sums, *slopes;           // [rows]
  T* scratch;                      // [kWidth][d_padded]
  T *column_shifts, *column_sums;  // [block][kWidth], lane by lane
  T* column_output;                // [block][d_padded]
  const Element** x_rows;          // [rows] for the columns' product
  Element* x_copy;                 // [rows][d_padded] where x cannot be read in place
  uint32_t* x_pairs;               // [rows / 2][d_padded] for the columns' product of pairs
  uint32_t* weight_pairs;          // [block][lanes / 2]
  uint32_t* gather_pairs;          // [block / 2][lanes] of tiles
  const Element* y_rows[kMostColumns + kKeys];  // of the block
  int64_t y_bytes = 0;                          // from one of them to the next, where tiles read them
  const char* next_rows[kMostColumns];          // of the next block, as they stand
  Aheads ahead;                                 // over these, and places of what is kept
  Aheads nothing;
  const T* known = nullptr;  // a panel's logits: `logits`, or where they are kept

  PartState(const SimilarityParams<In>& p, const SimilarityPart<T>& part)
      : params(p),
        part(part),
        rows(part.row1 - part.row0),
        d_padded(round_up(p.d, kTiles<In> ? 2 * kWidth : kWidth)),
        block(Operands<In>::block_rows(p.d, kTwoWay || kBoth)),
        depth(kTiles<In>   ? d_padded / 2
              : kPairs<In> ? (p.d + 1) / 2
                           : p.d),
        in_place(kTiles<In>   ? d_padded == p.d && !p.y.index
                 : kPairs<In> ? p.d % 2 == 0
                              : number_bytes(p.y) == sizeof(T) && (!kGather || d_padded == p.d)),
        x_in_place(kPairs<In> || (number_bytes(p.x) == sizeof(T) && d_padded == p.d)) {
    const int64_t padded = round_up(rows, kWidth), columns = block + kSpare;
    for (int round = 0; round < 2; ++round) {
      memory.cut(x_packed, padded * depth);
      memory.cut(y_copy, in_place && !kTiles<In> ? 0 : columns * d_padded);
      memory.cut(output, kGather ? padded * d_padded : 0);
      memory.cut(logits, (block + kKeys) * kPanel<T>);
      memory.cut(norms, padded);
      memory.cut(shifts, padded);
      memory.cut(weights, padded);
      memory.cut(sums, padded);
      memory.cut(slopes, kSoftplus ? padded : 0);
      memory.cut(y_pairs, kPairs<In> && kGather ? Operands<In>::pair_rows(block) * d_padded : 0);
      memory.cut(scratch, kWidth * round_up(p.d, 2 * kWidth));
      memory.cut(column_shifts, kTwoWay ? block * kWidth : 0);
      memory.cut(column_sums, kTwoWay ? block * kWidth : 0);
      memory.cut(column_output, kBoth ? columns * d_padded : 0);
      memory.cut(x_rows, kBoth ? rows : 0);
      memory.cut(x_copy, kBoth && !x_in_place ? rows * d_padded : 0);
      memory.cut(x_pairs, kBoth && kPairs<In> ? x_pair_rows() * d_padded : 0);
      memory.cut(gather_pairs, kTiles<In> && kGather ? block / 2 * kPanel<T> : 0);
      memory.cut(weight_pairs, kBoth && kPairs<In> ? columns * kPanel<T> / 2 : 0);
      if (round == 0) memory.allocate();
    }
    int64_t low = 0, high = p.excluded_count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.excluded[middle].row < part.row0)
        low = middle + 1;
      else
        high = middle;
    }
    first_excluded = low;
  }

  // A panel's rows in x_pairs, and its columns in y_pairs.
  RowMatrix<Packed> pairs_of_rows(const Panel<In>& p) const {
    return {x_pairs + p.row / 2 * d_padded, d_padded};
  }
  RowMatrix<Packed> pairs_of_columns(const Panel<In>& p) const {
    return {y_pairs + (p.y - y_rows) / 2 * d_padded, d_padded};
  }
  // What its rows have gathered, and what its columns have.
  T* sums_of_rows(const Panel<In>& p) const {
    return output + p.row * d_padded;
  }
  T* sums_of_columns(const Panel<In>& p) const {
    return column_output + (p.y - y_rows) * d_padded;
  }

  // Rows of x_pairs, those of the last panel to its end.
  int64_t x_pair_rows() const {
    return round_up(rows, kTiles<In> ? kPanel<T> : kWidth) / 2;
  }
};

}  // namespace WSCL_ISA
}  // namespace wscl
