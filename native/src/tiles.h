// What the products of all formats are made of: tiles of rows, and requests for the next one.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace llorch::LLORCH_ISA {

// Some rows of the weights, `distance` rows apart, and some columns.
struct Tile {
  size_t row;
  size_t distance;
  size_t column;
};

// Prefetches a share of the next tile's rows while this tile is summed for a group of columns. If there are several
// groups, the weights are in the cache from the second one on, and memory would be idle.
class Ahead {
 public:
  Ahead(const char* from, size_t distance, size_t rows, size_t step_bytes)
      : from_(from), distance_(distance), rows_(rows), step_bytes_(step_bytes) {}
  LLORCH_INLINE void step() {
    for (size_t row = 0; row < rows_; ++row) __builtin_prefetch(from_ + row * distance_, 0, 2);
    from_ += step_bytes_;
  }

 private:
  const char* from_;
  size_t distance_;
  size_t rows_;
  size_t step_bytes_;
};

// The factors of rows whose vectors have been multiplied by their scales already.
constexpr float kOnes[8] = {1, 1, 1, 1, 1, 1, 1, 1};

// Stores the sum of each vector of a tile; times a factor of its row and the scale of its column, if there are factors.
template <int kRows, int kColumns, typename Total>
LLORCH_INLINE void put_sums(const Product& product, const Tile& at, const Total (&totals)[kRows][kColumns],
                            const float* factors, const int32_t* offsets = nullptr) {
  float* const to = product.y + at.row * product.columns + at.column;
  const size_t distance = at.distance * product.columns;
#if LLORCH_BYTES == 64
  if constexpr (kRows == 4 && kColumns == 4) {
    Total vectors[kLanes];
    LLORCH_UNROLL for (int i = 0; i < kLanes; ++i) vectors[i] = totals[i / kColumns][i % kColumns];
    Total all = sums(vectors);
    if (offsets != nullptr) all += (Total)repeat(offsets);
    Floats y = __builtin_convertvector(all, Floats);
    if (factors != nullptr) y *= spread<4>(factors) * (Floats)repeat(product.code_scales + at.column);
    float rows[kLanes];
    store(rows, y);
    LLORCH_UNROLL for (int r = 0; r < kRows; ++r) store(to + r * distance, load<Quarter>(rows + r * kColumns));
    return;
  }
#endif
  LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
    LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) {
      auto total = sum(totals[r][c]);
      if (offsets != nullptr) total += offsets[c];
      const float y = static_cast<float>(total);
      to[r * distance + c] = factors == nullptr ? y : y * (factors[r] * product.code_scales[at.column + c]);
    }
  }
}

// The scales of some consecutive groups of one row, in float32.
constexpr size_t kScales = 16;

LLORCH_INLINE void read_scales(const uint16_t* from, size_t count, float (&to)[kScales]) {
#if LLORCH_BYTES == 64
  const __mmask16 there = count < kScales ? (1 << count) - 1 : 0xffff;
  store(to, from_float16((HalfWords)_mm256_maskz_loadu_epi16(there, from)));
#else
  uint16_t bits[kScales] = {};
  copy(bits, from, count < kScales ? count : kScales);
  for (size_t i = 0; i < kScales; i += kLanes) store(to + i, from_float16(load<HalfWords>(bits + i)));
#endif
}

}  // namespace llorch::LLORCH_ISA
