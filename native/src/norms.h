// Layer norm of columns, for one instruction set. Include simd.h's macros first.
//
// Every sum along a column consists of kPartials sums of every kPartials-th element, which are added at the end in one
// fixed order. So a column's result has the same bits whatever the number of columns and its place among them.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace llorch::LLORCH_ISA {

constexpr size_t kPartials = 16;
constexpr size_t kNormVectors = kNormColumns / kLanes;

// Adds the partial sums [kPartials, columns]; the totals are in the first row afterwards.
LLORCH_INLINE void fold(float* partials, size_t columns) {
  for (size_t left = kPartials / 2; left > 0; left /= 2) {
    for (size_t i = 0; i < left * columns; ++i) partials[i] += partials[i + left * columns];
  }
}

LLORCH_INLINE float inverse_deviation(float squares, const Norm& norm) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(norm.depth) + norm.epsilon);
}

LLORCH_INLINE Floats normalized(Floats x, Floats mean, Floats by, Floats weight, Floats bias) {
  return multiply_add((x - mean) * by, weight, bias);
}

// ---- Up to kNormColumns columns: x is read as one long vector, in turns of kPartials rows --------------------------------

constexpr size_t kTurn = kPartials * kNormColumns;

// Calls body(i, place, count) for `count` elements from i on, kLanes or the last few, whose first is `place` of its turn.
template <typename Body>
LLORCH_INLINE void for_elements(size_t total, size_t turn, Body body) {
  for (size_t begin = 0; begin < total; begin += turn) {
    const size_t end = begin + turn < total ? begin + turn : total;
    for (size_t i = begin; i < end; i += kLanes) body(i, i - begin, end - i < kLanes ? end - i : kLanes);
  }
}

// Repeats the first row of an array [kPartials, columns] in the others, with some room after the last.
LLORCH_INLINE void repeat(float* row, size_t columns) {
  for (size_t i = columns; i < kPartials * columns; ++i) row[i] = row[i - columns];
}

static void normalize_few(const Norm& norm) {
  const size_t columns = norm.columns;
  const size_t turn = kPartials * columns;
  const size_t total = norm.depth * columns;
  alignas(64) float means[kTurn] = {};
  for_elements(total, turn, [&](size_t i, size_t place, size_t count) __attribute__((always_inline)) {
    store_some(means + place, load_some(means + place, count) + load_some(norm.x + i, count), count);
  });
  fold(means, columns);
  for (size_t c = 0; c < columns; ++c) means[c] /= static_cast<float>(norm.depth);
  repeat(means, columns);

  alignas(64) float by[kTurn] = {};
  for_elements(total, turn, [&](size_t i, size_t place, size_t count) __attribute__((always_inline)) {
    const Floats centred = load_some(norm.x + i, count) - load_some(means + place, count);
    store_some(by + place, multiply_add(centred, centred, load_some(by + place, count)), count);
  });
  fold(by, columns);
  for (size_t c = 0; c < columns; ++c) by[c] = inverse_deviation(by[c], norm);
  repeat(by, columns);

  // Weights and biases of a turn, each repeated for all columns.
  alignas(64) float weights[kTurn + kLanes];
  alignas(64) float biases[kTurn + kLanes];
  for (size_t row = 0; row < norm.depth; row += kPartials) {
    const size_t rows = norm.depth - row < kPartials ? norm.depth - row : kPartials;
    for (size_t p = 0; p < rows; ++p) {
      for (size_t c = 0; c < columns; c += kLanes) {  // what is too long is overwritten by the next row
        store(weights + p * columns + c, broadcast(norm.weight[row + p]));
        store(biases + p * columns + c, broadcast(norm.bias[row + p]));
      }
    }
    const size_t begin = row * columns;
    for (size_t i = 0; i < rows * columns; i += kLanes) {
      const size_t count = rows * columns - i < kLanes ? rows * columns - i : kLanes;
      const Floats x = load_some(norm.x + begin + i, count);
      store_some(norm.y + begin + i,
                 normalized(x, load_some(means + i, count), load_some(by + i, count), load<Floats>(weights + i),
                            load<Floats>(biases + i)),
                 count);
    }
  }
}

// ---- More columns: blocks of kNormColumns, whose rows are far apart -----------------------------------------------------

// Calls body(k, v, at, count) for each vector v of each row k of a block of columns: `count` elements from `at` on.
template <typename Body>
LLORCH_INLINE void for_vectors(const Norm& norm, size_t first, size_t columns, Body body) {
  for (size_t k = 0; k < norm.depth; ++k) {
    LLORCH_UNROLL for (size_t v = 0; v < kNormVectors; ++v) {
      const size_t done = v * kLanes;
      if (done < columns) body(k, v, k * norm.columns + first + done, columns - done);
    }
  }
}

static void normalize_block(const Norm& norm, size_t first) {
  const size_t columns = norm.columns - first < kNormColumns ? norm.columns - first : kNormColumns;
  alignas(64) float partials[kTurn] = {};
  for_vectors(norm, first, columns, [&](size_t k, size_t v, size_t at, size_t count) __attribute__((always_inline)) {
    float* to = partials + k % kPartials * kNormColumns + v * kLanes;
    store(to, load<Floats>(to) + load_some(norm.x + at, count));
  });
  fold(partials, kNormColumns);
  alignas(64) float means[kNormColumns];
  for (size_t c = 0; c < kNormColumns; ++c) means[c] = partials[c] / static_cast<float>(norm.depth);

  for (size_t i = 0; i < kTurn; ++i) partials[i] = 0;
  for_vectors(norm, first, columns, [&](size_t k, size_t v, size_t at, size_t count) __attribute__((always_inline)) {
    float* to = partials + k % kPartials * kNormColumns + v * kLanes;
    const Floats centred = load_some(norm.x + at, count) - load<Floats>(means + v * kLanes);
    store(to, multiply_add(centred, centred, load<Floats>(to)));
  });
  fold(partials, kNormColumns);
  alignas(64) float by[kNormColumns];
  for (size_t c = 0; c < kNormColumns; ++c) by[c] = inverse_deviation(partials[c], norm);

  for_vectors(norm, first, columns, [&](size_t k, size_t v, size_t at, size_t count) __attribute__((always_inline)) {
    const Floats x = load_some(norm.x + at, count);
    store_some(norm.y + at,
               normalized(x, load<Floats>(means + v * kLanes), load<Floats>(by + v * kLanes), broadcast(norm.weight[k]),
                          broadcast(norm.bias[k])),
               count);
  });
}

[[maybe_unused]] static void normalize(const Norm& norm, size_t block) {
  if (norm.columns <= kNormColumns) return normalize_few(norm);
  normalize_block(norm, block * kNormColumns);
}

}  // namespace llorch::LLORCH_ISA
