// Products as an XLA custom call.
#include "arguments.h"
#include "dispatch.h"

namespace llorch::products {

constexpr size_t kBlockBytes = 192 * 1024;  // of weights per block of rows, roughly
constexpr size_t kGemmBlock = 48;          // rows per block with many columns: whole tiles of any instruction set
constexpr size_t kMaxGroup = 1024;         // longer sums of products could overflow 32 bits
const Arguments kCall("llorch_matmul");

// Reads the format and the width of the weights, whose type must match the number of bits.
ffi::Error read_weights(const ffi::AnyBuffer& weights, int64_t bits, Product& product) {
  if (weights.dimensions().size() != 2) return kCall.wrong("weights", "[out, width]", shape_of(weights));
  product.weights = weights.untyped_data();
  product.rows = weights.dimensions()[0];
  product.width = weights.dimensions()[1];
  const ffi::DataType type = weights.element_type();
  if (bits == 8 && type == ffi::DataType::S8) {
    product.format = Format::kInt8;
  } else if (bits == 4 && type == ffi::DataType::U8) {
    product.format = Format::kInt4;
    product.width *= 2;
  } else if (bits == 32 && type == ffi::DataType::F32) {
    product.format = Format::kFloat32;
  } else if (bits == 16 && type == ffi::DataType::BF16) {
    product.format = Format::kBFloat16;
  } else if (bits == 16 && type == ffi::DataType::F16) {
    product.format = Format::kFloat16;
  } else {
    return kCall.wrong("weights", "float32, bfloat16, float16, int8 codes or uint8 pairs of codes", "another type of elements");
  }
  return ffi::Error::Success();
}

ffi::Error read_scales(const ffi::AnyBuffer& scales, int64_t group, Product& product) {
  product.scales = scales.untyped_data();
  product.group = group;
  if (product.format != Format::kInt8 && product.format != Format::kInt4) {
    return group == 0 ? ffi::Error::Success() : kCall.wrong("group", "0 for floating point", std::to_string(group));
  }
  if (group == 0 && product.format == Format::kInt8) {
    return kCall.check("scales", scales, ffi::DataType::F32, "float32", {product.rows, 1});
  }
  if (group < 32 || group > static_cast<int64_t>(kMaxGroup) || (group != 32 && group % 64 != 0)) {
    return kCall.wrong("group", "32, or a multiple of 64 up to 1024", std::to_string(group));
  }
  if (product.width % group != 0) {
    return kCall.wrong("weights", "a width in whole groups of " + std::to_string(group), std::to_string(product.width));
  }
  return kCall.check("scales", scales, ffi::DataType::F16, "float16", {product.rows, product.width / product.group});
}

ffi::Error read_x_bits(int64_t bits, Product& product) {
  product.x_bits = static_cast<int>(bits);
  if (bits == 16) return ffi::Error::Success();
  const bool whole_rows = product.format == Format::kInt8 && product.group == 0 && product.width <= kMaxExactWidth;
  if (bits == 8 && whole_rows) return ffi::Error::Success();
  return kCall.wrong("x_bits", "16, or 8 with int8 codes of up to " + std::to_string(kMaxExactWidth) +
                     " columns and no groups", std::to_string(bits));
}

ffi::Error read_columns(const ffi::AnyBuffer& x, Product& product) {
  const auto dimensions = x.dimensions();
  if (dimensions.size() != 2) return kCall.wrong("x", "[in, M]", shape_of(x));
  product.x = static_cast<const float*>(x.untyped_data());
  product.depth = dimensions[0];
  product.columns = dimensions[1];
  if (product.depth == 0 || product.depth > product.width) {
    return kCall.wrong("x", "1 to " + std::to_string(product.width) + " rows", shape_of(x));
  }
  const bool codes = product.format == Format::kInt8 || product.format == Format::kInt4;
  if (!codes && product.depth != product.width) {
    return kCall.wrong("x", std::to_string(product.width) + " rows", shape_of(x));
  }
  if (product.columns < 1) return kCall.wrong("x", "a column or more", shape_of(x));
  if (product.columns > kMaxColumns && product.format == Format::kFloat32) {
    return kCall.wrong("x", "up to " + std::to_string(kMaxColumns) + " columns for float32", shape_of(x));
  }
  return kCall.check("x", x, ffi::DataType::F32, "float32", {product.depth, product.columns});
}

struct Rows {
  const Kernels* kernels;
  Product product;
  size_t per_block;
};

// Rows per block, for blocks of equal size whose number is a multiple of the threads. No result depends on the grouping.
size_t rows_per_block(size_t rows, size_t bytes, size_t threads) {
  const size_t per_thread = (bytes + threads * kBlockBytes - 1) / (threads * kBlockBytes);
  const size_t blocks = threads * per_thread;
  return (rows + blocks - 1) / blocks;
}

void multiply_block(const void* context, size_t block) {
  const Rows& rows = *static_cast<const Rows*>(context);
  const size_t first = block * rows.per_block;
  const size_t last = first + rows.per_block < rows.product.rows ? first + rows.per_block : rows.product.rows;
  const bool many = rows.product.columns > kMaxColumns;
  (many ? rows.kernels->many->multiply_panels : rows.kernels->multiply)(rows.product, first, last);
}

void pack_block(const void* context, size_t block) {
  const Rows& rows = *static_cast<const Rows*>(context);
  rows.kernels->many->pack(rows.product, block);
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer weights, ffi::AnyBuffer scales, ffi::AnyBuffer x,
                  ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace, int64_t bits, int64_t group,
                  int64_t x_bits) {
  const Kernels* found = kernels();
  if (found == nullptr) return kCall.wrong("LLORCH_JAX_ISA", "an instruction set of this machine", "another");
  Product product{};
  if (ffi::Error error = read_weights(weights, bits, product); error.failure()) return error;
  if (ffi::Error error = read_scales(scales, group, product); error.failure()) return error;
  if (ffi::Error error = read_x_bits(x_bits, product); error.failure()) return error;
  if (ffi::Error error = read_columns(x, product); error.failure()) return error;
  if (ffi::Error error = kCall.check("y", *y, ffi::DataType::F32, "float32", {product.rows, product.columns});
      error.failure()) {
    return error;
  }
  const size_t needed = workspace_bytes(product.width, product.columns);
  if (workspace->element_type() != ffi::DataType::U8 || workspace->size_bytes() < needed) {
    return kCall.wrong("workspace", std::to_string(needed) + " bytes", std::to_string(workspace->size_bytes()));
  }
  if (product.rows == 0) return ffi::Error::Success();
  product.y = static_cast<float*>(y->untyped_data());
  use_workspace(workspace->untyped_data(), product);
  const int64_t pool_threads = pool.num_threads();
  const size_t threads = pool_threads > 1 ? pool_threads : 1;
  const bool many = product.columns > kMaxColumns;
  const size_t per_block = many ? kGemmBlock : rows_per_block(product.rows, weights.size_bytes(), threads);
  const Rows rows{found, product, per_block};
  if (many) run_on(pool, packed_blocks(product.columns), threads, &rows, pack_block, [] {});
  run_on(pool, (product.rows + per_block - 1) / per_block, threads, &rows, multiply_block, [&] {
    if (!many) found->prepare(product);
  });
  return ffi::Error::Success();
}

}  // namespace llorch::products

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(llorch_matmul, llorch::products::matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("x_bits"));
#pragma GCC visibility pop
