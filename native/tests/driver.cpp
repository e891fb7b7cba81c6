// Runs the kernels on buffers of exactly the size that they may access, at odd addresses, and compares the results with
// sums in double precision. tests/kernels/test_library.py builds it with AddressSanitizer and UndefinedBehaviorSanitizer.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention_cases.h"
#include "common.h"
#include "dispatch.h"
#include "logits_cases.h"
#include "norm_cases.h"
#include "parallel.h"

namespace {

using llorch::Format;
using llorch::Kernels;
using llorch::Product;

struct Case {
  Format format;
  size_t rows, depth, width, group, columns;
  int x_bits;
  std::vector<uint8_t> weights;
  std::vector<float> row_scales, x;
  std::vector<uint16_t> group_scales;
  std::vector<double> values;  // the values of the weights
};

size_t bytes_per_row(const Case& c) {
  switch (c.format) {
    case Format::kFloat32: return 4 * c.width;
    case Format::kInt8: return c.width;
    case Format::kInt4: return c.width / 2;
    default: return 2 * c.width;
  }
}

double scale_of(const Case& c, size_t row, size_t k) {
  if (c.group == 0) return c.row_scales[row];
  return half_value(c.group_scales[row * (c.width / c.group) + k / c.group]);
}

double value_of(const Case& c, size_t row, size_t k) {
  const uint8_t* at = c.weights.data() + row * bytes_per_row(c);
  if (c.format == Format::kFloat32) {
    float value;
    std::memcpy(&value, at + 4 * k, 4);
    return value;
  }
  if (c.format == Format::kInt8) return scale_of(c, row, k) * static_cast<int8_t>(at[k]);
  if (c.format == Format::kInt4) {
    const size_t half = c.group / 2;
    const size_t within = k % c.group;
    const uint8_t pair = at[k / c.group * half + within % half];
    return scale_of(c, row, k) * ((within < half ? pair & 15 : pair >> 4) - 8);
  }
  uint16_t bits;
  std::memcpy(&bits, at + 2 * k, 2);
  if (c.format == Format::kFloat16) return half_value(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

Case make_case() {
  static const size_t groups[] = {0, 32, 64, 128, 192};
  Case c;
  c.format = static_cast<Format>(between(0, 4));
  c.group = c.format == Format::kInt8 ? groups[between(0, 4)] : c.format == Format::kInt4 ? groups[between(1, 4)] : 0;
  c.x_bits = c.format == Format::kInt8 && c.group == 0 && between(0, 1) ? 8 : 16;
  c.rows = between(1, 40);
  c.columns = between(0, 2) > 0 || c.format == Format::kFloat32 ? between(1, 16) : between(17, 70);
  c.width = c.group ? c.group * between(1, 19) : between(1, 700);
  const bool codes = c.format == Format::kInt8 || c.format == Format::kInt4;
  c.depth = codes && c.width > 1 ? c.width - between(0, c.group ? static_cast<int>(c.group) - 1 : 0) : c.width;
  c.weights.resize(c.rows * bytes_per_row(c));
  for (size_t i = 0; i < c.weights.size(); ++i) c.weights[i] = between(0, 255);
  std::normal_distribution<float> normal;
  if (c.format == Format::kFloat32) {
    for (size_t i = 0; i < c.rows * c.width; ++i) {
      const float value = normal(random_bits);
      std::memcpy(c.weights.data() + 4 * i, &value, 4);
    }
  } else if (!codes) {
    // Keep exponents small: any mantissa, any sign.
    for (size_t i = 1; i < c.weights.size(); i += 2) c.weights[i] = (c.weights[i] & 0x83) | 0x38;
  }
  for (size_t i = 0; i < c.rows; ++i) c.row_scales.push_back(normal(random_bits));
  for (size_t i = 0; c.group && i < c.rows * (c.width / c.group); ++i) c.group_scales.push_back(between(0, 0x4000));
  for (size_t i = 0; i < c.depth * c.columns; ++i) c.x.push_back(normal(random_bits));
  for (size_t row = 0; row < c.rows; ++row) {
    for (size_t k = 0; k < c.width; ++k) c.values.push_back(value_of(c, row, k));
  }
  return c;
}

bool agrees(const Case& c, const float* y) {
  const bool codes = c.format == Format::kInt8 || c.format == Format::kInt4;
  for (size_t row = 0; row < c.rows; ++row) {
    for (size_t column = 0; column < c.columns; ++column) {
      double sum = 0, squares = 0, largest = 0;
      for (size_t k = 0; k < c.depth; ++k) {
        const double weight = c.values[row * c.width + k];
        const double x = c.x[k * c.columns + column];
        sum += weight * x;
        squares += weight * weight;
        largest = std::fmax(largest, std::fabs(x));
      }
      const double rounding = c.x_bits == 8 ? largest / 254 : codes ? largest / 65278 : 0;
      const double allowed = std::sqrt(squares) * (std::sqrt(c.depth) * rounding + 1e-5 * largest) + 1e-6;
      const double got = y[row * c.columns + column];
      if (!(std::fabs(got - sum) <= allowed)) {
        std::printf("row %zu, column %zu: expected %.9g, got %.9g\n", row, column, sum, got);
        return false;
      }
    }
  }
  return true;
}

bool run(const Kernels& kernels, const Case& c) {
  Array<uint8_t> weights(c.weights.size() + 3);  // aligned to an element's four bytes and no further
  std::memcpy(weights.data + 3, c.weights.data(), c.weights.size());
  Array<float> x(c.x.size()), y(c.rows * c.columns), row_scales(c.row_scales.size());
  std::memcpy(x.data, c.x.data(), x.size * sizeof(float));
  std::memcpy(row_scales.data, c.row_scales.data(), row_scales.size * sizeof(float));
  Array<uint16_t> group_scales(c.group_scales.size());
  if (c.group) std::memcpy(group_scales.data, c.group_scales.data(), group_scales.size * sizeof(uint16_t));
  Array<float> workspace(llorch::workspace_bytes(c.width, c.columns) / sizeof(float));
  Product p{};
  p.format = c.format;
  p.weights = weights.data + 3;
  p.scales = c.group ? static_cast<const void*>(group_scales.data) : row_scales.data;
  p.group = c.group;
  p.x_bits = c.x_bits;
  p.x = x.data;
  p.y = y.data;
  p.rows = c.rows;
  p.depth = c.depth;
  p.width = c.width;
  p.columns = c.columns;
  llorch::use_workspace(workspace.data, p);
  const bool many = c.columns > llorch::kMaxColumns;
  for (size_t block = 0; many && block < llorch::packed_blocks(c.columns); ++block) kernels.many->pack(p, block);
  if (!many) kernels.prepare(p);
  const auto multiply = many ? kernels.many->multiply_panels : kernels.multiply;
  const size_t cut = between(0, static_cast<int>(c.rows));
  multiply(p, 0, cut);
  multiply(p, cut, c.rows);
  return agrees(c, y.data);
}

// Checks that many loops run every block once, whether helpers start early, late or only after the end, or at once on the
// calling thread.
bool loops_end() {
  std::vector<std::thread> late;
  for (int turn = 0; turn < 200; ++turn) {
    std::vector<std::atomic<int>> runs(between(1, 40));
    llorch::Loop::run(
        runs.size(), 3, &runs,
        [](const void* context, size_t i) {
          const auto& all = *static_cast<const std::vector<std::atomic<int>>*>(context);
          const_cast<std::atomic<int>&>(all[i]).fetch_add(1);
        },
        [] {}, [&](llorch::Loop* loop) {
          if (turn % 3 == 0) return loop->help();
          late.emplace_back([loop] { loop->help(); });
        });
    for (const auto& count : runs) {
      if (count.load() != 1) return false;
    }
  }
  for (std::thread& thread : late) thread.join();
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 200;
  const Kernels* kernels = llorch::kernels();
  if (kernels == nullptr) return 2;
  for (int i = 0; i < cases; ++i) {
    const Case c = make_case();
    if (!run(*kernels, c)) {
      std::printf("%s: format %d, [%zu, %zu], group %zu, depth %zu, %zu columns\n", kernels->name,
                  static_cast<int>(c.format), c.rows, c.width, c.group, c.depth, c.columns);
      return 1;
    }
  }
  for (int i = 0; i < cases; ++i) {
    if (!attention_agrees(*kernels) || !norm_agrees(*kernels) || !logits_agree(*kernels)) return 1;
  }
  if (!loops_end()) return 1;
  std::printf("%s: %d cases\n", kernels->name, cases);
  return 0;
}
