// The kernel of similarity_cuda.h, one template for all epilogues and precisions.
//
// In PyTorch:   S = scale * x @ y.T;  W = epilogue(S);  output = W @ y
//
// Tile map. A CTA owns kRows rows, a warp 16 · kRowTiles of them with all of d:
//
//   X tile  [kRows][kDim]              shared memory once; fragments in registers where they fit
//   for each tile of kColumns columns, kStages in flight by cp.async:
//     S[16 · kRowTiles][kColumns]      registers of a warp:  first product, Y tile by ldmatrix
//     W = epilogue(S)                  in place; its layout is that of the second product's operand
//     O[16 · kRowTiles][kDim]          registers of a warp:  second product, the same Y tile by ldmatrix.trans
//
// Memory: X once, Y once a CTA (from L2: all CTAs stream the same columns), O once. S never leaves registers.
// No atomics, one barrier a tile (two where float32 is split).
//
// A row's shift is an integer, so a new one rescales by an exact power of two. It is set from the first tile;
// from there on no maximum is looked for: a weight that outgrows Mma::kLimit shows in the row's sum, which is
// there anyway, and then the tile's similarities are computed again and the shift is raised.
#pragma once

#include "similarity_tile.cuh"

namespace wscl::cuda {

// A test's build leaves this barrier out, to see that the race detector notices.
#ifdef WSCL_WITHOUT_TILE_BARRIER
#define WSCL_TILE_BARRIER()
#else
#define WSCL_TILE_BARRIER() __syncthreads()
#endif

constexpr float kLog2E = 1.44269504088896340736f;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the four lanes that share a row.
template <class Number>
__device__ __forceinline__ Number sum_of_row(Number of_lane) {
  of_lane += __shfl_xor_sync(kAllLanes, of_lane, 1);
  return of_lane + __shfl_xor_sync(kAllLanes, of_lane, 2);
}

// The first of a CTA's rows.
template <class T>
__device__ __forceinline__ int block_row(const SimilarityParams& p) {
  return (static_cast<int>(p.first_block) + blockIdx.x) * T::kRows;
}

// The bits of a tile's columns.
template <class T>
constexpr uint64_t kTileBits = T::kColumns == 64 ? ~uint64_t(0) : (uint64_t(1) << T::kColumns % 64) - 1;

// Whether a tile's columns have bits in two words.
template <class T>
__device__ __forceinline__ bool crosses_words(int column0) {
  return kValidBits % T::kColumns && column0 % kValidBits + T::kColumns > kValidBits;
}

// What a warp's rows are, and which pairs of a tile are masked.
template <class T>
struct WarpRows {
  const SimilarityParams& p;
  uint32_t bounds;  // four ints in shared memory: they are looked at once a tile, and registers are dear

  __device__ __forceinline__ WarpRows(const SimilarityParams& p, uint32_t memory)
      : p(p), bounds(memory + threadIdx.x / 32 * 16) {}

  // The position of fragment element e's row: row_tile · 16 + (e / 2 = half) · 8 + lane / 4 of the warp's.
  __device__ __forceinline__ int row(int row_tile, int half) const {
    return warp_row() + threadIdx.x % 32 / 4 + row_tile * 16 + half * 8;
  }
  __device__ __forceinline__ int warp_row() const {
    return block_row<T>(p) + threadIdx.x / 32 * 16 * T::kRowTiles;
  }

  // Finds the least and the greatest of row_excluded, and the columns that all rows of the warp meet, or, with
  // `outside`, those that any of them does not meet.
  __device__ __forceinline__ void start() const {
    int least = INT_MAX, greatest = -1, begin = p.outside ? INT_MAX : 0, end = p.outside ? 0 : INT_MAX;
    const int lane = threadIdx.x % 32, r = warp_row() + lane;
    if (lane < 16 * T::kRowTiles && r < p.x.count) {
      const int excluded = p.row_excluded ? p.row_excluded[r] : -1;
      if (excluded >= 0) least = greatest = excluded;
      if (p.begin) {
        begin = p.begin[r];
        end = p.end[r];
      }
    }
    least = __reduce_min_sync(kAllLanes, least);
    greatest = __reduce_max_sync(kAllLanes, greatest);
    begin = p.outside ? __reduce_min_sync(kAllLanes, begin) : __reduce_max_sync(kAllLanes, begin);
    end = p.outside ? __reduce_max_sync(kAllLanes, end) : __reduce_min_sync(kAllLanes, end);
    if (lane == 0)
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(bounds), "r"(least), "r"(greatest),
                   "r"(begin), "r"(end)
                   : "memory");
    __syncwarp();
  }

