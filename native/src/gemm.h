// Products of a weight matrix and many columns, for one instruction set. Include products.h first.
//
// The structure is that of BLIS (Van Zee and van de Geijn 2015): columns are packed into panels of two vectors, rows are
// converted in tiles of kGemmRows by kGemmSteps, and a kernel adds up the products of a tile and a panel in registers.
// Converting a tile once for all panels makes float16 and codes cost no more than float32. Every element is added up in
// blocks of kGemmSteps at fixed places along the row, so that its bits depend neither on the number of columns nor on
// the thread.
#pragma once

#include "products.h"

namespace llorch::LLORCH_ISA {

constexpr int kGemmRows = LLORCH_BYTES == 64 ? 12 : 6;
constexpr int kGemmVectors = 2;
constexpr size_t kPanel = kGemmVectors * kLanes;  // columns
constexpr size_t kGemmSteps = 256;
constexpr size_t kStepsPerLine = 16;
constexpr size_t kTileStride = kGemmSteps + kStepsPerLine;  // rows of a tile do not share sets of the cache

// ---- Arithmetic: what one step along the row, 4 bytes of a row of a tile, stands for ------------------------------------

struct FloatSteps {
  using Sum = Floats;
  static constexpr size_t kElements = 1;
  static constexpr size_t kSteps = kGemmSteps;
  static LLORCH_INLINE Sum add(Sum sum, Words weight, Words x) { return multiply_add((Floats)weight, (Floats)x, sum); }
};

// Two 16-bit codes. The sum of 256 products of at most 128 * 32767 fits in 32 bits.
struct PairSteps {
  using Sum = Ints;
  static constexpr size_t kElements = 2;
  static constexpr size_t kSteps = kGemmSteps / 2;
  static LLORCH_INLINE Sum add(Sum sum, Words weight, Words x) {
    return add_products_of_pairs(sum, (Shorts)weight, (Shorts)x);
  }
};

#if LLORCH_BYTES == 64
// Four 8-bit codes.
struct FourSteps {
  using Sum = Ints;
  static constexpr size_t kElements = 4;
  static constexpr size_t kSteps = kGemmSteps;
  static LLORCH_INLINE Sum add(Sum sum, Words weight, Words x) { return add_products_of_bytes(sum, weight, x); }
};
using ExactSteps = FourSteps;
#else
using ExactSteps = PairSteps;
#endif

template <typename Steps>
LLORCH_INLINE size_t steps_of(size_t depth) {
  return (depth + Steps::kElements - 1) / Steps::kElements;
}

// ---- Columns ----------------------------------------------------------------------------------------------------------

// Elements k of `count` columns from `column` on; zeros after them.
LLORCH_INLINE Floats columns_at(const Product& product, size_t k, size_t column, size_t count) {
  return load_some(product.x + k * product.columns + column, count);
}

LLORCH_INLINE size_t columns_left(const Product& product, size_t column) {
  return column < product.columns ? product.columns - column : 0;
}

// Where a panel begins in units of 4 bytes, and the vector of column `column` of it.
LLORCH_INLINE size_t place_of_column(size_t column, size_t steps) {
  return column / kPanel * kPanel * steps + column % kPanel;
}

static void pack_floats(const Product& product, size_t column) {
  float* to = product.vectors + place_of_column(column, product.depth);
  const size_t left = columns_left(product, column);
  for (size_t k = 0; k < product.depth; ++k) store(to + k * kPanel, columns_at(product, k, column, left));
}

LLORCH_INLINE Floats choose(Ints mask, Floats yes, Floats no) {
  return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

// The codes of `quantize` in columns.h, with those of one step next to each other.
template <typename Steps>
void pack_codes(const Product& product, size_t column) {
  constexpr int32_t kInfinity = 0x7f800000;
  const size_t left = columns_left(product, column);
  Ints largest{};
  for (size_t k = 0; k < product.depth; ++k) {
    const Ints bits = (Ints)columns_at(product, k, column, left) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const Ints finite = largest < kInfinity;
  const Ints zero = (Floats)largest < broadcast(1e-30f);
  const float most = largest_code(product);
  const Floats scale = choose(zero, Floats{}, (Floats)largest / most);
  store(product.code_scales + column, choose(finite, scale, broadcast(__builtin_nanf(""))));
  const Floats inverse = choose(finite & ~zero, most / (Floats)largest, Floats{});
  constexpr size_t kElements = Steps::kElements;
  constexpr int kBits = 32 / kElements;
  const size_t steps = steps_of<Steps>(product.depth);
  float* to = product.vectors + place_of_column(column, steps);
  Ints total{};
  for (size_t step = 0; step < steps; ++step) {
    Ints word{};
    for (size_t i = 0; i < kElements && kElements * step + i < product.depth; ++i) {
      const Floats x = columns_at(product, kElements * step + i, column, left);
      const Ints code = codes_of(x, inverse);
      total += code;
      word |= (code & ((1 << kBits) - 1)) << (i * kBits);
    }
    store(to + step * kPanel, word);
  }
  if (product.x_bits == 8) store(product.offsets + column, total * (kUnsignedWeights ? -128 : 0));
}

// Packs kPackedColumns columns, or as many as there are, with zeros up to whole panels.
static void pack(const Product& product, size_t block) {
  const size_t first = block * kPackedColumns;
  for (size_t column = first; column < first + kPackedColumns; column += kLanes) {
    if (product.format == Format::kInt8 && product.x_bits == 8) {
      pack_codes<ExactSteps>(product, column);
    } else if (product.format == Format::kInt8 && product.group == 0) {
      pack_codes<PairSteps>(product, column);
    } else {
      pack_floats(product, column);
    }
  }
}

// ---- Rows: `count` elements from k on, converted -------------------------------------------------------------------------

template <typename Weight>
struct FloatRows {
  using Steps = FloatSteps;
  static constexpr bool kExact = false;
  static constexpr size_t kBytesTimes2 = 2 * sizeof(typename Weight::Stored);
  static LLORCH_INLINE void convert(const Product& product, size_t row, size_t k, size_t count, float* to) {
    using Stored = typename Weight::Stored;
    const Stored* from = static_cast<const Stored*>(product.weights) + row * product.width + k;
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, Weight::get(from + i));
    if (i == count) return;
    Stored rest[kLanes] = {};
    copy(rest, from + i, count - i);
    store(to + i, Weight::get(rest));
  }
};

struct Int8Rows {
  using Steps = PairSteps;
  static constexpr bool kExact = false;
  static constexpr size_t kBytesTimes2 = 2;
  static LLORCH_INLINE void convert(const Product& product, size_t row, size_t k, size_t count, float* to) {
    const int8_t* from = static_cast<const int8_t*>(product.weights) + row * product.width + k;
    int16_t* codes = reinterpret_cast<int16_t*>(to);
    size_t i = 0;
    for (; i + kShorts <= count; i += kShorts) store(codes + i, widen(load<HalfBytes>(from + i)));
    if (i == count) return;
    int8_t rest[kShorts] = {};
    copy(rest, from + i, count - i);
    store(codes + i, widen(load<HalfBytes>(rest)));
  }
};

// For columns of 8-bit codes.
struct ExactRows : Int8Rows {
  using Steps = ExactSteps;
  static constexpr bool kExact = true;
#if LLORCH_BYTES == 64
  static LLORCH_INLINE void convert(const Product& product, size_t row, size_t k, size_t count, float* to) {
    const uint8_t* from = static_cast<const uint8_t*>(product.weights) + row * product.width + k;
    uint8_t* codes = reinterpret_cast<uint8_t*>(to);
    size_t i = 0;
    for (; i + kBytes <= count; i += kBytes) store(codes + i, unsigned_codes(load<Bytes>(from + i)));
    if (i == count) return;
    uint8_t rest[kBytes] = {};
    copy(rest, from + i, count - i);
    store(codes + i, unsigned_codes(load<Bytes>(rest)));
  }
#endif
};

// Groups are multiples of 32 columns: a vector of elements never leaves its half of a group.
template <bool kNibbles>
struct GroupRows {
  using Steps = FloatSteps;
  static constexpr bool kExact = false;
  static constexpr size_t kBytesTimes2 = kNibbles ? 1 : 2;
  static LLORCH_INLINE void convert(const Product& product, size_t row, size_t k, size_t count, float* to) {
    const size_t group = product.group;
    const uint16_t* scales = static_cast<const uint16_t*>(product.scales) + row * (product.width / group);
    const uint8_t* codes = static_cast<const uint8_t*>(product.weights) + row * (product.width * kBytesTimes2 / 2);
    for (size_t i = 0; i < count;) {
      const size_t index = (k + i) / group;
      const size_t end = (index + 1) * group - k < count ? (index + 1) * group - k : count;
      uint16_t bits[kLanes] = {};
      bits[0] = scales[index];
      const Floats scale = broadcast(from_float16(load<HalfWords>(bits))[0]);
      for (; i < end; i += kLanes) {
        const size_t within = k + i - index * group;
        if constexpr (kNibbles) {
          const size_t half = group / 2;
          const size_t high = within >= half;
          const uint8_t* from = codes + index * half + within - high * half;
          const auto pairs = load<QuarterUnsignedBytes>(from);
          const auto nibbles = high ? pairs >> 4 : pairs & 15;
          store(to + i, (to_floats((QuarterUnsignedBytes)nibbles) - 8.0f) * scale);
        } else {
          store(to + i, to_floats(load<QuarterBytes>(codes + k + i)) * scale);
        }
      }
    }
  }
};

// ---- Products -----------------------------------------------------------------------------------------------------------

// The sums of a tile and of kVectors vectors of a panel. `ahead` asks for the next tile's weights meanwhile.
template <typename Steps, int kVectors, bool kAsk>
LLORCH_INLINE void add_up(const float* tile, const float* panel, size_t steps, Ahead& ahead,
                          typename Steps::Sum (&sums)[kGemmRows][kGemmVectors]) {
  const auto step = [&](size_t i) __attribute__((always_inline)) {
    Words x[kVectors];
    LLORCH_UNROLL for (int v = 0; v < kVectors; ++v) x[v] = load<Words>(panel + i * kPanel + v * kLanes);
    LLORCH_UNROLL for (int r = 0; r < kGemmRows; ++r) {
      const Words weight = broadcast_word(tile + r * kTileStride + i);
      LLORCH_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = Steps::add(sums[r][v], weight, x[v]);
    }
  };
  size_t i = 0;
  for (; i + kStepsPerLine <= steps; i += kStepsPerLine) {
    if constexpr (kAsk) ahead.step();
    for (size_t j = 0; j < kStepsPerLine; ++j) step(i + j);
  }
  for (; i < steps; ++i) step(i);
}

LLORCH_INLINE Floats scaled(const Product&, size_t, size_t, Floats sum) { return sum; }

LLORCH_INLINE Floats scaled(const Product& product, size_t row, size_t column, Ints sum) {
  const float scale = static_cast<const float*>(product.scales)[row];
  return to_floats(sum) * (load<Floats>(product.code_scales + column) * scale);
}

// Adds the sum over some steps to what earlier ones have left in y. Sums of integers stay integers up to the last step.
template <bool kExact, typename Sum>
LLORCH_INLINE void put(const Product& product, size_t row, size_t column, size_t step, bool last, Sum sum) {
  const size_t count = columns_left(product, column);
  float* to = product.y + row * product.columns + column;
  if constexpr (kExact) {
    sum += step > 0 ? (Ints)load_some(to, count) : load<Ints>(product.offsets + column);
    store_some(to, last ? scaled(product, row, column, sum) : (Floats)sum, count);
  } else {
    Floats y = scaled(product, row, column, sum);
    if (step > 0) y += load_some(to, count);
    store_some(to, y, count);
  }
}

template <typename Rows, int kVectors, bool kAsk>
LLORCH_INLINE void multiply_panel(const Product& product, const float* tile, size_t first_row, size_t rows, size_t step,
                                  size_t steps, size_t column, Ahead& ahead) {
  using Steps = typename Rows::Steps;
  typename Steps::Sum sums[kGemmRows][kGemmVectors] = {};
  const size_t panel_steps = steps_of<Steps>(product.depth);
  const bool last = step + steps == panel_steps;
  add_up<Steps, kVectors, kAsk>(tile, product.vectors + column * panel_steps + step * kPanel, steps, ahead, sums);
  LLORCH_UNROLL for (int r = 0; r < kGemmRows; ++r) {
    if (static_cast<size_t>(r) >= rows) break;
    LLORCH_UNROLL for (int v = 0; v < kVectors; ++v) {
      put<Rows::kExact>(product, first_row + r, column + v * kLanes, step, last, sums[r][v]);
    }
  }
}

template <typename Rows>
void multiply_panels_as(const Product& product, size_t first, size_t last) {
  using Steps = typename Rows::Steps;
  alignas(64) float tile[kGemmRows * kTileStride] = {};
  const size_t row_bytes = product.width * Rows::kBytesTimes2 / 2;
  for (size_t k = 0; k < product.depth; k += Steps::kSteps * Steps::kElements) {
    const size_t left = product.depth - k;
    const size_t depth = left < Steps::kSteps * Steps::kElements ? left : Steps::kSteps * Steps::kElements;
    const size_t step = k / Steps::kElements;
    const size_t steps = steps_of<Steps>(depth);
    for (size_t row = first; row < last; row += kGemmRows) {
      const size_t rows = last - row < kGemmRows ? last - row : kGemmRows;
      for (size_t r = 0; r < rows; ++r) Rows::convert(product, row + r, k, depth, tile + r * kTileStride);
      // A last tile with fewer rows computes those of the tile before it again, and discards them.
      const bool same_columns = row + kGemmRows < last;
      const size_t next_row = same_columns ? row + kGemmRows : first;
      const size_t next_k = same_columns ? k : k + Steps::kSteps * Steps::kElements;
      const bool more = next_row + kGemmRows <= last && next_k < product.depth;
      const char* next = static_cast<const char*>(product.weights) + next_row * row_bytes;
      Ahead ahead(next + next_k * Rows::kBytesTimes2 / 2, row_bytes, more ? kGemmRows : 0,
                  kStepsPerLine * Steps::kElements * Rows::kBytesTimes2 / 2);
      for (size_t column = 0; column < product.columns; column += kPanel) {
        if (product.columns - column <= kLanes) {
          multiply_panel<Rows, 1, false>(product, tile, row, rows, step, steps, column, ahead);
        } else if (column == 0) {
          multiply_panel<Rows, 2, true>(product, tile, row, rows, step, steps, column, ahead);
        } else {
          multiply_panel<Rows, 2, false>(product, tile, row, rows, step, steps, column, ahead);
        }
      }
    }
  }
}

// XLA's own product of float32 is as fast.
static void multiply_panels(const Product& product, size_t first, size_t last) {
  switch (product.format) {
    case Format::kFloat32: return;
    case Format::kBFloat16: return multiply_panels_as<FloatRows<BFloat16>>(product, first, last);
    case Format::kFloat16: return multiply_panels_as<FloatRows<Float16>>(product, first, last);
    case Format::kInt8:
      if (product.x_bits == 8) return multiply_panels_as<ExactRows>(product, first, last);
      if (product.group == 0) return multiply_panels_as<Int8Rows>(product, first, last);
      return multiply_panels_as<GroupRows<false>>(product, first, last);
    case Format::kInt4: return multiply_panels_as<GroupRows<true>>(product, first, last);
  }
}

}  // namespace llorch::LLORCH_ISA
