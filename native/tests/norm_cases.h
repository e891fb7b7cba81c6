// Layer norms compared with double precision.
#pragma once

#include <cmath>
#include <cstdio>

#include "common.h"
#include "kernels.h"

inline bool norm_agrees(const llorch::Kernels& kernels) {
  const size_t depth = between(1, 70);
  const size_t columns = between(1, 50);
  Array<float> x(depth * columns), y(depth * columns), weight(depth), bias(depth);
  std::normal_distribution<float> normal;
  for (Array<float>* array : {&x, &weight, &bias}) {
    for (size_t i = 0; i < array->size; ++i) array->data[i] = normal(random_bits);
  }
  const llorch::Norm norm{x.data, weight.data, bias.data, y.data, depth, columns, 1e-5f};
  for (size_t block = 0; block * llorch::kNormColumns < columns; ++block) kernels.normalize(norm, block);
  for (size_t column = 0; column < columns; ++column) {
    double mean = 0, variance = 0;
    for (size_t k = 0; k < depth; ++k) mean += x.data[k * columns + column] / static_cast<double>(depth);
    for (size_t k = 0; k < depth; ++k) variance += std::pow(x.data[k * columns + column] - mean, 2) / static_cast<double>(depth);
    for (size_t k = 0; k < depth; ++k) {
      const size_t at = k * columns + column;
      const double expected = (x.data[at] - mean) / std::sqrt(variance + 1e-5) * weight.data[k] + bias.data[k];
      if (!(std::fabs(y.data[at] - expected) <= 1e-4)) {
        std::printf("norm of [%zu, %zu] at %zu: expected %.9g, got %.9g\n", depth, columns, at, expected, y.data[at]);
        return false;
      }
    }
  }
  return true;
}
