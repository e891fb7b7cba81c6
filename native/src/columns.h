// The columns of a product with a few of them: transposed and, if the weights are codes, rounded to codes. For one
// instruction set; include simd.h's macros first.
//
// They are stored in steps of a vector of elements each, those of all columns for one step next to each other, so that what
// a step of the product reads is contiguous.
#pragma once

#include "kernels.h"
#include "nibbles.h"
#include "simd.h"

namespace llorch::LLORCH_ISA {

// Where element k of a column is stored.
template <typename Element>
LLORCH_INLINE Element* column_at(const Product& product, Element* begin, size_t k, size_t column) {
  constexpr size_t kStep = LLORCH_BYTES / sizeof(Element);
  return begin + (k / kStep * product.columns + column) * kStep + k % kStep;
}

// Elements k to k + kLanes of every column, and zeros where there are none.
template <int kColumns>
LLORCH_INLINE void take_columns(const Product& product, size_t k, Floats (&columns)[kColumns]) {
  const float* from = product.x + k * kColumns;
  const size_t count = k >= product.depth ? 0 : product.depth - k < kLanes ? product.depth - k : kLanes;
  float elements[kColumns][kLanes] = {};
  if (count == kLanes) {
    for (size_t column = 0; column < kColumns; ++column) {
      for (size_t i = 0; i < kLanes; ++i) elements[column][i] = from[i * kColumns + column];
    }
  } else {
    for (size_t i = 0; i < count; ++i) {
      for (size_t column = 0; column < kColumns; ++column) elements[column][i] = from[i * kColumns + column];
    }
  }
  for (size_t column = 0; column < kColumns; ++column) columns[column] = load<Floats>(elements[column]);
}

template <int kColumns>
void transpose(const Product& product) {
  for (size_t k = 0; k < product.width; k += kLanes) {
    Floats x[kColumns];
    take_columns(product, k, x);
    for (size_t column = 0; column < kColumns; ++column) store(column_at(product, product.vectors, k, column), x[column]);
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

// With an instruction that multiplies unsigned bytes and signed ones, 128 is added to the 8-bit codes of the weights if
// those of a column are bytes too, and `offsets` of it make up for that.
constexpr bool kUnsignedWeights = LLORCH_BYTES == 64;

LLORCH_INLINE Bytes unsigned_codes(Bytes codes) { return codes ^ 128; }

// The code of the largest magnitude. The high byte of a split code must be within -127 .. 127.
LLORCH_INLINE float largest_code(const Product& product) {
  if (product.x_bits == 8) return 127.0f;
  return product.format == Format::kInt4 ? 32639.0f : 32767.0f;
}

// The codes of some elements, given the inverse of their scale. A column that is not finite has 0 there, and no codes: its
// scale alone makes its results NaN.
LLORCH_INLINE Ints codes_of(Floats x, Floats inverse) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  constexpr int32_t kRounderBits = 0x4b400000;
  return ((Ints)(x * inverse + kRounder) - kRounderBits) & (inverse > Floats{});
}

// Rounds each column to codes with one scale. The error of an element is at most 1/65278 of the largest magnitude with 16
// bits, 1/254 with 8.
template <int kColumns>
void quantize(const Product& product) {
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr float kSmallest = 1e-30f;  // a column whose magnitudes are all below this counts as zero
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
  const bool nibbles = product.format == Format::kInt4;
  const bool bytes = kUnsignedWeights && product.x_bits == 8;
  const size_t step = nibbles ? kLanes : bytes ? kBytes : kShorts;  // whole ones are stored
  Ints totals[kColumns] = {};
  if (nibbles) clear_last_step(product);
  for (size_t k = 0; k < (product.width + step - 1) / step * step; k += kLanes) {
    Floats x[kColumns];
    take_columns(product, k, x);
    for (size_t column = 0; column < kColumns; ++column) {
      const Ints codes = codes_of(x[column], broadcast(inverse[column]));
      if (nibbles) {
        split(codes, k, product.group, split_column(product, column));
      } else if (bytes) {
        totals[column] += codes;
        store(column_at(product, reinterpret_cast<int8_t*>(product.codes), k, column), narrow<QuarterBytes>(codes));
      } else {
        store(column_at(product, product.codes, k, column), narrow<HalfShorts>(codes));
      }
    }
  }
  if (nibbles) put_offsets(product);
  for (size_t column = 0; bytes && column < kColumns; ++column) product.offsets[column] = -128 * sum(totals[column]);
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

}  // namespace llorch::LLORCH_ISA
