#define LLORCH_ISA portable
#define LLORCH_BYTES 16
#include "attention.h"
#include "gemm.h"

namespace llorch {
extern const Kernels kPortable{"portable",        portable::prepare, portable::multiply, portable::pack,
                            portable::multiply_panels, portable::attend, portable::merge};
}  // namespace llorch
