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

// Vectors of one token and head as a codec stores them, a row of elements each: float32, bfloat16 or float16; 8-bit
// codes times a scale; or pairs of 4-bit codes, element i in the low nibble of byte i and element i + ceil(H / 2) in its
// high nibble, times a scale plus a zero.
struct Vectors {
  const void* rows;
  const float* scales;
  const float* zeros;
};

// Exact vectors of some tokens: the token at position p has index (p - start) % count, if it is marked with p there.
struct Exact {
  const float* keys;         // [B, K, count, H]
  const float* values;       // [B, K, count, H]
  const int32_t* positions;  // [B, count]
  const int32_t* starts;     // [B], or nullptr for 0
  size_t count;
};

constexpr size_t kMaxExact = 2;
constexpr size_t kMaxQueries = 64;   // that share a key/value head
constexpr size_t kMaxScratch = 4096;  // elements of these queries, padded
constexpr size_t kSlotsPerBlock = 64;
constexpr size_t kSlotsPerChunk = 256;  // of a task

// Softmax attention of T queries per row, in float32, over slots that hold keys and values.
struct Attention {
  Format format;
  Vectors keys;
  Vectors values;
  const int32_t* positions;      // of the token in each slot, [.., .., S]; negative if it is empty
  size_t position_row_stride;    // 0 where all rows hold the same
  size_t position_head_stride;   // 0 where all heads do
  const int32_t* tables;         // [B, table_width], the page of each block of page_size slots; nullptr without pages
  size_t table_width;
  size_t page_size;
  size_t pages;
  const float* q;                // [B, T, K * group, H]
  const int32_t* query_positions;  // [B, T]
  float* out;                    // like q
  size_t batch;
  size_t queries;
  size_t kv_heads;
  size_t group;
  size_t slots;
  size_t head_dim;
  int32_t window;       // the model's, including the query's own token; 0 for none
  int32_t view_window;  // the cache's; 0 for none
  int32_t sinks;        // first positions that are seen regardless of view_window
  float scale;
  Exact exact[kMaxExact];  // later ones take precedence
  size_t exact_count;
  float* workspace;
};

// Elements of a vector, padded so that each half of 4-bit codes begins a vector of any instruction set.
__attribute__((always_inline)) constexpr size_t padded_head(size_t head_dim, Format format) {
  const size_t parts = format == Format::kInt4 ? 2 : 1;
  const size_t part = (head_dim + parts - 1) / parts;
  return parts * ((part + 15) / 16 * 16);
}

__attribute__((always_inline)) constexpr size_t chunks(size_t slots) {
  return (slots + kSlotsPerChunk - 1) / kSlotsPerChunk;
}

// What a chunk of slots leaves for each query: the largest score, the sum of weights, and the weighted sum of values.
__attribute__((always_inline)) constexpr size_t partial_size(size_t padded_head_dim) { return padded_head_dim + 2; }

struct Kernels {
  const char* name;
  void (*prepare)(const Product& product);
  void (*multiply)(const Product& product, size_t first_row, size_t last_row);
  // One task of batch * kv_heads * chunks(slots).
  void (*attend)(const Attention& attention, size_t task);
  // Puts the chunks together.
  void (*merge)(const Attention& attention);
};

#if defined(LLORCH_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif
extern const Kernels kPortable;

}  // namespace llorch