  // Whether a pair of this tile and these rows is masked though its column takes part; the same for all lanes.
  __device__ __forceinline__ bool masks(int column0) const {
    int least, greatest, begin, end;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(least), "=r"(greatest), "=r"(begin), "=r"(end)
                 : "r"(bounds)
                 : "memory");
    bool masked = least < column0 + T::kColumns && greatest >= column0;
    masked = masked || (p.outside ? begin < column0 + T::kColumns && end > column0
                                  : begin > column0 || end < column0 + T::kColumns);
    if (p.column_excluded) {
      const int64_t first = warp_row() + p.x_origin;
      const int word = column0 / kValidBits;
      const int words = crosses_words<T>(column0) && (word + 1) * kValidBits < p.y.count ? 2 : 1;
      for (int i = 0; i < words; ++i) {
        const int2 range = p.excluded_range[word + i];
        masked = masked || (range.x < first + 16 * T::kRowTiles && range.y >= first);
      }
    }
    return masked;
  }

  // Bits 2 n + e of this thread's row: whether it meets column 8 n + 2 (lane % 4) + e of the tile, or, for
  // kExcluded, whether that pair is an excluded one of a column that takes part.
  template <bool kExcluded>
  __device__ __forceinline__ uint32_t pairs(int r, int column0, uint64_t valid_columns) const {
    const bool live = r < p.x.count;
    const int begin = live && p.begin ? p.begin[r] : 0, end = live && p.begin ? p.end[r] : INT_MAX;
    const int excluded = live && p.row_excluded ? p.row_excluded[r] : -1;
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < T::kColumns / 4; ++i) {
      const int c = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2, column = column0 + c;
      const bool valid = (valid_columns >> c) & 1;
      const bool own =
          column == excluded || (p.column_excluded && valid && p.column_excluded[column] == r + p.x_origin);
      const bool inside = column >= begin && column < end;
      const bool bit = valid && (kExcluded ? own : !own && inside != p.outside);
      bits |= static_cast<uint32_t>(bit) << i;
    }
    return bits;
  }
};

// The tiles of columns that a CTA's part goes through; from `wrap` on they start over at 0.
struct TileRange {
  int first, last, wrap;

  __device__ __forceinline__ int place(int tile) const {
    return tile < wrap ? tile : tile - wrap;
  }
};

// Triangular: row block b of B meets column blocks b to b + B / 2, cyclically, so that every CTA has the same
// work and every unordered pair of blocks is met once; of two blocks at a distance of just B / 2 the first.
template <class T>
__device__ __forceinline__ TileRange triangle_of(const SimilarityParams& p, int row0, int split) {
  constexpr int kTiles = T::kRows / T::kColumns;
  static_assert(T::kRows % T::kColumns == 0);
  const int blocks = (static_cast<int>(p.x.count) + T::kRows - 1) / T::kRows, block = row0 / T::kRows;
  const int met = blocks / 2 + (blocks % 2 || block < blocks / 2);
  const int64_t tiles = met * kTiles, first = block * kTiles;
  return {static_cast<int>(first + tiles * split / p.splits),
          static_cast<int>(first + tiles * (split + 1) / p.splits), blocks * kTiles};
}

// The parts of this CTA's rows.
__device__ __forceinline__ int parts_of(const SimilarityParams& p, int row0) {
  return row0 < p.whole_rows ? 1 : p.splits;
}

// Number of a part's row among the results.
__device__ __forceinline__ int64_t part_place(const SimilarityParams& p, int split, int row) {
  return part_place(split, row, p.x.count, p.whole_rows);
}

template <class T>
__device__ __forceinline__ TileRange tiles_of(const SimilarityParams& p, int row0, int split) {
  int first = 0, last = (static_cast<int>(p.y.count) + T::kColumns - 1) / T::kColumns;
  if (p.begin && !p.outside) {
    first = p.begin[row0] / T::kColumns;
    const int columns = p.end[min(row0 + T::kRows, static_cast<int>(p.x.count)) - 1];
    last = min(last, (columns + T::kColumns - 1) / T::kColumns);
  }
  const int64_t tiles = max(0, last - first);
  const int splits = parts_of(p, row0);
  return {first + static_cast<int>(tiles * split / splits),
          first + static_cast<int>(tiles * (split + 1) / splits), INT_MAX};
}

template <class T, bool kBoth>
__device__ __forceinline__ TileRange range_of(const SimilarityParams& p, int row0, int split) {
  if constexpr (kBoth)
    if (p.triangular) return triangle_of<T>(p, row0, split);
  return tiles_of<T>(p, row0, split);
}

