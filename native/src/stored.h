// Elements of keys and values as codecs store them, for one instruction set. Include simd.h's macros first.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace llorch::LLORCH_ISA {

template <typename Vector>
LLORCH_INLINE Vector load_some(const void* from, size_t bytes) {
  if (bytes >= sizeof(Vector)) return load<Vector>(from);
  alignas(Vector) char whole[sizeof(Vector)] = {};
  copy(whole, static_cast<const char*>(from), bytes);
  return load<Vector>(whole);
}

// Each `get` returns vector `index` of the padded elements of a row of head_dim stored elements, before scaling.
struct StoredFloat32 {
  static constexpr bool kFloats = true;
  static constexpr bool kNibbles = false;
  static size_t row_bytes(size_t head_dim) { return 4 * head_dim; }
  static LLORCH_INLINE Floats get(const char* row, size_t index, size_t head_dim) {
    const size_t first = index * kLanes;
    return first < head_dim ? load_some<Floats>(row + 4 * first, 4 * (head_dim - first)) : Floats{};
  }
};

template <Floats (*kConvert)(HalfWords)>
struct StoredHalf {
  static constexpr bool kFloats = true;
  static constexpr bool kNibbles = false;
  static size_t row_bytes(size_t head_dim) { return 2 * head_dim; }
  static LLORCH_INLINE Floats get(const char* row, size_t index, size_t head_dim) {
    const size_t first = index * kLanes;
    return first < head_dim ? kConvert(load_some<HalfWords>(row + 2 * first, 2 * (head_dim - first))) : Floats{};
  }
};

struct StoredInt8 {
  static constexpr bool kFloats = false;
  static constexpr bool kNibbles = false;
  static size_t row_bytes(size_t head_dim) { return head_dim; }
  static LLORCH_INLINE Floats get(const char* row, size_t index, size_t head_dim) {
    const size_t first = index * kLanes;
    return first < head_dim ? to_floats(load_some<QuarterBytes>(row + first, head_dim - first)) : Floats{};
  }
};

struct StoredInt4 {
  static constexpr bool kFloats = false;
  static constexpr bool kNibbles = true;
  static size_t row_bytes(size_t head_dim) { return (head_dim + 1) / 2; }
  static LLORCH_INLINE Floats get(const char* row, size_t index, size_t head_dim) {
    const size_t half = padded_head(head_dim, Format::kInt4) / 2 / kLanes;
    const size_t first = index % half * kLanes;
    const size_t bytes = row_bytes(head_dim);
    if (first >= bytes) return Floats{};
    const auto pairs = load_some<QuarterUnsignedBytes>(row + first, bytes - first);
    return to_floats(index < half ? pairs & 15 : pairs >> 4);
  }
};

// An element's place in the padded order; the inverse of what `get` does.
template <typename Stored>
LLORCH_INLINE size_t place_of(size_t element, size_t head_dim) {
  if constexpr (!Stored::kNibbles) return element;
  const size_t half = (head_dim + 1) / 2;
  return element < half ? element : padded_head(head_dim, Format::kInt4) / 2 + element - half;
}

// Vector `index` of the padded elements of an exact row.
template <typename Stored>
LLORCH_INLINE Floats get_exact(const float* row, size_t index, size_t head_dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  if constexpr (!Stored::kNibbles) return StoredFloat32::get(bytes, index, head_dim);
  const size_t half = (head_dim + 1) / 2;
  const size_t vectors = padded_head(head_dim, Format::kInt4) / 2 / kLanes;
  if (index < vectors) return StoredFloat32::get(bytes, index, half);
  return StoredFloat32::get(bytes + 4 * half, index - vectors, head_dim - half);
}

}  // namespace llorch::LLORCH_ISA
