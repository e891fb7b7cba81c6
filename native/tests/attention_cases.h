// Random attention over slots and pages, compared with sums in double precision.
#pragma once

#include <cstdio>
#include <vector>

#include "common.h"
#include "kernels.h"

inline float random_float() { return std::uniform_real_distribution<float>(-1, 1)(random_bits); }

// Vectors [outer, heads, inner, head_dim] as a codec stores them, and their values.
struct StoredVectors {
  StoredVectors(llorch::Format format, size_t count, size_t head_dim)
      : bytes(count * row_bytes(format, head_dim)), scales(count), zeros(count), exact(count * head_dim) {
    for (size_t row = 0; row < count; ++row) {
      scales.data[row] = format == llorch::Format::kInt8 || format == llorch::Format::kInt4 ? random_float() : 1;
      zeros.data[row] = format == llorch::Format::kInt4 ? random_float() : 0;
      for (size_t i = 0; i < head_dim; ++i) exact[row * head_dim + i] = put(format, row, i, head_dim);
    }
  }

  static size_t row_bytes(llorch::Format format, size_t head_dim) {
    switch (format) {
      case llorch::Format::kFloat32: return 4 * head_dim;
      case llorch::Format::kInt8: return head_dim;
      case llorch::Format::kInt4: return (head_dim + 1) / 2;
      default: return 2 * head_dim;
    }
  }

  llorch::Vectors vectors() const { return {bytes.data, scales.data, zeros.data}; }

  Array<uint8_t> bytes;
  Array<float> scales, zeros;
  std::vector<double> exact;

