// The interface of the translation units, one for each instruction set: plain functions of plain arguments.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llorch {

enum class Format { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

constexpr size_t kMaxColumns = 16;     // of `multiply`; more are left to `multiply_panels`
constexpr size_t kPackedColumns = 16;  // per block
constexpr size_t kWidestPanel = 32;    // columns, of any instruction set
constexpr size_t kPadding = 128;  // columns of the weights are processed in steps that divide this
constexpr size_t kMaxExactWidth = 65536;  // columns of the weights whose products of 8-bit codes 32 bits can add up

__attribute__((always_inline)) constexpr size_t padded(size_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

// y[rows, columns] = weights[rows, width] @ x[depth, columns], all row-major. If width exceeds depth, x is padded with 0.
struct Product {
  Format format;
  const void* weights;
  const void* scales;  // float32 [rows, 1] without groups, float16 [rows, width / group] with groups
  size_t group;        // columns per scale; 0 for one scale per row
  int x_bits;          // of the codes that a column is rounded to if the weights are codes: 16, or 8 without groups
  const float* x;
  float* y;
  size_t rows;
  size_t depth;
  size_t width;
  size_t columns;
  // Float32, or int16 codes and their scales. Up to kMaxColumns columns of x are stored in turn, each padded with zeros
  // to `padded(width)`; more than that are stored in the panels of gemm.h.
  float* vectors;
  int16_t* codes;
  float* code_scales;
  int32_t* offsets;  // of each column's sums, if it has 8-bit codes
};

__attribute__((always_inline)) constexpr size_t packed_blocks(size_t columns) {
  return (columns + kPackedColumns - 1) / kPackedColumns;
}

__attribute__((always_inline)) constexpr size_t panel_columns(size_t columns) {
  return (columns + kWidestPanel - 1) / kWidestPanel * kWidestPanel;
}

// Bytes of the workspace that `vectors`, or `codes` and `code_scales`, point into.
__attribute__((always_inline)) constexpr size_t workspace_bytes(size_t width, size_t columns) {
  if (columns > kMaxColumns) return panel_columns(columns) * (width + 2) * sizeof(float);
  return columns * (padded(width) + 1) * sizeof(float);
}

// Points `vectors`, `codes` and `code_scales` into the workspace.
__attribute__((always_inline)) inline void use_workspace(void* workspace, Product& product) {
  product.code_scales = static_cast<float*>(workspace);
  if (product.columns > kMaxColumns) {
    product.vectors = product.code_scales + panel_columns(product.columns);
    product.codes = reinterpret_cast<int16_t*>(product.vectors);
    product.offsets = reinterpret_cast<int32_t*>(product.vectors + panel_columns(product.columns) * product.width);
  } else {
    product.vectors = product.code_scales;
    product.codes = reinterpret_cast<int16_t*>(product.code_scales + product.columns);
    product.offsets = reinterpret_cast<int32_t*>(product.codes + product.columns * padded(product.width));
  }
}

// Vectors as a codec stores them, one row of elements per token and head: float32, bfloat16 or float16; 8-bit codes
// times a scale; or pairs of 4-bit codes, element i in the low nibble of byte i and element i + ceil(H / 2) in its high
// nibble, times a scale plus a zero.
struct Vectors {
  const void* rows;
  const float* scales;
  const float* zeros;
};

// Exact vectors of some tokens: the token at position p is at index (p - start) % count if that is marked with p.
struct Exact {
  const float* keys;         // [B, K, count, H]
  const float* values;       // [B, K, count, H]
  const int32_t* positions;  // [B, count]
  const int32_t* starts;     // [B], or nullptr for 0
  size_t count;
};

constexpr size_t kMaxExact = 2;
constexpr size_t kMaxQueries = 64;    // queries that share a key/value head
constexpr size_t kMaxScratch = 4096;  // elements of those queries, padded
constexpr size_t kMaxTokens = 16;     // of a row; more, or more queries than these limits allow, are attended to in panels
constexpr size_t kMaxHead = 256;      // elements of a padded vector, in panels
constexpr size_t kSlotsPerBlock = 64;
constexpr size_t kSlotsPerChunk = 256;  // a task is one chunk

// Softmax attention of T queries per row, in float32, over slots that hold keys and values.
struct Attention {
  Format format;
  Vectors keys;
  Vectors values;
  const int32_t* positions;      // of the token in each slot, [.., .., S]; negative if the slot is empty
  size_t position_row_stride;    // 0 if all rows have the same positions
  size_t position_head_stride;   // 0 if all heads have
  const int32_t* tables;         // [B, table_width], the page of each block of page_size slots; nullptr if none
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
  int32_t window;       // the model's window, including the query's own token; 0 for none
  int32_t view_window;  // the cache's window; 0 for none
  int32_t sinks;        // number of first positions that are visible regardless of view_window
  float scale;
  Exact exact[kMaxExact];  // later ones take precedence
  size_t exact_count;
  float* workspace;
};

// Number of elements of a vector, padded so that each half of 4-bit codes starts at a multiple of any vector width.
__attribute__((always_inline)) constexpr size_t padded_head(size_t head_dim, Format format) {
  const size_t parts = format == Format::kInt4 ? 2 : 1;
  const size_t part = (head_dim + parts - 1) / parts;
  return parts * ((part + 15) / 16 * 16);
}

// Whether chunks of slots are attended to by all queries at once; otherwise panels of queries attend to all slots.
__attribute__((always_inline)) inline bool few_queries(const Attention& a) {
  const size_t queries = a.queries * a.group;
  return a.queries <= kMaxTokens && queries <= kMaxQueries && queries * padded_head(a.head_dim, a.format) <= kMaxScratch;
}

__attribute__((always_inline)) constexpr size_t chunks(size_t slots) {
  return (slots + kSlotsPerChunk - 1) / kSlotsPerChunk;
}

// Size of a chunk's result for each query: the largest score, the sum of weights, and the weighted sum of values.
__attribute__((always_inline)) constexpr size_t partial_size(size_t padded_head_dim) { return padded_head_dim + 2; }

// What is bound by arithmetic: products with many columns and attention of many queries. They are separate translation
// units, which are compiled at the same time as the others, and optimised less: they gain nothing from more.
struct ManyKernels {
  // Packs a block of columns; multiplies rows by all columns, in any format but float32.
  void (*pack)(const Product& product, size_t block);
  void (*multiply_panels)(const Product& product, size_t first_row, size_t last_row);
  // How many tasks attention has, and one of them. There are no chunks to combine.
  size_t (*panel_tasks)(const Attention& attention);
  void (*attend_panel)(const Attention& attention, size_t task);
};

constexpr size_t kNormColumns = 16;  // per block

// Layer norm of each column: y = (x - mean) / sqrt(variance + epsilon) * weight + bias, x and y [depth, columns].
struct Norm {
  const float* x;
  const float* weight;  // [depth]
  const float* bias;    // [depth]
  float* y;
  size_t depth;
  size_t columns;
  float epsilon;
};

// Rows of logits; for each the index of the largest and the logarithm of the sum of the exponentials.
struct Logits {
  const float* x;  // [rows, columns]
  int32_t* ids;    // [rows]
  float* totals;   // [rows]
  size_t rows;
  size_t columns;
};

struct Kernels {
  const char* name;
  void (*prepare)(const Product& product);
  void (*multiply)(const Product& product, size_t first_row, size_t last_row);
  // Runs one of batch * kv_heads * chunks(slots) tasks.
  void (*attend)(const Attention& attention, size_t task);
  // Combines the results of the chunks.
  void (*merge)(const Attention& attention);
  // Normalizes a block of columns.
  void (*normalize)(const Norm& norm, size_t block);
  void (*summarize)(const Logits& logits, size_t row);
  const ManyKernels* many;
};

extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const ManyKernels kAvx2Many;
extern const ManyKernels kAvx512Many;
extern const Kernels kPortable;
extern const ManyKernels kPortableMany;

}  // namespace llorch
