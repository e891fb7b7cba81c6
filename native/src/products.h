// Products of a weight matrix and a few columns, for one instruction set. Include simd.h's macros first.
//
// A row of the weights is read from memory once, however many columns there are. Each element of the result is one
// vector of sums along the row, whose lanes are added at the end. None of this depends on the number of columns, on the
// other columns or on the thread, so that a column's result has the same bits wherever the column is.
#pragma once

#include "columns.h"
#include "kernels.h"
#include "nibbles.h"
#include "simd.h"
#include "tiles.h"

namespace llorch::LLORCH_ISA {

// Rows and columns per tile: as many sums as fit in the registers, and enough to hide the latency of additions. Up to
// kNarrow columns are processed with more rows at once, because they keep up with memory.
constexpr int kTileRows = 4;
constexpr int kTileColumns = LLORCH_BYTES == 64 ? 4 : 2;
constexpr int kNarrowRows = 8;
constexpr int kNarrow = LLORCH_BYTES == 64 ? 2 : 1;

// ---- Weights --------------------------------------------------------------------------------------------------------

struct Float32 {
  using Stored = float;
  static LLORCH_INLINE Floats get(const Stored* from) { return load<Floats>(from); }
};

struct BFloat16 {
  using Stored = uint16_t;
  static LLORCH_INLINE Floats get(const Stored* from) { return from_bfloat16(load<HalfWords>(from)); }
};

struct Float16 {
  using Stored = uint16_t;
  static LLORCH_INLINE Floats get(const Stored* from) { return from_float16(load<HalfWords>(from)); }
};

template <typename Weight, int kRows, int kColumns>
LLORCH_INLINE void float_tile(const Product& product, const Tile& at, Ahead& ahead) {
  using Stored = typename Weight::Stored;
  const size_t width = product.width;
  const Stored* weights = static_cast<const Stored*>(product.weights) + at.row * width;
  const float* vectors = product.vectors + at.column * kLanes;
  const size_t distance = at.distance * width;
  const size_t whole = width / kLanes * kLanes;
  Stored rest[kRows][kLanes] = {};
  for (int r = 0; r < kRows; ++r) copy(rest[r], weights + r * distance + whole, width - whole);
  Floats sums[kRows][kColumns] = {};
  for (size_t k = 0; k < width; k += kLanes) {
    ahead.step();
    const Stored* from = k < whole ? weights + k : rest[0];
    const size_t row_stride = k < whole ? distance : kLanes;
    Floats weight[kRows];
    LLORCH_UNROLL for (int r = 0; r < kRows; ++r) weight[r] = Weight::get(from + r * row_stride);
    LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) {
      const Floats x = load<Floats>(vectors + k * product.columns + c * kLanes);
      LLORCH_UNROLL for (int r = 0; r < kRows; ++r) sums[r][c] = multiply_add(weight[r], x, sums[r][c]);
    }
  }
  put_sums(product, at, sums, nullptr);
}

template <typename Weight>
struct FloatTiles {
  static constexpr size_t kStepBytes = kLanes * sizeof(typename Weight::Stored);
  static size_t row_bytes(const Product& product) { return product.width * sizeof(typename Weight::Stored); }
  template <int kRows, int kColumns>
  static LLORCH_INLINE void tile(const Product& product, const Tile& at, Ahead& ahead) {
    float_tile<Weight, kRows, kColumns>(product, at, ahead);
  }
};

LLORCH_INLINE void add_to(Floats& total, Ints sums) { total += to_floats(sums); }
LLORCH_INLINE void add_to(Ints& total, Ints sums) { total += sums; }

