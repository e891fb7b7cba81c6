#define LLORCH_ISA avx512
#define LLORCH_BYTES 64
#include "attention.h"
#include "gemm.h"

namespace llorch {
extern const Kernels kAvx512{"avx512",        avx512::prepare, avx512::multiply, avx512::pack,
                            avx512::multiply_panels, avx512::attend, avx512::merge};
}  // namespace llorch