 private:
  // Stores a random element, and returns its value.
  double put(llorch::Format format, size_t row, size_t i, size_t head_dim) {
    uint8_t* at = bytes.data + row * row_bytes(format, head_dim);
    if (format == llorch::Format::kFloat32) {
      const float value = random_float();
      std::memcpy(at + 4 * i, &value, 4);
      return value;
    }
    if (format == llorch::Format::kInt8) {
      const int code = between(-127, 127);
      at[i] = static_cast<uint8_t>(code);
      return static_cast<double>(code) * scales.data[row];
    }
    if (format == llorch::Format::kInt4) {
      const size_t half = (head_dim + 1) / 2;
      const int code = between(0, 15);
      at[i % half] = static_cast<uint8_t>(at[i % half] | (i < half ? code : code << 4));
      return static_cast<double>(code) * scales.data[row] + zeros.data[row];
    }
    const uint16_t bits = static_cast<uint16_t>(between(0, 1) << 15 | between(0, 0x3bff));  // float16 below 1
    const uint16_t word = format == llorch::Format::kFloat16 ? bits : static_cast<uint16_t>(bits + 0x400);
    std::memcpy(at + 2 * i, &word, 2);
    if (format == llorch::Format::kFloat16) return half_value(word);
    const uint32_t wide = static_cast<uint32_t>(word) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

// Makes one call with random shapes, and returns whether the result agrees with the definition.
inline bool attention_agrees(const llorch::Kernels& kernels) {
  constexpr llorch::Format formats[] = {llorch::Format::kFloat32, llorch::Format::kBFloat16, llorch::Format::kFloat16,
                                        llorch::Format::kInt8, llorch::Format::kInt4};
  llorch::Attention a{};
  a.format = formats[between(0, 4)];
  a.batch = between(1, 2);
  a.queries = between(0, 1) == 1 ? between(1, 3) : between(17, 40);
  a.kv_heads = between(1, 2);
  a.group = between(1, 3);
  a.head_dim = between(1, 70);
  const bool paged = between(0, 1) == 1;
  a.page_size = paged ? between(1, 40) : 0;
  a.table_width = paged ? between(1, 8) : 0;
  a.pages = paged ? between(1, 5) : 0;
  a.slots = paged ? a.table_width * a.page_size : between(1, 330);
  const size_t vectors = paged ? a.pages * a.kv_heads * a.page_size : a.batch * a.kv_heads * a.slots;
  const StoredVectors keys(a.format, vectors, a.head_dim), values(a.format, vectors, a.head_dim);
  a.keys = keys.vectors();
  a.values = values.vectors();
  Array<int32_t> tables(a.batch * a.table_width), positions(a.batch * a.slots), query_positions(a.batch * a.queries);
  for (size_t i = 0; i < tables.size; ++i) tables.data[i] = between(-1, static_cast<int>(a.pages));  // also invalid ones
  for (size_t i = 0; i < positions.size; ++i) positions.data[i] = between(-3, 400);
  for (size_t i = 0; i < query_positions.size; ++i) query_positions.data[i] = between(0, 400);
  a.tables = paged ? tables.data : nullptr;
  a.positions = positions.data;
  a.position_row_stride = a.slots;
  a.query_positions = query_positions.data;
  a.window = between(0, 1) * 200;
  a.view_window = between(0, 1) * 150;
  a.sinks = between(0, 20);
  const size_t ring = between(1, 20);
  Array<float> exact_keys(a.batch * a.kv_heads * ring * a.head_dim), exact_values(exact_keys.size);
  Array<int32_t> marks(a.batch * ring), starts(a.batch);
  for (size_t i = 0; i < exact_keys.size; ++i) {
    exact_keys.data[i] = random_float();
    exact_values.data[i] = random_float();
  }
  for (size_t i = 0; i < a.batch; ++i) starts.data[i] = between(0, 100);
  for (size_t i = 0; i < marks.size; ++i) marks.data[i] = between(-1, 400);
  a.exact_count = between(0, 1);
  a.exact[0] = {exact_keys.data, exact_values.data, marks.data, starts.data, ring};
  const size_t heads = a.kv_heads * a.group;
  Array<float> q(a.batch * a.queries * heads * a.head_dim), out(q.size);
  for (size_t i = 0; i < q.size; ++i) q.data[i] = random_float();
  a.q = q.data;
  a.out = out.data;
  a.scale = 0.3f;
  const bool few = llorch::few_queries(a);
  const size_t tasks = few ? a.batch * a.kv_heads * llorch::chunks(a.slots) : kernels.many->panel_tasks(a);
  const size_t partial = llorch::partial_size(llorch::padded_head(a.head_dim, a.format));
  Array<float> workspace(few ? tasks * a.queries * a.group * partial : 0);
  a.workspace = workspace.data;
  for (size_t task = tasks; task-- > 0;) (few ? kernels.attend : kernels.many->attend_panel)(a, task);
  if (few) kernels.merge(a);

  for (size_t row = 0; row < a.batch; ++row) {
    for (size_t n = 0; n < a.queries * heads; ++n) {
      const size_t token = n / heads, head = n % heads / a.group;
      const float* query = q.data + ((row * a.queries + token) * heads + n % heads) * a.head_dim;
      const int32_t at = query_positions.data[row * a.queries + token];
      std::vector<double> sums(a.head_dim);
      double total = 0, largest = 0;
      for (size_t slot = 0; slot < a.slots; ++slot) {
        const int32_t position = positions.data[row * a.slots + slot];
        if (position < 0 || position > at || (a.window > 0 && position <= at - a.window)) continue;
        if (a.view_window > 0 && position <= at - a.view_window && position >= a.sinks) continue;
        size_t vector = (row * a.kv_heads + head) * a.slots + slot;
        if (paged) {
          const int named = tables.data[row * a.table_width + slot / a.page_size];
          const size_t page = named < 0 ? 0 : static_cast<size_t>(named) < a.pages ? named : a.pages - 1;
          vector = (page * a.kv_heads + head) * a.page_size + slot % a.page_size;
        }
        const int32_t offset = (position - starts.data[row]) % static_cast<int32_t>(ring);
        const size_t index = offset < 0 ? offset + ring : offset;
        const bool exact = a.exact_count > 0 && marks.data[row * ring + index] == position;
        const size_t from = ((row * a.kv_heads + head) * ring + index) * a.head_dim;
        double score = 0;
        for (size_t i = 0; i < a.head_dim; ++i) {
          score += query[i] * (exact ? exact_keys.data[from + i] : keys.exact[vector * a.head_dim + i]);
        }
        const double weight = std::exp(score * a.scale);
        total += weight;
        for (size_t i = 0; i < a.head_dim; ++i) {
          const double value = exact ? exact_values.data[from + i] : values.exact[vector * a.head_dim + i];
          sums[i] += weight * value;
          largest = std::fmax(largest, std::fabs(value));
        }
      }
      const float* got = out.data + ((row * a.queries + token) * heads + n % heads) * a.head_dim;
      for (size_t i = 0; i < a.head_dim; ++i) {
        const double expected = total > 0 ? sums[i] / total : 0;
        if (!(std::fabs(got[i] - expected) <= 1e-3 * (largest + 1e-3))) {
          std::printf("%s: attention, format %d, row %zu, query %zu, element %zu: expected %.9g, got %.9g\n", kernels.name,
                      static_cast<int>(a.format), row, n, i, expected, got[i]);
          return false;
        }
      }
    }
  }
  return true;
}