// 8-bit codes with one scale per row. If the columns have 16-bit codes, sums are converted to float32 before they can
// overflow 32 bits: a step adds at most 2 * 128 * 32767 to a lane. If they have 8-bit codes, all sums are integers.
template <typename Codes, int kRows, int kColumns>
LLORCH_INLINE void int8_row_tile(const Product& product, const Tile& at, Ahead& ahead) {
  constexpr size_t kStep = Codes::kStep;
  constexpr size_t kBlock = 128 * kStep;
  const size_t width = product.width;
  const int8_t* weights = static_cast<const int8_t*>(product.weights) + at.row * width;
  const auto* codes = reinterpret_cast<const typename Codes::Element*>(product.codes) + at.column * kStep;
  const size_t distance = at.distance * width;
  const size_t whole = width / kStep * kStep;
  int8_t rest[kRows][kStep] = {};
  for (int r = 0; r < kRows; ++r) copy(rest[r], weights + r * distance + whole, width - whole);
  typename Codes::Total totals[kRows][kColumns] = {};
  for (size_t begin = 0; begin < width; begin += kBlock) {
    const size_t end = begin + kBlock < width ? begin + kBlock : width;
    Ints sums[kRows][kColumns] = {};
    for (size_t k = begin; k < end; k += kStep) {
      ahead.step();
      const int8_t* from = k < whole ? weights + k : rest[0];
      const size_t row_stride = k < whole ? distance : kStep;
      typename Codes::Vector weight[kRows];
      LLORCH_UNROLL for (int r = 0; r < kRows; ++r) weight[r] = Codes::weights(from + r * row_stride);
      LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) {
        const auto x = load<typename Codes::Vector>(codes + k * product.columns + c * kStep);
        LLORCH_UNROLL for (int r = 0; r < kRows; ++r) sums[r][c] = Codes::add(sums[r][c], weight[r], x);
      }
    }
    LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
      LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) add_to(totals[r][c], sums[r][c]);
    }
  }
  float scales[kRows];
  LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
    scales[r] = static_cast<const float*>(product.scales)[at.row + r * at.distance];
  }
  put_sums(product, at, totals, scales, Codes::offsets(product, at.column));
}

struct Codes16 {
  using Element = int16_t;
  using Vector = Shorts;
  using Total = Floats;
  static constexpr size_t kStep = kShorts;
  static LLORCH_INLINE Shorts weights(const int8_t* from) { return widen(load<HalfBytes>(from)); }
  static LLORCH_INLINE Ints add(Ints sums, Shorts weight, Shorts x) { return add_products_of_pairs(sums, weight, x); }
  static LLORCH_INLINE const int32_t* offsets(const Product&, size_t) { return nullptr; }
};

// Without an instruction that multiplies bytes, the codes are stored in 16 bits too.
struct Codes8 : Codes16 {
  using Total = Ints;
#if LLORCH_BYTES == 64
  using Element = int8_t;
  using Vector = Words;
  static constexpr size_t kStep = kBytes;
  static LLORCH_INLINE Words weights(const int8_t* from) { return (Words)unsigned_codes(load<Bytes>(from)); }
  static LLORCH_INLINE Ints add(Ints sums, Words weight, Words x) { return add_products_of_bytes(sums, weight, x); }
  static LLORCH_INLINE const int32_t* offsets(const Product& product, size_t column) { return product.offsets + column; }
#endif
};

template <typename Codes>
struct Int8RowTiles {
  static constexpr size_t kStepBytes = Codes::kStep;
  static size_t row_bytes(const Product& product) { return product.width; }
  template <int kRows, int kColumns>
  static LLORCH_INLINE void tile(const Product& product, const Tile& at, Ahead& ahead) {
    int8_row_tile<Codes, kRows, kColumns>(product, at, ahead);
  }
};

// 8-bit codes with one scale per group of 32 columns, or of a multiple of 64.
template <int kRows, int kColumns>
LLORCH_INLINE void int8_group_tile(const Product& product, const Tile& at, Ahead& ahead) {
  const size_t width = product.width;
  const size_t groups = width / product.group;
  const int8_t* weights = static_cast<const int8_t*>(product.weights) + at.row * width;
  const int16_t* codes = product.codes + at.column * kShorts;
  const uint16_t* scales = static_cast<const uint16_t*>(product.scales) + at.row * groups;
  Floats totals[kRows][kColumns] = {};
  for (size_t first = 0; first < groups; first += kScales) {
    float scale[kRows][kScales];
    LLORCH_UNROLL for (int r = 0; r < kRows; ++r) read_scales(scales + r * at.distance * groups + first, groups - first, scale[r]);
    const size_t count = groups - first < kScales ? groups - first : kScales;
    for (size_t g = 0; g < count; ++g) {
      const size_t begin = (first + g) * product.group;
      Ints sums[kRows][kColumns] = {};
      for (size_t k = begin; k < begin + product.group; k += kShorts) {
        ahead.step();
        Shorts weight[kRows];
        LLORCH_UNROLL for (int r = 0; r < kRows; ++r) weight[r] = widen(load<HalfBytes>(weights + r * at.distance * width + k));
        LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) {
          const Shorts x = load<Shorts>(codes + k * product.columns + c * kShorts);
          LLORCH_UNROLL for (int r = 0; r < kRows; ++r) sums[r][c] = add_products_of_pairs(sums[r][c], weight[r], x);
        }
      }
      LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
        const Floats by = broadcast(scale[r][g]);
        LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) totals[r][c] = multiply_add(to_floats(sums[r][c]), by, totals[r][c]);
      }
    }
  }
  put_sums(product, at, totals, kOnes);
}

