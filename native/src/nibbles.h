// Products of 4-bit codes and a few columns, for one instruction set. Include simd.h's macros first.
//
// Each column is rounded to 16-bit integers, as for 8-bit codes, but split into a high and a low byte, so that
// instructions can be used that multiply unsigned codes, as they are, with signed bytes. Sums are those of integers:
// exact in any order within a group.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace llorch::LLORCH_ISA {

// A step is kBytes bytes of a row: the first codes of its bytes, then the second ones.
constexpr size_t kBytes = LLORCH_BYTES;
constexpr size_t kCodeBytes = 4 * kBytes;  // of a column, for one step: two bytes for each code

// For all steps of a column: the bytes of its elements (high and low bytes for the first codes, then for the second),
// and -8 times the sum of the elements that each lane adds up, because a code c stands for c - 8.
struct SplitColumn {
  int8_t* bytes;     // of its first step; those of the next one are `columns` times kCodeBytes further
  int32_t* offsets;  // likewise, `columns` times kLanes
  size_t columns;
};

LLORCH_INLINE SplitColumn split_column(const Product& product, size_t column) {
  const size_t elements = padded(product.width);
  char* begin = reinterpret_cast<char*>(product.codes);
  const size_t all_bytes = product.columns * elements * 2;
  return {reinterpret_cast<int8_t*>(begin + column * kCodeBytes),
          reinterpret_cast<int32_t*>(begin + all_bytes) + column * kLanes, product.columns};
}

// A last step that the row does not fill has zeros after it.
LLORCH_INLINE void clear_last_step(const Product& product) {
  const size_t row_bytes = product.width / 2;
  if (row_bytes % kBytes == 0) return;
  int8_t* last = split_column(product, 0).bytes + row_bytes / kBytes * product.columns * kCodeBytes;
  for (size_t i = 0; i < product.columns * kCodeBytes; i += kBytes) store(last + i, Bytes{});
}

// Splits consecutive integers, which stay together because half a group is a multiple of 16.
LLORCH_INLINE void split(Ints codes, size_t k, size_t group, const SplitColumn& to) {
  const size_t half = group / 2;
  const size_t within = k % group;
  const size_t second = within >= half;
  const size_t byte = k / group * half + within - second * half;
  int8_t* high = to.bytes + byte / kBytes * to.columns * kCodeBytes + second * 2 * kBytes + byte % kBytes;
  const Ints upper = (codes + 128) >> 8;
  store(high, narrow<QuarterBytes>(upper));
  store(high + kBytes, narrow<QuarterBytes>(codes - upper * 256));
}

LLORCH_INLINE void put_offsets(const Product& product) {
  const size_t steps = (product.width / 2 + kBytes - 1) / kBytes;
  const Bytes ones[2] = {Bytes{} + 1, Bytes{} + 1};
  for (size_t i = 0; i < steps * product.columns; ++i) {
    const SplitColumn all = split_column(product, 0);
    const int8_t* x = all.bytes + i * kCodeBytes;
    const Ints high = add_products_of_fours(Ints{}, ones, x, x + 2 * kBytes);
    const Ints low = add_products_of_fours(Ints{}, ones, x + kBytes, x + 3 * kBytes);
    store(all.offsets + i * kLanes, (high * 256 + low) * -8);
  }
}

LLORCH_INLINE Bytes bytes_of(const char* from, size_t count) {
  if (count >= kBytes) return load<Bytes>(from);
  uint8_t rest[kBytes] = {};
  copy(rest, reinterpret_cast<const uint8_t*>(from), count);
  return load<Bytes>(rest);
}

// The scales of a step's lanes. A group takes `half` bytes: a part of a step, if there are kGroups of them in it; else a
// whole number of steps or, with kGroups = 0, anything. `byte` is where the step begins after the first of the scales.
template <int kGroups>
LLORCH_INLINE Floats lane_scales(const float* scales, size_t byte, size_t half) {
  if constexpr (kGroups > 1) return spread<kGroups>(scales + byte / kBytes * kGroups);
  if constexpr (kGroups == 1) return broadcast(scales[byte / half]);
  Floats of;
  for (size_t lane = 0; lane < kLanes; ++lane) of[lane] = scales[(byte + 4 * lane) / half < kScales ? (byte + 4 * lane) / half : 0];
  return of;
}

template <int kGroups, int kRows, int kColumns>
LLORCH_INLINE void nibble_tile(const Product& product, const Tile& at, Ahead& ahead) {
  const size_t half = product.group / 2;
  const size_t groups = product.width / product.group;
  const size_t row_bytes = product.width / 2;
  const char* weights = static_cast<const char*>(product.weights) + at.row * row_bytes;
  const uint16_t* scales = static_cast<const uint16_t*>(product.scales) + at.row * groups;
  SplitColumn columns[kColumns];
  LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) columns[c] = split_column(product, at.column + c);
  Floats totals[kRows][kColumns] = {};
  for (size_t first = 0; first < groups; first += kScales) {
    float scale[kRows][kScales];
    LLORCH_UNROLL for (int r = 0; r < kRows; ++r) read_scales(scales + r * at.distance * groups + first, groups - first, scale[r]);
    const size_t begin = first * half;
    const size_t end = begin + kScales * half < row_bytes ? begin + kScales * half : row_bytes;
    const auto add_step = [&](size_t byte, size_t count) __attribute__((always_inline)) {
      ahead.step();
      const size_t step = byte / kBytes;
      LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
        const Bytes pairs = bytes_of(weights + r * at.distance * row_bytes + byte, count);
        const Bytes codes[2] = {pairs & 15, (Bytes)((Words)pairs >> 4) & 15};
        const Floats by = lane_scales<kGroups>(scale[r], byte - begin, half);
        LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) {
          const int8_t* x = columns[c].bytes + step * product.columns * kCodeBytes;
          const Ints high = add_products_of_fours(Ints{}, codes, x, x + 2 * kBytes);
          const Ints low = add_products_of_fours(load<Ints>(columns[c].offsets + step * product.columns * kLanes), codes, x + kBytes, x + 3 * kBytes);
          totals[r][c] = multiply_add(to_floats((high << 8) + low), by, totals[r][c]);
        }
      }
    };
    size_t byte = begin;
    for (; byte + kBytes <= end; byte += kBytes) add_step(byte, kBytes);
    if (byte < end) add_step(byte, end - byte);
  }
  put_sums(product, at, totals, kOnes);
}

template <int kGroups>
struct NibbleTiles {
  static constexpr size_t kStepBytes = kBytes;
  static size_t row_bytes(const Product& product) { return product.width / 2; }
  template <int kRows, int kColumns>
  static LLORCH_INLINE void tile(const Product& product, const Tile& at, Ahead& ahead) {
    nibble_tile<kGroups, kRows, kColumns>(product, at, ahead);
  }
};

}  // namespace llorch::LLORCH_ISA
