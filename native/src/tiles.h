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
