// Summaries of rows of logits compared with double precision.
#pragma once

#include <cmath>
#include <cstdio>

#include "common.h"
#include "kernels.h"

inline bool logits_agree(const llorch::Kernels& kernels) {
  const size_t rows = between(1, 3), columns = between(1, 2500);
  Array<float> x(rows * columns), totals(rows);
  Array<int32_t> ids(rows);
  std::normal_distribution<float> normal(0, 4);
  for (size_t i = 0; i < x.size; ++i) x.data[i] = std::round(normal(random_bits) * 8) / 8;  // equal ones too
  const llorch::Logits logits{x.data, ids.data, totals.data, rows, columns};
  for (size_t row = 0; row < rows; ++row) kernels.summarize(logits, row);
  for (size_t row = 0; row < rows; ++row) {
    size_t best = 0;
    double sum = 0;
    for (size_t i = 0; i < columns; ++i) {
      if (x.data[row * columns + i] > x.data[row * columns + best]) best = i;
      sum += std::exp(static_cast<double>(x.data[row * columns + i]));
    }
    if (ids.data[row] != static_cast<int32_t>(best) || !(std::fabs(totals.data[row] - std::log(sum)) <= 1e-4)) {
      std::printf("logits [%zu]: expected %zu and %.9g, got %d and %.9g\n", columns, best, std::log(sum),
                  static_cast<int>(ids.data[row]), totals.data[row]);
      return false;
    }
  }
  return true;
}
