#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kmeans_pass.h"
#include "similarity.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX512_BFLOAT16)
#define WSCL_ISA avx512amx
#define WSCL_VECTOR_BYTES 64
#define WSCL_ROW_TILE 32
#include "amx.h"
#include "kmeans_bfloat16.h"
#include "kmeans_tile.h"

namespace wscl {
namespace avx512amx {

// Operands of tiles.
struct TileOperands : Bfloat16Rows {
  static constexpr int kStretch = kStep * kTilePairs, kMostTerms = 1;
  using InUse = Tiles;
};

// Scores of kRows rows: two tiles of rows by kCount of columns, which begin at minus the offset. They go
// through the stack to the vectors that find the best.
template <int kCount>
WSCL_INLINE void score_tile(TileOperands, const Tile<TileOperands>& tile) {
  static_assert(kRows == 2 * kTileRows && kCount <= 2, "four sums");
  constexpr int64_t kWidth = kCount * kTileRows, kBytes = kWidth * sizeof(float);
  alignas(64) float start[kWidth], scores[kRows * kWidth];
  for (int v = 0; v < kCount; ++v) store(start + v * kTileRows, -load(tile.offset + v * kTileRows));
  tile_load<0>(start, 0);
  tile_load<2>(start, 0);
  if (kCount == 2) {
    tile_load<1>(start + kTileRows, 0);
    tile_load<3>(start + kTileRows, 0);
  }
  const uint16_t *rows = tile.rows, *next_rows = rows + kTileRows * tile.stride, *panel = tile.panel;
  const int64_t row_bytes = tile.stride * int64_t(sizeof(uint16_t));
  for (int64_t p = 0; p < tile.depth; p += TileOperands::kStretch) {
    tile_load<4>(rows + p, row_bytes);
    tile_load<5>(next_rows + p, row_bytes);
    tile_load<6>(panel, kBytes);
    tile_multiply<0, 4, 6>();
    tile_multiply<2, 5, 6>();
    if (kCount == 2) {
      tile_load<7>(panel + kTileRows * TileOperands::kStep, kBytes);
      tile_multiply<1, 4, 7>();
      tile_multiply<3, 5, 7>();
    }
    panel += kWidth * TileOperands::kStretch;
  }
  tile_store<0>(scores, kBytes);
  tile_store<2>(scores + kTileRows * kWidth, kBytes);
  if (kCount == 2) {
    tile_store<1>(scores + kTileRows, kBytes);
    tile_store<3>(scores + kTileRows * kWidth + kTileRows, kBytes);
  }
  for (int r = 0; r < kRows; ++r) {
    Vector<float> score[kCount];
    for (int v = 0; v < kCount; ++v) score[v] = load(scores + r * kWidth + v * kTileRows);
    take_scores<float, kCount>(score, tile.vector, tile.index_mask, tile.states[r]);
  }
}

}  // namespace avx512amx
}  // namespace wscl
#include "kmeans_typed.h"

namespace wscl {
const KMeansTyped<float> kKMeansAvx512Amx = avx512amx::kmeans_typed<avx512amx::TileOperands>();
}  // namespace wscl

WSCL_TARGET_END
