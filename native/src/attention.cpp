// Attention as an XLA custom call.
#include "arguments.h"
#include "dispatch.h"

namespace llorch::attention {

constexpr size_t kBytesPerThread = 96 * 1024;  // of keys and values; fewer are read before another thread has started
const Arguments kCall("llorch_attention");

// The leading axes of stored keys or values: [B, K, S, ...] or [pages, K, page_size, ...].
struct Leading {
  size_t outer;
  size_t heads;
  size_t inner;
};

ffi::Error read_format(const ffi::AnyBuffer& keys, int64_t bits, Attention& a) {
  const ffi::DataType type = keys.element_type();
  if (bits == 32 && type == ffi::DataType::F32) {
    a.format = Format::kFloat32;
  } else if (bits == 16 && type == ffi::DataType::U16) {
    a.format = Format::kBFloat16;
  } else if (bits == 16 && type == ffi::DataType::F16) {
    a.format = Format::kFloat16;
  } else if (bits == 8 && type == ffi::DataType::S8) {
    a.format = Format::kInt8;
  } else if (bits == 4 && type == ffi::DataType::U8) {
    a.format = Format::kInt4;
  } else {
    return kCall.wrong("keys", "float32, uint16 (bfloat16), float16, int8 codes or uint8 pairs of codes",
                       "another type of elements");
  }
  return ffi::Error::Success();
}

ffi::Error read_vectors(const std::string& name, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& scales,
                        const ffi::AnyBuffer& zeros, ffi::DataType type, const Leading& leading, const Attention& a,
                        Vectors& vectors) {
  const size_t last = a.format == Format::kInt4 ? (a.head_dim + 1) / 2 : a.head_dim;
  if (ffi::Error error = kCall.check(name, rows, type, "elements of one type", {leading.outer, leading.heads, leading.inner, last});
      error.failure()) {
    return error;
  }
  const bool scaled = a.format == Format::kInt8 || a.format == Format::kInt4;
  const std::vector<size_t> per_vector = {leading.outer, leading.heads, leading.inner, 1};
  if (scaled) {
    if (ffi::Error error = kCall.check(name + " scales", scales, ffi::DataType::F32, "float32", per_vector); error.failure()) {
      return error;
    }
  }
  if (a.format == Format::kInt4) {
    if (ffi::Error error = kCall.check(name + " zeros", zeros, ffi::DataType::F32, "float32", per_vector); error.failure()) {
      return error;
    }
  }
  vectors = Vectors{rows.untyped_data(), scales.typed_data<float>(), zeros.typed_data<float>()};
  return ffi::Error::Success();
}

ffi::Error read_queries(const ffi::AnyBuffer& q, const ffi::AnyBuffer& query_positions, Attention& a) {
  const auto shape = q.dimensions();
  if (shape.size() != 4) return kCall.wrong("q", "[B, T, N, H]", shape_of(q));
  a.batch = shape[0];
  a.queries = shape[1];
  a.head_dim = shape[3];
  if (a.kv_heads == 0 || shape[2] % a.kv_heads != 0) {
    return kCall.wrong("q", "a multiple of " + std::to_string(a.kv_heads) + " heads", shape_of(q));
  }
  a.group = shape[2] / a.kv_heads;
  if (!few_queries(a) && padded_head(a.head_dim, a.format) > kMaxHead) {
    return kCall.wrong("q", "vectors of up to " + std::to_string(kMaxHead) + " elements", shape_of(q));
  }
  if (ffi::Error error = kCall.check("q", q, ffi::DataType::F32, "float32",
                                     {a.batch, a.queries, a.kv_heads * a.group, a.head_dim});
      error.failure()) {
    return error;
  }
  a.q = q.typed_data<float>();
  a.query_positions = query_positions.typed_data<int32_t>();
  return kCall.check("query positions", query_positions, ffi::DataType::S32, "int32", {a.batch, a.queries});
}

ffi::Error read_positions(const ffi::AnyBuffer& positions, Attention& a) {
  const auto shape = positions.dimensions();
  if (shape.size() != 3 || positions.element_type() != ffi::DataType::S32) {
    return kCall.wrong("positions", "int32 [B or 1, K or 1, S]", shape_of(positions));
  }
  const size_t rows = shape[0], heads = shape[1];
  if ((rows != 1 && rows != a.batch) || (heads != 1 && heads != a.kv_heads) || static_cast<size_t>(shape[2]) != a.slots) {
    return kCall.wrong("positions", "one row or " + std::to_string(a.batch) + ", one head or " + std::to_string(a.kv_heads) +
                                        ", and " + std::to_string(a.slots) + " slots",
                       shape_of(positions));
  }
  a.positions = positions.typed_data<int32_t>();
  a.position_row_stride = rows == 1 ? 0 : heads * a.slots;
  a.position_head_stride = heads == 1 ? 0 : a.slots;
  return ffi::Error::Success();
}

// Determines where vectors are stored: in pages if there are tables [B, N], otherwise in slots.
ffi::Error read_place(const ffi::AnyBuffer& keys, const ffi::AnyBuffer& tables, size_t batch, Attention& a, Leading& leading) {
  const auto shape = keys.dimensions();
  if (shape.size() != 4) return kCall.wrong("keys", "[B, K, S, H] or [pages, K, page_size, H]", shape_of(keys));
  leading = Leading{static_cast<size_t>(shape[0]), static_cast<size_t>(shape[1]), static_cast<size_t>(shape[2])};
  a.kv_heads = leading.heads;
  a.slots = leading.inner;
  if (tables.dimensions().size() != 2) return kCall.wrong("tables", "int32 [B, N]", shape_of(tables));
  a.table_width = tables.dimensions()[1];
  if (a.table_width == 0) {
    return leading.outer == batch ? ffi::Error::Success() : kCall.wrong("keys", std::to_string(batch) + " rows", shape_of(keys));
  }
  if (leading.outer == 0 || leading.inner == 0) return kCall.wrong("keys", "some pages", shape_of(keys));
  a.tables = tables.typed_data<int32_t>();
  a.pages = leading.outer;
  a.page_size = leading.inner;
  a.slots = a.table_width * a.page_size;
  return kCall.check("tables", tables, ffi::DataType::S32, "int32", {batch, a.table_width});
}

template <typename Buffers>
ffi::Error read_exact(const Buffers& rest, Attention& a) {
  constexpr size_t kEach = 4;
  if (rest.size() % kEach != 0 || rest.size() / kEach > kMaxExact) {
    return kCall.wrong("exact vectors", "four arrays for each of up to " + std::to_string(kMaxExact),
                       std::to_string(rest.size()) + " arrays");
  }
  for (size_t e = 0; e < rest.size() / kEach; ++e) {
    ffi::AnyBuffer each[kEach] = {*rest.template get<ffi::AnyBuffer>(kEach * e), *rest.template get<ffi::AnyBuffer>(kEach * e + 1),
                                  *rest.template get<ffi::AnyBuffer>(kEach * e + 2), *rest.template get<ffi::AnyBuffer>(kEach * e + 3)};
    if (each[2].dimensions().size() != 2) return kCall.wrong("exact positions", "[B, R]", shape_of(each[2]));
    Exact& exact = a.exact[e];
    exact.count = each[2].dimensions()[1];
    if (exact.count == 0) return kCall.wrong("exact positions", "at least one token", shape_of(each[2]));
    for (const int vectors : {0, 1}) {
      const std::vector<size_t> shape = {a.batch, a.kv_heads, exact.count, a.head_dim};
      if (ffi::Error error = kCall.check("exact vectors", each[vectors], ffi::DataType::F32, "float32", shape); error.failure()) {
        return error;
      }
    }
    if (ffi::Error error = kCall.check("exact positions", each[2], ffi::DataType::S32, "int32", {a.batch, exact.count}); error.failure()) {
      return error;
    }
    if (ffi::Error error = kCall.check("exact starts", each[3], ffi::DataType::S32, "int32", {a.batch}); error.failure()) return error;
    exact.keys = each[0].template typed_data<float>();
    exact.values = each[1].template typed_data<float>();
    exact.positions = each[2].template typed_data<int32_t>();
    exact.starts = each[3].template typed_data<int32_t>();
  }
  a.exact_count = rest.size() / kEach;
  return ffi::Error::Success();
}

struct Tasks {
  const Kernels* kernels;
  const Attention& attention;
};

void attend_task(const void* context, size_t task) {
  const Tasks& tasks = *static_cast<const Tasks*>(context);
  tasks.kernels->attend(tasks.attention, task);
}

void attend_panel_task(const void* context, size_t task) {
  const Tasks& tasks = *static_cast<const Tasks*>(context);
  tasks.kernels->many->attend_panel(tasks.attention, task);
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer query_positions, ffi::AnyBuffer keys,
                     ffi::AnyBuffer key_scales, ffi::AnyBuffer key_zeros, ffi::AnyBuffer values, ffi::AnyBuffer value_scales,
                     ffi::AnyBuffer value_zeros, ffi::AnyBuffer positions, ffi::AnyBuffer tables, ffi::RemainingArgs exact,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace, int64_t bits, int64_t window,
                     int64_t view_window, int64_t sinks, float scale) {
  const Kernels* found = kernels();
  if (found == nullptr) return kCall.wrong("LLORCH_JAX_ISA", "an instruction set of this machine", "another");
  if (q.dimensions().size() != 4) return kCall.wrong("q", "[B, T, N, H]", shape_of(q));
  Attention a{};
  Leading leading;
  if (ffi::Error error = read_format(keys, bits, a); error.failure()) return error;
  if (ffi::Error error = read_place(keys, tables, q.dimensions()[0], a, leading); error.failure()) return error;
  if (ffi::Error error = read_queries(q, query_positions, a); error.failure()) return error;
  const ffi::DataType type = keys.element_type();
  if (ffi::Error error = read_vectors("keys", keys, key_scales, key_zeros, type, leading, a, a.keys); error.failure()) return error;
  if (ffi::Error error = read_vectors("values", values, value_scales, value_zeros, type, leading, a, a.values); error.failure()) {
    return error;
  }
  if (ffi::Error error = read_positions(positions, a); error.failure()) return error;
  if (ffi::Error error = read_exact(exact, a); error.failure()) return error;
  if (ffi::Error error = kCall.check("out", *out, ffi::DataType::F32, "float32", {a.batch, a.queries, a.kv_heads * a.group, a.head_dim});
      error.failure()) {
    return error;
  }
  const bool few = few_queries(a);
  const size_t tasks = few ? a.batch * a.kv_heads * chunks(a.slots) : found->many->panel_tasks(a);
  const size_t needed = !few ? 0 : tasks * a.queries * a.group * partial_size(padded_head(a.head_dim, a.format)) * sizeof(float);
  if (workspace->element_type() != ffi::DataType::U8 || workspace->size_bytes() < needed) {
    return kCall.wrong("workspace", std::to_string(needed) + " bytes", std::to_string(workspace->size_bytes()));
  }
  a.window = static_cast<int32_t>(window);
  a.view_window = static_cast<int32_t>(view_window);
  a.sinks = static_cast<int32_t>(sinks);
  a.scale = scale;
  a.out = out->typed_data<float>();
  a.workspace = static_cast<float*>(workspace->untyped_data());
  const Tasks all{found, a};
  if (!few) {
    if (tasks > 0) run_on(pool, tasks, tasks, &all, attend_panel_task, [] {});
    return ffi::Error::Success();
  }
  if (tasks > 0) {
    const size_t bytes = 2 * a.batch * a.slots * a.kv_heads * a.head_dim * bits / 8;
    run_on(pool, tasks, 1 + bytes / kBytesPerThread, &all, attend_task, [] {});
  }
  const FlushDenormals flush;
  found->merge(a);
  return ffi::Error::Success();
}

}  // namespace llorch::attention

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(llorch_attention, llorch::attention::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("view_window")
                                  .Attr<int64_t>("sinks")
                                  .Attr<float>("scale"));
#pragma GCC visibility pop
