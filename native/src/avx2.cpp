#define LLORCH_ISA avx2
#define LLORCH_BYTES 32
#include "products.h"

namespace llorch {
extern const Kernels kAvx2{"avx2", avx2::prepare, avx2::multiply};
}  // namespace llorch
