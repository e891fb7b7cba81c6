#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace llorch {
namespace {

#if defined(LLORCH_AVX2) || defined(LLORCH_AVX512)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#if defined(LLORCH_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

const Kernels* find() {
  const char* wanted = std::getenv("LLORCH_JAX_ISA");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
  const auto fits = [&](const Kernels& kernels) {
    return wanted == nullptr || std::strcmp(wanted, kernels.name) == 0;
  };
#if defined(LLORCH_AVX2) || defined(LLORCH_AVX512)
  __builtin_cpu_init();
#endif
#if defined(LLORCH_AVX512)
  if (fits(kAvx512) && has_avx512()) return &kAvx512;
#endif
#if defined(LLORCH_AVX2)
  if (fits(kAvx2) && has_avx2()) return &kAvx2;
#endif
  return fits(kPortable) ? &kPortable : nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const found = find();
  return found;
}

}  // namespace llorch

// For Python: the instruction set in use, or nullptr.
extern "C" __attribute__((visibility("default"))) const char* llorch_isa() {
  const llorch::Kernels* kernels = llorch::kernels();
  return kernels == nullptr ? nullptr : kernels->name;
}

// For Python: the number in library.py at the time when this was built.
extern "C" __attribute__((visibility("default"))) int llorch_interface() { return 5; }
