// Layer norm as an XLA custom call.
#include "arguments.h"
#include "dispatch.h"

namespace llorch::norms {

constexpr size_t kBytesPerThread = 128 * 1024;  // less than this is done sooner than another thread wakes up
const Arguments kCall("llorch_layer_norm");

struct Blocks {
  const Kernels* kernels;
  Norm norm;
};

void normalize_block(const void* context, size_t block) {
  const Blocks& blocks = *static_cast<const Blocks*>(context);
  blocks.kernels->normalize(blocks.norm, block);
}

ffi::Error layer_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer bias,
                      ffi::Result<ffi::AnyBuffer> y, float epsilon) {
  const Kernels* found = kernels();
  if (found == nullptr) return kCall.wrong("LLORCH_JAX_ISA", "an instruction set of this machine", "another");
  const auto dimensions = x.dimensions();
  if (dimensions.size() != 2) return kCall.wrong("x", "[D, M]", shape_of(x));
  Norm norm{};
  norm.depth = dimensions[0];
  norm.columns = dimensions[1];
  norm.epsilon = epsilon;
  if (ffi::Error error = kCall.check("x", x, ffi::DataType::F32, "float32", {norm.depth, norm.columns}); error.failure()) return error;
  if (ffi::Error error = kCall.check("weight", weight, ffi::DataType::F32, "float32", {norm.depth}); error.failure()) return error;
  if (ffi::Error error = kCall.check("bias", bias, ffi::DataType::F32, "float32", {norm.depth}); error.failure()) return error;
  if (ffi::Error error = kCall.check("y", *y, ffi::DataType::F32, "float32", {norm.depth, norm.columns}); error.failure()) return error;
  norm.x = x.typed_data<float>();
  norm.weight = weight.typed_data<float>();
  norm.bias = bias.typed_data<float>();
  norm.y = y->typed_data<float>();
  const size_t blocks = (norm.columns + kNormColumns - 1) / kNormColumns;
  const Blocks all{found, norm};
  if (norm.depth > 0) run_on(pool, blocks, 1 + x.size_bytes() / kBytesPerThread, &all, normalize_block, [] {});
  return ffi::Error::Success();
}

}  // namespace llorch::norms

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(llorch_layer_norm, llorch::norms::layer_norm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("epsilon"));
#pragma GCC visibility pop
