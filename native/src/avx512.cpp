#define LLORCH_ISA avx512
#define LLORCH_BYTES 64
#include "attention.h"
#include "logits.h"
#include "norms.h"
#include "products.h"

namespace llorch {
extern const Kernels kAvx512{"avx512",
                               avx512::prepare, avx512::multiply, avx512::attend, avx512::merge, avx512::normalize,
                               avx512::summarize, &kAvx512Many};
}  // namespace llorch
