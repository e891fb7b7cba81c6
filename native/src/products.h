// Products of a weight matrix and a few columns, for one instruction set. Include simd.h's macros first.
//
// A row of the weights is read from memory once, however many columns there are. Each element of the result is one
// vector of sums along the row, whose lanes are added at the end. None of this depends on the number of columns, on the
// other columns or on the thread, so that a column's result has the same bits wherever the column is.
#pragma once

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
// Rows of bytes stay in the first-level cache, and can be read again for every pair of columns.
constexpr int kCodeRows = LLORCH_BYTES == 64 ? 8 : 4;
constexpr int kCodeColumns = 2;

// ---- The columns: transposed, and quantized to 16 bits if the weights are codes -------------------------------------

template <int kColumns>
void transpose(const Product& product) {
  const size_t stride = padded(product.width);
  constexpr size_t kBlock = 16;
  size_t k = 0;
  for (; k + kBlock <= product.depth; k += kBlock) {
    const float* from = product.x + k * kColumns;
    for (size_t column = 0; column < kColumns; ++column) {
      float* to = product.vectors + column * stride + k;
      for (size_t i = 0; i < kBlock; ++i) to[i] = from[i * kColumns + column];
    }
  }
  for (size_t column = 0; column < kColumns; ++column) {
    float* to = product.vectors + column * stride;
    for (size_t i = k; i < product.depth; ++i) to[i] = product.x[i * kColumns + column];
    for (size_t i = product.depth; i < stride; ++i) to[i] = 0;
  }
}

// The largest magnitude of each column, as bits; larger than infinity's if the column contains a NaN.
template <int kColumns>
LLORCH_INLINE void find_largest(const Product& product, uint32_t (&largest)[kColumns]) {
  for (size_t column = 0; column < kColumns; ++column) largest[column] = 0;
  for (size_t k = 0; k < product.depth; ++k) {
    for (size_t column = 0; column < kColumns; ++column) {
      uint32_t bits;
      __builtin_memcpy(&bits, product.x + k * kColumns + column, sizeof(bits));
      bits &= 0x7fffffff;
      largest[column] = bits > largest[column] ? bits : largest[column];
    }
  }
}

// The code of the largest magnitude. The high byte of a split code must be within -127 .. 127.
LLORCH_INLINE float largest_code(const Product& product) {
  if (product.x_bits == 8) return 127.0f;
  return product.format == Format::kInt4 ? 32639.0f : 32767.0f;
}

// Rounds each column to codes with one scale. The error of an element is at most 1/65278 of the largest magnitude with 16
// bits, 1/254 with 8.
template <int kColumns>
void quantize(const Product& product) {
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr float kSmallest = 1e-30f;       // a column whose magnitudes are all below this counts as zero
  constexpr float kRounder = 12582912.0f;   // 1.5 * 2^23: adding it rounds to an integer in the low bits
  constexpr int32_t kRounderBits = 0x4b400000;
  const float most = largest_code(product);
  uint32_t largest[kColumns];
  float inverse[kColumns];
  find_largest<kColumns>(product, largest);
  for (size_t column = 0; column < kColumns; ++column) {
    float magnitude;
    __builtin_memcpy(&magnitude, &largest[column], sizeof(magnitude));
    const bool finite = largest[column] < kInfinity;
    const bool zero = magnitude < kSmallest;
    product.code_scales[column] = finite ? (zero ? 0.0f : magnitude / most) : __builtin_nanf("");
    inverse[column] = finite && !zero ? most / magnitude : 0.0f;
  }
  const size_t stride = padded(product.width);
  for (size_t i = 0; i < kColumns * stride; ++i) product.codes[i] = 0;
  const bool nibbles = product.format == Format::kInt4;
  if (nibbles) {
    for (size_t i = 0; i < kColumns * stride / 8; ++i) split_column(product, 0).offsets[i] = 0;
  }
  constexpr size_t kBlock = 16;
  for (size_t k = 0; k < product.depth; k += kBlock) {
    const size_t count = product.depth - k < kBlock ? product.depth - k : kBlock;
    for (size_t column = 0; column < kColumns; ++column) {
      // A column that is not finite has no codes: its scale alone makes its results NaN.
      if (inverse[column] == 0.0f) continue;
      int32_t codes[kBlock] = {};
      for (size_t i = 0; i < count; ++i) {
        const float rounded = product.x[(k + i) * kColumns + column] * inverse[column] + kRounder;
        int32_t bits;
        __builtin_memcpy(&bits, &rounded, sizeof(bits));
        codes[i] = bits - kRounderBits;
      }
      if (nibbles) {
        split(codes, k, product.group, split_column(product, column));
      } else {
        int16_t* to = product.codes + column * stride + k;
        for (size_t i = 0; i < kBlock; ++i) to[i] = static_cast<int16_t>(codes[i]);
      }
    }
  }
}

template <int kColumns>
LLORCH_INLINE void prepare_columns(const Product& product) {
  if (product.format == Format::kInt8 || product.format == Format::kInt4) {
    quantize<kColumns>(product);
  } else {
    transpose<kColumns>(product);
  }
}

template <int kColumns>
LLORCH_INLINE void prepare_some(const Product& product) {
  if (product.columns == kColumns) return prepare_columns<kColumns>(product);
  if constexpr (kColumns > 1) prepare_some<kColumns - 1>(product);
}

