// Checks of the buffers that XLA passes in, whose shapes Python has chosen. An error names the argument.
#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace llorch {

namespace ffi = xla::ffi;

inline std::string shape_of(const ffi::AnyBuffer& buffer) {
  std::ostringstream shape;
  shape << '[';
  for (size_t i = 0; i < buffer.dimensions().size(); ++i) shape << (i > 0 ? ", " : "") << buffer.dimensions()[i];
  shape << ']';
  return shape.str();
}

// Argument checks for one custom call, named in its errors.
class Arguments {
 public:
  explicit Arguments(const char* call) : call_(call) {}

  ffi::Error wrong(const std::string& name, const std::string& expected, const std::string& got) const {
    return ffi::Error::InvalidArgument(std::string(call_) + ": " + name + ": expected " + expected + ", got " + got);
  }

  ffi::Error check(const std::string& name, const ffi::AnyBuffer& buffer, ffi::DataType type, const char* type_name,
                   const std::vector<size_t>& shape) const {
    std::ostringstream expected;
    expected << type_name << " [";
    for (size_t i = 0; i < shape.size(); ++i) expected << (i > 0 ? ", " : "") << shape[i];
    expected << ']';
    if (buffer.element_type() != type) return wrong(name, expected.str(), "another type of elements");
    bool fits = buffer.dimensions().size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = buffer.dimensions()[i] == static_cast<int64_t>(shape[i]);
    return fits ? ffi::Error::Success() : wrong(name, expected.str(), shape_of(buffer));
  }

 private:
  const char* call_;
};

// Runs `first` on the calling thread, then blocks 0 .. count - 1 on the calling thread and on XLA's pool.
template <typename First>
void run_on(ffi::ThreadPool& pool, size_t count, size_t most_threads, const void* context, Loop::Block block, First first) {
  const int64_t pool_threads = pool.num_threads();
  size_t threads = pool_threads > 1 ? pool_threads : 1;
  if (threads > most_threads) threads = most_threads;
  if (threads > count) threads = count;
  Loop::run(count, threads - 1, context, block, first, [&](Loop* loop) { pool.Schedule([loop] { loop->help(); }); });
}

}  // namespace llorch