struct Int8GroupTiles {
  static constexpr size_t kStepBytes = kShorts;
  static size_t row_bytes(const Product& product) { return product.width; }
  template <int kRows, int kColumns>
  static LLORCH_INLINE void tile(const Product& product, const Tile& at, Ahead& ahead) {
    int8_group_tile<kRows, kColumns>(product, at, ahead);
  }
};

// ---- Rows -----------------------------------------------------------------------------------------------------------

// Multiplies one tile of rows with all columns.
template <typename Tiles, int kRows, int kColumns>
LLORCH_INLINE void tile_columns(const Product& product, size_t row, size_t distance, bool more) {
  const size_t row_bytes = Tiles::row_bytes(product);
  const size_t passes = (product.columns + kColumns - 1) / kColumns;
  const size_t share = passes > 1 && more ? (kRows + passes - 1) / passes : 0;
  const char* next = static_cast<const char*>(product.weights) + (row + 1) * row_bytes;
  size_t asked = 0;
  for (size_t column = 0; column < product.columns; column += kColumns) {
    const size_t rows = asked + share <= kRows ? share : kRows - asked;
    Ahead ahead(next + asked * distance * row_bytes, distance * row_bytes, share ? rows : 0, Tiles::kStepBytes);
    asked += rows;
    const Tile at{row, distance, column};
    const size_t left = product.columns - column;
    if (left >= kColumns) {
      Tiles::template tile<kRows, kColumns>(product, at, ahead);
    } else if (left == 1) {
      Tiles::template tile<kRows, 1>(product, at, ahead);
    } else if (left == 2) {
      Tiles::template tile<kRows, (kColumns > 2 ? 2 : 1)>(product, at, ahead);
    } else {
      Tiles::template tile<kRows, (kColumns > 3 ? 3 : 1)>(product, at, ahead);
    }
  }
}

// The rows of a tile are far apart, and the next tile has the row after each of them, so memory is read in several long
// streams at once. The processor prefetches within each, which is twice as fast as a single stream.
template <typename Tiles, int kRows, int kColumns>
void multiply_rows(const Product& product, size_t first, size_t last) {
  const size_t distance = (last - first) / kRows;
  for (size_t i = 0; i < distance; ++i) {
    tile_columns<Tiles, kRows, kColumns>(product, first + i, distance, i + 1 < distance);
  }
  for (size_t row = first + distance * kRows; row < last; ++row) {
    tile_columns<Tiles, 1, kColumns>(product, row, 0, false);
  }
}

template <typename Tiles>
void multiply_as(const Product& product, size_t first, size_t last) {
  if (product.columns <= kNarrow) return multiply_rows<Tiles, kNarrowRows, kNarrow>(product, first, last);
  return multiply_rows<Tiles, kTileRows, kTileColumns>(product, first, last);
}

LLORCH_INLINE void multiply_nibbles(const Product& product, size_t first, size_t last) {
  const size_t half = product.group / 2;
  if (half % kBytes == 0) return multiply_as<NibbleTiles<1>>(product, first, last);
  if constexpr (kBytes >= 32) {
    if (2 * half == kBytes) return multiply_as<NibbleTiles<2>>(product, first, last);
  }
  if constexpr (kBytes >= 64) {
    if (4 * half == kBytes) return multiply_as<NibbleTiles<4>>(product, first, last);
    return multiply_as<NibbleTiles<0>>(product, first, last);
  }
}

[[maybe_unused]] static void multiply(const Product& product, size_t first, size_t last) {
  switch (product.format) {
    case Format::kFloat32: return multiply_as<FloatTiles<Float32>>(product, first, last);
    case Format::kBFloat16: return multiply_as<FloatTiles<BFloat16>>(product, first, last);
    case Format::kFloat16: return multiply_as<FloatTiles<Float16>>(product, first, last);
    case Format::kInt8:
      if (product.x_bits == 8) return multiply_as<Int8RowTiles<Codes8>>(product, first, last);
      if (product.group == 0) return multiply_as<Int8RowTiles<Codes16>>(product, first, last);
      return multiply_as<Int8GroupTiles>(product, first, last);
    case Format::kInt4: return multiply_nibbles(product, first, last);
  }
}

}  // namespace llorch::LLORCH_ISA
