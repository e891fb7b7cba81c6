#define LLORCH_ISA avx2
#define LLORCH_BYTES 32
#include "attention.h"
#include "logits.h"
#include "norms.h"
#include "products.h"

namespace llorch {
extern const Kernels kAvx2{"avx2", avx2::prepare, avx2::multiply, avx2::attend, avx2::merge, avx2::normalize,
                               avx2::summarize, &kAvx2Many};
}  // namespace llorch