[[maybe_unused]] static void prepare(const Product& product) { prepare_some<kMaxColumns>(product); }

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
  const size_t stride = padded(width);
  const Stored* weights = static_cast<const Stored*>(product.weights) + at.row * width;
  const float* vectors = product.vectors + at.column * stride;
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
      const Floats x = load<Floats>(vectors + c * stride + k);
      LLORCH_UNROLL for (int r = 0; r < kRows; ++r) sums[r][c] = multiply_add(weight[r], x, sums[r][c]);
    }
  }
  LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
    LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) product.y[(at.row + r * at.distance) * product.columns + at.column + c] = sum(sums[r][c]);
  }
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
// overflow 32 bits: a step adds at most 2 * 128 * 32767 to a lane. If they have 8-bit codes, a Total is a sum of integers.
template <typename Total, int kRows, int kColumns>
LLORCH_INLINE void int8_row_tile(const Product& product, const Tile& at, Ahead& ahead) {
  constexpr size_t kBlock = 128 * kShorts;
  const size_t width = product.width;
  const size_t stride = padded(width);
  const int8_t* weights = static_cast<const int8_t*>(product.weights) + at.row * width;
  const int16_t* codes = product.codes + at.column * stride;
  const size_t distance = at.distance * width;
  const size_t whole = width / kShorts * kShorts;
  int8_t rest[kRows][kShorts] = {};
  for (int r = 0; r < kRows; ++r) copy(rest[r], weights + r * distance + whole, width - whole);
  Total totals[kRows][kColumns] = {};
  for (size_t begin = 0; begin < width; begin += kBlock) {
    const size_t end = begin + kBlock < width ? begin + kBlock : width;
    Ints sums[kRows][kColumns] = {};
    for (size_t k = begin; k < end; k += kShorts) {
      ahead.step();
      const int8_t* from = k < whole ? weights + k : rest[0];
      const size_t row_stride = k < whole ? distance : kShorts;
      Shorts weight[kRows];
      LLORCH_UNROLL for (int r = 0; r < kRows; ++r) weight[r] = widen(load<HalfBytes>(from + r * row_stride));
      LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) {
        const Shorts x = load<Shorts>(codes + c * stride + k);
        LLORCH_UNROLL for (int r = 0; r < kRows; ++r) sums[r][c] = add_products_of_pairs(sums[r][c], weight[r], x);
      }
    }
    LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
      LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) add_to(totals[r][c], sums[r][c]);
    }
  }
  const float* scales = static_cast<const float*>(product.scales) + at.row;
  LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
    LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) {
      const float scale = scales[r * at.distance] * product.code_scales[at.column + c];
      product.y[(at.row + r * at.distance) * product.columns + at.column + c] = sum(totals[r][c]) * scale;
    }
  }
}

template <typename Total>
struct Int8RowTiles {
  static constexpr size_t kStepBytes = kShorts;
  static size_t row_bytes(const Product& product) { return product.width; }
  template <int kRows, int kColumns>
  static LLORCH_INLINE void tile(const Product& product, const Tile& at, Ahead& ahead) {
    int8_row_tile<Total, kRows, kColumns>(product, at, ahead);
  }
};

// 8-bit codes with one scale per group of 32 columns, or of a multiple of 64.
template <int kRows, int kColumns>
LLORCH_INLINE void int8_group_tile(const Product& product, const Tile& at, Ahead& ahead) {
  const size_t width = product.width;
  const size_t groups = width / product.group;
  const size_t stride = padded(width);
  const int8_t* weights = static_cast<const int8_t*>(product.weights) + at.row * width;
  const int16_t* codes = product.codes + at.column * stride;
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
          const Shorts x = load<Shorts>(codes + c * stride + k);
          LLORCH_UNROLL for (int r = 0; r < kRows; ++r) sums[r][c] = add_products_of_pairs(sums[r][c], weight[r], x);
        }
      }
      LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
        const Floats by = broadcast(scale[r][g]);
        LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) totals[r][c] = multiply_add(to_floats(sums[r][c]), by, totals[r][c]);
      }
    }
  }
  LLORCH_UNROLL for (int r = 0; r < kRows; ++r) {
    LLORCH_UNROLL for (int c = 0; c < kColumns; ++c) {
      product.y[(at.row + r * at.distance) * product.columns + at.column + c] = sum(totals[r][c]) * product.code_scales[at.column + c];
    }
  }
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

template <typename Tiles, int kWideRows = kTileRows, int kWideColumns = kTileColumns>
void multiply_as(const Product& product, size_t first, size_t last) {
  if (product.columns <= kNarrow) return multiply_rows<Tiles, kNarrowRows, kNarrow>(product, first, last);
  return multiply_rows<Tiles, kWideRows, kWideColumns>(product, first, last);
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
      if (product.x_bits == 8) return multiply_as<Int8RowTiles<Ints>, kCodeRows, kCodeColumns>(product, first, last);
      if (product.group == 0) return multiply_as<Int8RowTiles<Floats>, kCodeRows, kCodeColumns>(product, first, last);
      return multiply_as<Int8GroupTiles>(product, first, last);
    case Format::kInt4: return multiply_nibbles(product, first, last);
  }
}

}  // namespace llorch::LLORCH_ISA
