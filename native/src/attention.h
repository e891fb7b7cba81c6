// Softmax attention of a few queries over the slots of a cache, for one instruction set. Include simd.h's macros first.
//
// A task is one row, one key/value head and one chunk of slots. All queries that share the key/value head are processed
// in a single pass over the slots, in blocks, with an online softmax (Milakov & Gimelshein 2018; Dao 2023). Blocks and
// chunks have fixed boundaries, and a block whose slots are all masked is skipped and changes nothing. So a query's
// result has the same bits whatever the other rows and queries are, however many empty slots follow, and on any number
// of threads.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "stored.h"

namespace llorch::LLORCH_ISA {

constexpr float kMasked = -3.4028234663852886e38f;
constexpr size_t kSlots = kSlotsPerBlock;

// ---- One block of slots ---------------------------------------------------------------------------------------------

// The queries of a task, in the padded order, and their sums so far.
struct Running {
  alignas(64) float q[kMaxScratch];
  alignas(64) float sums[kMaxScratch];
  float sum_of_q[kMaxQueries];
  float most[kMaxQueries];
  float total[kMaxQueries];
};

// A block of slots: where its vectors are, and which slots a query sees.
struct Block {
  const char* keys[kSlots];
  const char* values[kSlots];
  size_t scale_at[kSlots];
  const float* exact_keys[kSlots];
  const float* exact_values[kSlots];
  size_t exact_slots[kSlots];
  size_t exact_count;
  size_t stored_slots[kSlots];
  size_t stored_count;
  alignas(64) int32_t positions[kSlots];
  alignas(64) int32_t seen[kSlots];  // by one query: -1 or 0
  alignas(64) float scores[kSlots];
};

LLORCH_INLINE bool any(Ints mask) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
}

// Marks the slots that a query at `position` sees; returns whether there are any.
LLORCH_INLINE bool see(const Attention& a, int32_t position, Block& block) {
  Ints found{};
  for (size_t i = 0; i < kSlots; i += kLanes) {
    const Ints slot = load<Ints>(block.positions + i);
    Ints seen = (slot >= 0) & (slot <= position);
    if (a.window > 0) seen &= slot > position - a.window;
    if (a.view_window > 0) seen &= (slot > position - a.view_window) | (slot < a.sinks);
    store(block.seen + i, seen);
    found |= seen;
  }
  return any(found);
}

LLORCH_INLINE size_t row_of(const Attention& a, size_t row, size_t head, size_t slot) {
  if (a.tables == nullptr) return (row * a.kv_heads + head) * a.slots + slot;
  const int32_t named = a.tables[row * a.table_width + slot / a.page_size];
  const size_t page = named < 0 ? 0 : static_cast<size_t>(named) < a.pages ? named : a.pages - 1;
  return (page * a.kv_heads + head) * a.page_size + slot % a.page_size;
}

// The range of the positions with which an exact ring is marked; most slots are outside it.
struct Marks {
  int32_t least = 0x7fffffff;
  int32_t most = -1;
};

LLORCH_INLINE Marks marks_of(const Exact& exact, size_t row) {
  Marks marks;
  const int32_t* positions = exact.positions + row * exact.count;
  for (size_t i = 0; i < exact.count; ++i) {
    if (positions[i] < 0) continue;
    marks.least = positions[i] < marks.least ? positions[i] : marks.least;
    marks.most = positions[i] > marks.most ? positions[i] : marks.most;
  }
  return marks;
}

LLORCH_INLINE void find_exact(const Attention& a, size_t row, size_t head, const Marks (&marks)[kMaxExact], size_t i,
                              Block& block) {
  const int32_t position = block.positions[i];
  for (size_t e = a.exact_count; e-- > 0;) {
    const Exact& exact = a.exact[e];
    if (position < marks[e].least || position > marks[e].most) continue;
    const int32_t count = static_cast<int32_t>(exact.count);
    const int32_t start = exact.starts == nullptr ? 0 : exact.starts[row];
    const int32_t offset = (position - start) % count;
    const size_t index = offset < 0 ? offset + count : offset;
    if (exact.positions[row * exact.count + index] != position) continue;
    const size_t at = ((row * a.kv_heads + head) * exact.count + index) * a.head_dim;
    block.exact_keys[i] = exact.keys + at;
    block.exact_values[i] = exact.values + at;
    return;
  }
  block.exact_keys[i] = nullptr;
}

