// What the translation units of the instruction sets offer, as plain functions over plain arguments.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llorch {

enum class Format { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

constexpr size_t kMaxColumns = 16;
constexpr size_t kPadding = 64;  // columns of the weights are taken in steps that divide this

__attribute__((always_inline)) constexpr size_t padded(size_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

// y[rows, columns] = weights[rows, width] @ x[depth, columns], all row-major. Where width exceeds depth, x is zero there.
struct Product {
  Format format;
  const void* weights;
  const void* scales;  // float32 [rows, 1] without groups, float16 [rows, width / group] with groups
  size_t group;        // columns per scale; 0 for one scale per row
  const float* x;
  float* y;
  size_t rows;
  size_t depth;
  size_t width;
  size_t columns;
  // Columns of x one after another, padded with zeros to `padded(width)`: float32, or int16 codes and their scales.
  float* vectors;
  int16_t* codes;
  float* code_scales;
};

// Bytes of the workspace that `vectors`, or `codes` and `code_scales`, point into.
__attribute__((always_inline)) constexpr size_t workspace_bytes(size_t width, size_t columns) {
  return columns * (padded(width) + 1) * sizeof(float);
}

struct Kernels {
  const char* name;
  void (*prepare)(const Product& product);
  void (*multiply)(const Product& product, size_t first_row, size_t last_row);
};

#if defined(LLORCH_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif
extern const Kernels kPortable;

}  // namespace llorch
