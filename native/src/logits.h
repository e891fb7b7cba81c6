// The largest element of a row and the logarithm of the row's sum of exponentials, for one instruction set. Include
// simd.h's macros first. A row's results have the same bits whatever the other rows are.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace llorch::LLORCH_ISA {

// Index and value of the largest of some elements; of equal ones the first. NaNs are passed over.
struct Largest {
  int32_t index = 0;
  float value = -__builtin_inff();

  LLORCH_INLINE void offer(int32_t at, float x) {
    if (x > value || (x == value && at < index)) *this = {at, x};
  }
};

LLORCH_INLINE Largest largest_of(const float* row, size_t count) {
  Floats most = broadcast(-__builtin_inff());
  Ints lanes{}, at{};
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats x = load<Floats>(row + i);
    const Ints above = x > most;
    most = above ? x : most;
    at = above ? lanes + static_cast<int32_t>(i) : at;
  }
  float values[kLanes];
  int32_t places[kLanes];
  store(values, most);
  store(places, at);
  Largest found;
  for (int lane = 0; lane < kLanes; ++lane) found.offer(places[lane], values[lane]);
  for (; i < count; ++i) found.offer(static_cast<int32_t>(i), row[i]);
  return found;
}

// Sums are taken in blocks, whose totals are added up, so that rounding errors stay small in long rows.
LLORCH_INLINE float sum_of_exponentials(const float* row, size_t count, float shift) {
  constexpr size_t kBlock = 64 * kLanes;
  const Floats nothing = broadcast(-__builtin_inff());
  Floats total{};
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t end = begin + kBlock < count ? begin + kBlock : count;
    Floats sums{};
    for (size_t i = begin; i < end; i += kLanes) {
      Floats x = nothing;
      if (i + kLanes <= end) {
        x = load<Floats>(row + i);
      } else {
        float rest[kLanes];
        store(rest, nothing);
        copy(rest, row + i, end - i);
        x = load<Floats>(rest);
      }
      x -= shift;
      sums += exponential(x > Floats{} ? Floats{} : x);  // above 0 only where an element is infinite
    }
    total += sums;
  }
  return sum(total);
}

static void summarize(const Logits& logits, size_t row) {
  const float* x = logits.x + row * logits.columns;
  const Largest found = largest_of(x, logits.columns);
  const bool finite = __builtin_isfinite(found.value);
  const float sum = sum_of_exponentials(x, logits.columns, finite ? found.value : 0.0f);
  logits.ids[row] = found.index;
  // Adding 0 times the sum makes a NaN anywhere in the row one of the result.
  logits.totals[row] = finite ? found.value + __builtin_logf(sum) : found.value + 0.0f * sum;
}

}  // namespace llorch::LLORCH_ISA