// The columns of a tile that take part, as bits from 0.
template <class T>
__device__ __forceinline__ uint64_t valid_columns(const SimilarityParams& p, int tile) {
  const int first = tile * T::kColumns;
  if (first >= p.y.count) return 0;
  const int count = static_cast<int>(p.y.count) - first;
  if (p.y_valid) {
    const uint64_t* word = p.y_valid + first / kValidBits;
    const int bit = first % kValidBits;
    uint64_t bits = *word >> bit;
    if (crosses_words<T>(first) && kValidBits - bit < count) bits |= word[1] << (kValidBits - bit);
    return bits;
  }
  return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

// Shifts and weights of a tile's columns, on their way to shared memory.
template <class T>
__device__ __forceinline__ void ask_columns(const SimilarityParams& p, uint32_t to, int64_t first) {
  constexpr int kChunks = T::kColumns / 4;
  if (threadIdx.x >= 2 * kChunks) return;
  const int which = threadIdx.x / kChunks;
  const int64_t column = first + threadIdx.x % kChunks * 4;
  const float* vector = which ? p.column_weight : p.column_shift;
  // Vectors are padded with zeros to whole words of bits; a tile may be longer than that.
  const bool inside = kValidBits % T::kColumns == 0 || column < p.y.count;
  copy_async(to + threadIdx.x * 16, vector + (inside ? column : 0), inside ? 16 : 0);
}

// The streamed columns: what lies in shared memory, what is on its way. kKeepsBits: a tile's bits are read once
// and wait in registers, where there are some left; else they are read again when its turn comes.
template <class T, bool kVectors, bool kWraps, bool kKeepsBits>
struct ColumnStream {
  static constexpr int kAhead = T::kSplit ? 1 : T::kStages - 1;

  const SimilarityParams& p;
  uint32_t tiles, vectors, staging;  // shared memory
  TileRange range;
  bool chunks;
  // Of the tile to be asked for next, as they have to be here before the rows are: whether all columns take
  // part, and kKeepsBits: their bits.
  bool whole;
  uint64_t ahead;
  uint64_t asked[kAhead], current;  // kKeepsBits: of those on their way, and of this one

  __device__ __forceinline__ ColumnStream(const SimilarityParams& p, uint32_t memory)
      : p(p),
        tiles(memory),
        vectors(memory + T::kBuffers * T::kColumnBytes),
        staging(vectors + T::kBuffers * T::kVectorBytes),
        chunks(in_chunks(p.y, sizeof(typename T::In))) {}

  __device__ __forceinline__ int place(int tile) const {
    return kWraps ? range.place(tile) : tile;
  }

  __device__ __forceinline__ uint64_t valid(int tile) const {
    return tile < range.last ? valid_columns<T>(p, place(tile)) : 0;
  }

  // Those of the tile that advance() gave.
  __device__ __forceinline__ uint64_t bits_of(int tile) const {
    return kKeepsBits ? current : valid(tile);
  }

  __device__ __forceinline__ void ask(int tile, int buffer) {
    if constexpr (kKeepsBits) {
#pragma unroll
      for (int i = 1; i < kAhead; ++i) asked[i - 1] = asked[i];
      asked[kAhead - 1] = ahead;
    }
    if (tile < range.last) {
      const uint64_t bits = kKeepsBits ? ahead : whole ? ~uint64_t(0) : valid(tile);
      const auto live = [=](int row) { return (bits >> row) & 1; };
      const int64_t first = int64_t(place(tile)) * T::kColumns;
      if constexpr (T::kSplit)
        Staging<T, T::kColumns>::fill(staging, p.y, first, p.d, chunks, whole, live);
      else
        load_tile<T, T::kColumns>(tiles + buffer * T::kColumnBytes, p.y, first, p.d, chunks, whole, live);
      if constexpr (kVectors && !T::kSplit) ask_columns<T>(p, vectors + buffer * T::kVectorBytes, first);
    }
    copy_commit();
    look_at(tile + 1);
  }

  __device__ __forceinline__ void look_at(int tile) {
    ahead = valid(tile);
    whole = (ahead | ~kTileBits<T>) == ~uint64_t(0);
  }

  __device__ __forceinline__ void start(const TileRange& tiles) {
    range = tiles;
    const int first = range.first;
    look_at(first);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ask(first + i, (first + i) % T::kBuffers);
  }

  // Makes a tile readable by every warp, and asks for a later one; returns its buffer.
  __device__ __forceinline__ int advance(int tile) {
    if constexpr (kKeepsBits) current = asked[0];
    if constexpr (T::kSplit) {
      copy_wait<0>();
      __syncthreads();  // every warp is done with the planes of the tile before
      Staging<T, T::kColumns>::template split<T::kColumnPlane>(staging, tiles);
      if constexpr (kVectors) {
        ask_columns<T>(p, vectors, int64_t(tile) * T::kColumns);
        copy_commit();
        copy_wait<0>();
      }
      ask(tile + 1, 0);
      WSCL_TILE_BARRIER();  // the planes are whole
      return 0;
    } else {
      copy_wait<T::kStages - 2>();
      WSCL_TILE_BARRIER();  // everyone's copies of this tile are here, and everyone is done with the one before
      ask(tile + T::kStages - 1, (tile + T::kStages - 1) % T::kBuffers);
      return tile % T::kBuffers;
    }
  }
};

}  // namespace wscl::cuda
