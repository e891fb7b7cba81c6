// Softmax attention of many queries over the slots of a cache, for one instruction set. Include attention.h first.
//
// A task is one row, one key/value head and a panel of queries, one per lane. For each block of slots, keys are decoded,
// multiplied by the panel, turned into weights by an online softmax (Dao 2023), and multiplied by the decoded values.
// Blocks that no query of the panel sees are skipped. As in attention.h, blocks have fixed boundaries and a skipped block
// changes nothing: a query's result does not depend on the other queries.
#pragma once

#include "attention.h"

namespace llorch::LLORCH_ISA {

constexpr int kQueryVectors = 2;
constexpr size_t kPanelQueries = kQueryVectors * kLanes;
constexpr int kProductRows = LLORCH_BYTES == 64 ? 8 : 4;  // of elements or slots: they divide 16

// The panel of a task; elements are in the padded order of attention.h.
struct PanelState {
  alignas(64) float q[kMaxHead * kPanelQueries];
  alignas(64) float sums[kMaxHead * kPanelQueries];
  alignas(64) float weights[kSlots * kPanelQueries];  // scores at first
  alignas(64) float vectors[kSlots * kMaxHead];       // decoded keys, then values
  Ints positions[kQueryVectors];                      // -1 where there is no query
  Floats most[kQueryVectors];
  Floats total[kQueryVectors];
  int32_t least_position;
  int32_t most_position;
};

// sums[r][v] += from[r * row_stride + step * step_stride] * panel[step][v], over all steps.
LLORCH_INLINE void add_products(const float* from, size_t row_stride, size_t step_stride, const float* panel, size_t steps,
                                Floats (&sums)[kProductRows][kQueryVectors]) {
  for (size_t step = 0; step < steps; ++step) {
    Floats x[kQueryVectors];
    LLORCH_UNROLL for (int v = 0; v < kQueryVectors; ++v) x[v] = load<Floats>(panel + step * kPanelQueries + v * kLanes);
    LLORCH_UNROLL for (int r = 0; r < kProductRows; ++r) {
      const Floats by = broadcast(from[r * row_stride + step * step_stride]);
      LLORCH_UNROLL for (int v = 0; v < kQueryVectors; ++v) sums[r][v] = multiply_add(by, x[v], sums[r][v]);
    }
  }
}

template <typename Stored>
LLORCH_INLINE void decode(const Attention& a, const Vectors& stored, const char* const (&rows)[kSlots],
                          const float* const (&exact)[kSlots], const Block& block, size_t width, float* to) {
  for (size_t i = 0; i < kSlots; ++i, to += width) {
    const bool is_exact = a.exact_count > 0 && block.exact_keys[i] != nullptr;
    for (size_t v = 0; v < width / kLanes; ++v) {
      Floats values;
      if (is_exact) {
        values = get_exact<Stored>(exact[i], v, a.head_dim);
      } else {
        values = Stored::get(rows[i], v, a.head_dim);
        if constexpr (!Stored::kFloats) values *= stored.scales[block.scale_at[i]];
        if constexpr (Stored::kNibbles) values += stored.zeros[block.scale_at[i]];
      }
      store(to + v * kLanes, values);
    }
  }
}

// Whether some queries of the panel see some slots of a block, and whether all see all.
struct Sight {
  bool some;
  bool all;
};

LLORCH_INLINE Sight sight_of(const Attention& a, const Block& block, const PanelState& panel) {
  int32_t least = 0x7fffffff;
  int32_t most = -1;
  bool empty = false;
  for (size_t i = 0; i < kSlots; ++i) {
    const int32_t position = block.positions[i];
    empty |= position < 0;
    most = position > most ? position : most;
    least = position >= 0 && position < least ? position : least;
  }
  bool some = most >= 0 && least <= panel.most_position;
  bool all = !empty && most <= panel.least_position;
  if (a.window > 0) {
    some &= most > panel.least_position - a.window;
    all &= least > panel.most_position - a.window;
  }
  if (a.view_window > 0) {
    some &= most > panel.least_position - a.view_window || least < a.sinks;
    all &= least > panel.most_position - a.view_window;
  }
  return {some, all};
}

// Marks the slots that some query of the panel may see. The others' values count as zero: they may be left over from
// another request, and even a weight of zero would let a NaN through.
LLORCH_INLINE void mark_seen(const Attention& a, const PanelState& panel, Block& block) {
  for (size_t i = 0; i < kSlots; ++i) {
    const int32_t slot = block.positions[i];
    bool seen = slot >= 0 && slot <= panel.most_position;
    if (a.window > 0) seen &= slot > panel.least_position - a.window;
    if (a.view_window > 0) seen &= slot > panel.least_position - a.view_window || slot < a.sinks;
    block.seen[i] = seen;
  }
}

LLORCH_INLINE Ints queries_that_see(const Attention& a, int32_t slot, Ints positions) {
  if (slot < 0) return Ints{};
  Ints seen = slot <= positions;
  if (a.window > 0) seen &= slot > positions - a.window;
  if (a.view_window > 0 && slot >= a.sinks) seen &= slot > positions - a.view_window;
  return seen;
}

// Turns the scores of a block into weights. Returns by how much earlier sums shrink.
LLORCH_INLINE Floats weigh_panel(const Attention& a, const Block& block, bool all, int v, PanelState& panel) {
  float* scores = panel.weights + v * kLanes;
  const Floats before = panel.most[v];
  Floats now = before;
  for (size_t i = 0; i < kSlots; ++i) {
    Floats score = load<Floats>(scores + i * kPanelQueries);
    if (!all) {
      score = queries_that_see(a, block.positions[i], panel.positions[v]) != 0 ? score : broadcast(kMasked);
      store(scores + i * kPanelQueries, score);
    }
    now = larger(score, now);
  }
  Floats total{};
  for (size_t i = 0; i < kSlots; ++i) {
    const Floats score = load<Floats>(scores + i * kPanelQueries);
    const Floats weight = score == kMasked ? Floats{} : exponential(score - now);
    store(scores + i * kPanelQueries, weight);
    total += weight;
  }
  const Floats by = exponential(before - now);
  panel.most[v] = now;
  panel.total[v] = panel.total[v] * by + total;
  return by;
}

template <typename Stored>
LLORCH_INLINE void begin_panel(const Attention& a, size_t row, size_t head, size_t first, size_t count, size_t width,
                               PanelState& panel) {
  for (size_t i = 0; i < width * kPanelQueries; ++i) panel.q[i] = panel.sums[i] = 0;
  int32_t positions[kPanelQueries];
  panel.least_position = 0x7fffffff;
  panel.most_position = -1;
  for (size_t lane = 0; lane < kPanelQueries; ++lane) {
    positions[lane] = -1;
    if (lane >= count) continue;
    const size_t token = row * a.queries + (first + lane) / a.group;
    const float* from = a.q + ((token * a.kv_heads + head) * a.group + (first + lane) % a.group) * a.head_dim;
    for (size_t element = 0; element < a.head_dim; ++element) {
      panel.q[place_of<Stored>(element, a.head_dim) * kPanelQueries + lane] = from[element];
    }
    const int32_t position = a.query_positions[token];
    positions[lane] = position;
    panel.least_position = position < panel.least_position ? position : panel.least_position;
    panel.most_position = position > panel.most_position ? position : panel.most_position;
  }
  for (int v = 0; v < kQueryVectors; ++v) {
    panel.positions[v] = load<Ints>(positions + v * kLanes);
    panel.most[v] = broadcast(kMasked);
    panel.total[v] = Floats{};
  }
}

template <typename Stored>
LLORCH_INLINE void end_panel(const Attention& a, size_t row, size_t head, size_t first, size_t count,
                             const PanelState& panel) {
  float totals[kPanelQueries];
  for (int v = 0; v < kQueryVectors; ++v) store(totals + v * kLanes, panel.total[v]);
  for (size_t lane = 0; lane < count; ++lane) {
    const size_t token = row * a.queries + (first + lane) / a.group;
    float* to = a.out + ((token * a.kv_heads + head) * a.group + (first + lane) % a.group) * a.head_dim;
    const float by = totals[lane] == 0 ? 0 : 1 / totals[lane];  // a query that sees nothing, such as padding, gets zeros
    for (size_t element = 0; element < a.head_dim; ++element) {
      to[element] = panel.sums[place_of<Stored>(element, a.head_dim) * kPanelQueries + lane] * by;
    }
  }
}

template <typename Stored>
void attend_panel_as(const Attention& a, size_t row, size_t head, size_t first, size_t count) {
  const size_t width = padded_head(a.head_dim, a.format);
  PanelState panel;
  Block block;
  begin_panel<Stored>(a, row, head, first, count, width, panel);
  Marks marks[kMaxExact];
  for (size_t e = 0; e < a.exact_count; ++e) marks[e] = marks_of(a.exact[e], row);
  const int32_t* positions = a.positions + row * a.position_row_stride + head * a.position_head_stride;
  for (size_t slot = 0; slot < a.slots; slot += kSlots) {
    const size_t slots = a.slots - slot < kSlots ? a.slots - slot : kSlots;
    copy(block.positions, positions + slot, slots);
    for (size_t i = slots; i < kSlots; ++i) block.positions[i] = -1;
    const Sight sight = sight_of(a, block, panel);
    if (!sight.some) continue;
    find_rows<Stored>(a, row, head, slot, slots, marks, block);
    decode<Stored>(a, a.keys, block.keys, block.exact_keys, block, width, panel.vectors);
    for (size_t i = 0; i < kSlots; i += kProductRows) {
      Floats sums[kProductRows][kQueryVectors] = {};
      add_products(panel.vectors + i * width, width, 1, panel.q, width, sums);
      LLORCH_UNROLL for (int r = 0; r < kProductRows; ++r) {
        LLORCH_UNROLL for (int v = 0; v < kQueryVectors; ++v) {
          store(panel.weights + (i + r) * kPanelQueries + v * kLanes, sums[r][v] * a.scale);
        }
      }
    }
    Floats by[kQueryVectors];
    for (int v = 0; v < kQueryVectors; ++v) by[v] = weigh_panel(a, block, sight.all, v, panel);
    mark_seen(a, panel, block);
    decode<Stored>(a, a.values, block.values, block.exact_values, block, width, panel.vectors);
    for (size_t i = 0; i < kSlots; ++i) {
      for (size_t v = 0; block.seen[i] == 0 && v < width; v += kLanes) store(panel.vectors + i * width + v, Floats{});
    }
    for (size_t element = 0; element < width; element += kProductRows) {
      Floats sums[kProductRows][kQueryVectors] = {};
      add_products(panel.vectors + element, 1, width, panel.weights, kSlots, sums);
      LLORCH_UNROLL for (int r = 0; r < kProductRows; ++r) {
        LLORCH_UNROLL for (int v = 0; v < kQueryVectors; ++v) {
          float* to = panel.sums + (element + r) * kPanelQueries + v * kLanes;
          store(to, multiply_add(load<Floats>(to), by[v], sums[r][v]));
        }
      }
    }
  }
  end_panel<Stored>(a, row, head, first, count, panel);
}

LLORCH_INLINE size_t panels_of(const Attention& a) {
  return (a.queries * a.group + kPanelQueries - 1) / kPanelQueries;
}

static size_t panel_tasks(const Attention& a) { return a.batch * a.kv_heads * panels_of(a); }

static void attend_panel(const Attention& a, size_t task) {
  const size_t panels = panels_of(a);
  // The last queries see the most: they come first, so that the threads end together.
  const size_t first = (panels - 1 - task % panels) * kPanelQueries;
  const size_t left = a.queries * a.group - first;
  const size_t count = left < kPanelQueries ? left : kPanelQueries;
  const size_t head = task / panels % a.kv_heads;
  const size_t row = task / panels / a.kv_heads;
  switch (a.format) {
    case Format::kFloat32: return attend_panel_as<StoredFloat32>(a, row, head, first, count);
    case Format::kBFloat16: return attend_panel_as<StoredHalf<from_bfloat16>>(a, row, head, first, count);
    case Format::kFloat16: return attend_panel_as<StoredHalf<from_float16>>(a, row, head, first, count);
    case Format::kInt8: return attend_panel_as<StoredInt8>(a, row, head, first, count);
    case Format::kInt4: return attend_panel_as<StoredInt4>(a, row, head, first, count);
  }
}

}  // namespace llorch::LLORCH_ISA