template <typename Stored>
LLORCH_INLINE void find_rows(const Attention& a, size_t row, size_t head, size_t first, size_t count,
                             const Marks (&marks)[kMaxExact], Block& block) {
  const size_t bytes = Stored::row_bytes(a.head_dim);
  for (size_t i = 0; i < kSlots; ++i) {
    const size_t at = row_of(a, row, head, first + (i < count ? i : 0));  // slots past the end are masked
    block.keys[i] = static_cast<const char*>(a.keys.rows) + at * bytes;
    block.values[i] = static_cast<const char*>(a.values.rows) + at * bytes;
    block.scale_at[i] = at;
  }
  if (a.exact_count == 0) return;
  for (size_t i = 0; i < kSlots; ++i) find_exact(a, row, head, marks, i, block);
}

// Lists the slots that a query sees, stored and exact vectors separately.
LLORCH_INLINE void list_seen(const Attention& a, Block& block) {
  block.stored_count = 0;
  block.exact_count = 0;
  for (size_t i = 0; i < kSlots; ++i) {
    if (block.seen[i] == 0) continue;
    if (a.exact_count > 0 && block.exact_keys[i] != nullptr) {
      block.exact_slots[block.exact_count++] = i;
    } else {
      block.stored_slots[block.stored_count++] = i;
    }
  }
}

