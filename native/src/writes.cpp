// Writing tokens into a cache's arrays as an XLA custom call, in place.
#include <cstring>

#include "arguments.h"

namespace llorch::writes {

constexpr size_t kBytesPerThread = 256 * 1024;
const Arguments kCall("llorch_write");

// One array [outer, heads, slots, bytes] and new tokens [batch, tokens, heads, bytes].
struct Write {
  char* array;
  const char* tokens;
  const int32_t* rows;   // [batch, tokens], index into `outer`
  const int32_t* slots;  // [batch, tokens]
  size_t outer, heads, capacity, bytes, batch, count;
};

// Writes all tokens of one row and head in order, so that of several for the same slot the last remains.
void write_head(const void* context, size_t task) {
  const Write& write = *static_cast<const Write*>(context);
  const size_t head = task % write.heads;
  const size_t row = task / write.heads;
  for (size_t token = 0; token < write.count; ++token) {
    const size_t from = row * write.count + token;
    const int64_t place = write.rows[from];
    const int64_t slot = write.slots[from];
    if (place < 0 || place >= static_cast<int64_t>(write.outer)) continue;
    if (slot < 0 || slot >= static_cast<int64_t>(write.capacity)) continue;
    const size_t to = (place * write.heads + head) * write.capacity + slot;
    std::memcpy(write.array + to * write.bytes, write.tokens + (from * write.heads + head) * write.bytes, write.bytes);
  }
}

size_t element_bytes(const ffi::AnyBuffer& buffer) {
  const size_t count = buffer.element_count();
  return count > 0 ? buffer.size_bytes() / count : 0;
}

ffi::Error write(ffi::ThreadPool pool, ffi::AnyBuffer array, ffi::AnyBuffer tokens, ffi::AnyBuffer rows,
                 ffi::AnyBuffer slots, ffi::Result<ffi::AnyBuffer> out) {
  if (array.dimensions().size() != 4) return kCall.wrong("array", "[R, K, S, X]", shape_of(array));
  if (tokens.dimensions().size() != 4) return kCall.wrong("tokens", "[B, T, K, X]", shape_of(tokens));
  Write all{};
  all.outer = array.dimensions()[0];
  all.heads = array.dimensions()[1];
  all.capacity = array.dimensions()[2];
  const size_t width = array.dimensions()[3];
  all.bytes = width * element_bytes(array);
  all.batch = tokens.dimensions()[0];
  all.count = tokens.dimensions()[1];
  if (ffi::Error error = kCall.check("tokens", tokens, array.element_type(), "elements as in the array",
                                     {all.batch, all.count, all.heads, width});
      error.failure()) {
    return error;
  }
  if (ffi::Error error = kCall.check("rows", rows, ffi::DataType::S32, "int32", {all.batch, all.count}); error.failure()) return error;
  if (ffi::Error error = kCall.check("slots", slots, ffi::DataType::S32, "int32", {all.batch, all.count}); error.failure()) return error;
  if (out->untyped_data() != array.untyped_data()) return kCall.wrong("out", "the array itself", "another buffer");
  all.array = static_cast<char*>(out->untyped_data());
  all.tokens = static_cast<const char*>(tokens.untyped_data());
  all.rows = rows.typed_data<int32_t>();
  all.slots = slots.typed_data<int32_t>();
  const size_t tasks = all.bytes > 0 ? all.batch * all.heads : 0;
  if (tasks > 0) run_on(pool, tasks, 1 + tokens.size_bytes() / kBytesPerThread, &all, write_head, [] {});
  return ffi::Error::Success();
}

}  // namespace llorch::writes

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(llorch_write, llorch::writes::write,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
#pragma GCC visibility pop
