// The most likely token and the normalizer of each row of logits as an XLA custom call.
#include "arguments.h"
#include "dispatch.h"

namespace llorch::logits {

constexpr size_t kBytesPerThread = 256 * 1024;  // less than this is done sooner than another thread wakes up
const Arguments kCall("llorch_summarize");

struct Rows {
  const Kernels* kernels;
  Logits logits;
};

void summarize_row(const void* context, size_t row) {
  const Rows& rows = *static_cast<const Rows*>(context);
  rows.kernels->summarize(rows.logits, row);
}

ffi::Error summarize(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> ids,
                     ffi::Result<ffi::AnyBuffer> totals) {
  const Kernels* found = kernels();
  if (found == nullptr) return kCall.wrong("LLORCH_JAX_ISA", "an instruction set of this machine", "another");
  const auto dimensions = x.dimensions();
  if (dimensions.size() != 2 || dimensions[1] < 1) return kCall.wrong("x", "[B, V]", shape_of(x));
  Logits logits{};
  logits.rows = dimensions[0];
  logits.columns = dimensions[1];
  if (ffi::Error error = kCall.check("x", x, ffi::DataType::F32, "float32", {logits.rows, logits.columns}); error.failure()) return error;
  if (ffi::Error error = kCall.check("ids", *ids, ffi::DataType::S32, "int32", {logits.rows}); error.failure()) return error;
  if (ffi::Error error = kCall.check("totals", *totals, ffi::DataType::F32, "float32", {logits.rows}); error.failure()) return error;
  logits.x = x.typed_data<float>();
  logits.ids = ids->typed_data<int32_t>();
  logits.totals = totals->typed_data<float>();
  const Rows rows{found, logits};
  run_on(pool, logits.rows, 1 + x.size_bytes() / kBytesPerThread, &rows, summarize_row, [] {});
  return ffi::Error::Success();
}

}  // namespace llorch::logits

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(llorch_summarize, llorch::logits::summarize,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
#pragma GCC visibility pop