// Requests the values of the slots that a query sees, so that they arrive while keys are multiplied.
template <typename Stored>
LLORCH_INLINE void request_values(const Attention& a, const Block& block) {
  const size_t bytes = Stored::row_bytes(a.head_dim);
  for (size_t n = 0; n < block.stored_count; ++n) {
    const char* row = block.values[block.stored_slots[n]];
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// Requests the keys of a block in advance: those that the last query may see, if there is no window.
template <typename Stored>
LLORCH_INLINE void request_keys(const Attention& a, size_t row, size_t head, size_t first, size_t end,
                                const int32_t* positions, int32_t last) {
  const size_t bytes = Stored::row_bytes(a.head_dim);
  const size_t stop = first + kSlots < end ? first + kSlots : end;
  for (size_t slot = first; slot < stop; ++slot) {
    if (positions[slot] < 0 || positions[slot] > last) continue;
    const char* key = static_cast<const char*>(a.keys.rows) + row_of(a, row, head, slot) * bytes;
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(key + at, 0, 2);
  }
}

// Dot products of a query and kLanes stored vectors, starting at slot `first`.
template <typename Stored>
LLORCH_INLINE Floats dots(const Attention& a, const float* q, size_t width, const Block& block, size_t first) {
  Floats products[kLanes] = {};
  for (size_t v = 0; v < width / kLanes; ++v) {
    const Floats by = load<Floats>(q + v * kLanes);
    LLORCH_UNROLL for (int i = 0; i < kLanes; ++i) {
      products[i] = multiply_add(Stored::get(block.keys[first + i], v, a.head_dim), by, products[i]);
    }
  }
  return sums(products);
}

template <typename Stored>
LLORCH_INLINE float exact_dot(const Attention& a, const float* q, size_t width, const float* key) {
  Floats products{};
  for (size_t v = 0; v < width / kLanes; ++v) {
    products = multiply_add(get_exact<Stored>(key, v, a.head_dim), load<Floats>(q + v * kLanes), products);
  }
  return sum(products);
}

template <typename Stored>
LLORCH_INLINE void score(const Attention& a, const Running& running, size_t query, size_t width, Block& block) {
  const float* q = running.q + query * width;
  for (size_t i = 0; i < kSlots; i += kLanes) {
    if (!any(load<Ints>(block.seen + i))) {  // their keys need not be read
      store(block.scores + i, Floats{});
      continue;
    }
    Floats scores = dots<Stored>(a, q, width, block, i);
    if constexpr (!Stored::kFloats) {
      Floats scales;
      for (int j = 0; j < kLanes; ++j) scales[j] = a.keys.scales[block.scale_at[i + j]];
      scores *= scales;
    }
    if constexpr (Stored::kNibbles) {
      Floats zeros;
      for (int j = 0; j < kLanes; ++j) zeros[j] = a.keys.zeros[block.scale_at[i + j]];
      scores = multiply_add(zeros, broadcast(running.sum_of_q[query]), scores);
    }
    store(block.scores + i, scores * a.scale);
  }
  for (size_t n = 0; n < block.exact_count; ++n) {
    const size_t i = block.exact_slots[n];
    block.scores[i] = exact_dot<Stored>(a, q, width, block.exact_keys[i]) * a.scale;
  }
}

// Turns scores into weights relative to the largest score so far, and rescales earlier sums accordingly.
LLORCH_INLINE void weigh(Running& running, size_t query, size_t width, Block& block) {
  Floats most = broadcast(kMasked);
  for (size_t i = 0; i < kSlots; i += kLanes) {
    const Floats scores = load<Floats>(block.scores + i);
    most = larger(load<Ints>(block.seen + i) != 0 ? scores : broadcast(kMasked), most);
  }
  const float before = running.most[query];
  const float block_most = largest(most);
  const float now = block_most > before ? block_most : before;
  Floats total{};
  for (size_t i = 0; i < kSlots; i += kLanes) {
    const Floats weights = exponential(load<Floats>(block.scores + i) - now);
    const Floats seen = load<Ints>(block.seen + i) != 0 ? weights : Floats{};
    store(block.scores + i, seen);
    total += seen;
  }
  const float by = exponential(broadcast(before - now))[0];
  running.most[query] = now;
  running.total[query] = running.total[query] * by + sum(total);
  float* gathered = running.sums + query * width;
  for (size_t v = 0; v < width; v += kLanes) store(gathered + v, load<Floats>(gathered + v) * by);
}

// Adds the weighted values of the slots that a query sees to kVectors vectors of its sums.
template <typename Stored, int kVectors>
LLORCH_INLINE void gather_vectors(const Attention& a, float* gathered, size_t first, const float* exact_weights, float zeros,
                                  const Block& block) {
  Floats added[kVectors] = {};
  for (size_t n = 0; n < block.stored_count; ++n) {
    const size_t i = block.stored_slots[n];
    const Floats weight = broadcast(block.scores[i]);
    LLORCH_UNROLL for (int v = 0; v < kVectors; ++v) {
      added[v] = multiply_add(Stored::get(block.values[i], first + v, a.head_dim), weight, added[v]);
    }
  }
  for (size_t n = 0; n < block.exact_count; ++n) {
    const float* value = block.exact_values[block.exact_slots[n]];
    const Floats weight = broadcast(exact_weights[n]);
    LLORCH_UNROLL for (int v = 0; v < kVectors; ++v) {
      added[v] = multiply_add(get_exact<Stored>(value, first + v, a.head_dim), weight, added[v]);
    }
  }
  LLORCH_UNROLL for (int v = 0; v < kVectors; ++v) {
    float* to = gathered + (first + v) * kLanes;
    store(to, load<Floats>(to) + added[v] + zeros);
  }
}

template <typename Stored>
LLORCH_INLINE void gather(const Attention& a, Running& running, size_t query, size_t width, Block& block) {
  float* gathered = running.sums + query * width;
  float exact_weights[kSlots];
  for (size_t n = 0; n < block.exact_count; ++n) exact_weights[n] = block.scores[block.exact_slots[n]];
  float zeros = 0;
  if constexpr (!Stored::kFloats) {
    for (size_t n = 0; n < block.stored_count; ++n) {
      const size_t i = block.stored_slots[n];
      if constexpr (Stored::kNibbles) zeros += block.scores[i] * a.values.zeros[block.scale_at[i]];
      block.scores[i] *= a.values.scales[block.scale_at[i]];
    }
  }
  size_t v = 0;
  for (; v + 4 <= width / kLanes; v += 4) gather_vectors<Stored, 4>(a, gathered, v, exact_weights, zeros, block);
  for (; v < width / kLanes; ++v) gather_vectors<Stored, 1>(a, gathered, v, exact_weights, zeros, block);
}

// ---- A task ---------------------------------------------------------------------------------------------------------

template <typename Stored>
LLORCH_INLINE void begin(const Attention& a, size_t row, size_t head, size_t width, Running& running) {
  const size_t queries = a.queries * a.group;
  for (size_t i = 0; i < queries * width; ++i) running.q[i] = running.sums[i] = 0;
  for (size_t query = 0; query < queries; ++query) {
    const size_t token = query / a.group;
    const size_t from = ((row * a.queries + token) * a.kv_heads + head) * a.group + query % a.group;
    float total = 0;
    for (size_t element = 0; element < a.head_dim; ++element) {
      const float value = a.q[from * a.head_dim + element];
      running.q[query * width + place_of<Stored>(element, a.head_dim)] = value;
      total += value;
    }
    running.sum_of_q[query] = total;
    running.most[query] = kMasked;
    running.total[query] = 0;
  }
}

template <typename Stored>
void attend_chunk(const Attention& a, size_t row, size_t head, size_t chunk, float* partial) {
  const size_t width = padded_head(a.head_dim, a.format);
  const size_t queries = a.queries * a.group;
  const int32_t* positions = a.positions + row * a.position_row_stride + head * a.position_head_stride;
  const size_t end = (chunk + 1) * kSlotsPerChunk < a.slots ? (chunk + 1) * kSlotsPerChunk : a.slots;
  int32_t last = -1;
  for (size_t token = 0; token < a.queries; ++token) {
    const int32_t position = a.query_positions[row * a.queries + token];
    last = position > last ? position : last;
  }
  request_keys<Stored>(a, row, head, chunk * kSlotsPerChunk, end, positions, last);
  Running running;
  Block block;
  begin<Stored>(a, row, head, width, running);
  Marks marks[kMaxExact];
  for (size_t e = 0; e < a.exact_count; ++e) marks[e] = marks_of(a.exact[e], row);
  for (size_t first = chunk * kSlotsPerChunk; first < end; first += kSlots) {
    const size_t count = end - first < kSlots ? end - first : kSlots;
    copy(block.positions, positions + first, count);
    for (size_t i = count; i < kSlots; ++i) block.positions[i] = -1;
    bool found = false;
    for (size_t token = 0; token < a.queries; ++token) {
      if (!see(a, a.query_positions[row * a.queries + token], block)) continue;
      if (!found) find_rows<Stored>(a, row, head, first, count, marks, block);
      list_seen(a, block);
      if (!found) {
        request_values<Stored>(a, block);
        request_keys<Stored>(a, row, head, first + kSlots, end, positions, last);
      }
      found = true;
      for (size_t query = token * a.group; query < (token + 1) * a.group; ++query) {
        score<Stored>(a, running, query, width, block);
        weigh(running, query, width, block);
        gather<Stored>(a, running, query, width, block);
      }
    }
  }
  for (size_t query = 0; query < queries; ++query) {
    float* to = partial + query * partial_size(width);
    to[0] = running.most[query];
    to[1] = running.total[query];
    copy(to + 2, running.sums + query * width, width);
  }
}

[[maybe_unused]] static void attend(const Attention& a, size_t task) {
  const size_t count = chunks(a.slots);
  const size_t chunk = task % count;
  const size_t head = task / count % a.kv_heads;
  const size_t row = task / count / a.kv_heads;
  float* partial = a.workspace + task * a.queries * a.group * partial_size(padded_head(a.head_dim, a.format));
  switch (a.format) {
    case Format::kFloat32: return attend_chunk<StoredFloat32>(a, row, head, chunk, partial);
    case Format::kBFloat16: return attend_chunk<StoredHalf<from_bfloat16>>(a, row, head, chunk, partial);
    case Format::kFloat16: return attend_chunk<StoredHalf<from_float16>>(a, row, head, chunk, partial);
    case Format::kInt8: return attend_chunk<StoredInt8>(a, row, head, chunk, partial);
    case Format::kInt4: return attend_chunk<StoredInt4>(a, row, head, chunk, partial);
  }
}

// Combines the results of `count` chunks for one query, which are `stride` floats apart.
template <bool kNibbles>
LLORCH_INLINE void merge_query(const Attention& a, const float* partial, size_t count, size_t stride, float* out) {
  float most = kMasked;
  for (size_t chunk = 0; chunk < count; ++chunk) most = partial[chunk * stride] > most ? partial[chunk * stride] : most;
  float total = 0;
  for (size_t element = 0; element < a.head_dim; ++element) out[element] = 0;
  for (size_t chunk = 0; chunk < count; ++chunk) {
    const float* from = partial + chunk * stride;
    if (from[1] == 0) continue;  // the query sees nothing in this chunk
    const float by = exponential(broadcast(from[0] - most))[0];
    total += from[1] * by;
    for (size_t element = 0; element < a.head_dim; ++element) {
      const size_t place = kNibbles ? place_of<StoredInt4>(element, a.head_dim) : element;
      out[element] += from[2 + place] * by;
    }
  }
  if (total == 0) return;  // a query that may attend to nothing, such as padding
  for (size_t element = 0; element < a.head_dim; ++element) out[element] /= total;
}

[[maybe_unused]] static void merge(const Attention& a) {
  const size_t count = chunks(a.slots);
  const size_t size = partial_size(padded_head(a.head_dim, a.format));
  const size_t queries = a.queries * a.group;
  for (size_t pair = 0; pair < a.batch * a.kv_heads; ++pair) {
    for (size_t query = 0; query < queries; ++query) {
      const float* partial = a.workspace + (pair * count * queries + query) * size;
      const size_t row = pair / a.kv_heads;
      const size_t head = pair % a.kv_heads;
      const size_t to = ((row * a.queries + query / a.group) * a.kv_heads + head) * a.group + query % a.group;
      if (a.format == Format::kInt4) {
        merge_query<true>(a, partial, count, queries * size, a.out + to * a.head_dim);
      } else {
        merge_query<false>(a, partial, count, queries * size, a.out + to * a.head_dim);
      }
    }
  }
}

}  // namespace llorch::LLORCH_ISA
