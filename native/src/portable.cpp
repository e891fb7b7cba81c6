#define LLORCH_ISA portable
#define LLORCH_BYTES 16
#include "attention.h"
#include "logits.h"
#include "norms.h"
#include "products.h"

namespace llorch {
extern const Kernels kPortable{"portable",
                               portable::prepare, portable::multiply, portable::attend, portable::merge, portable::normalize,
                               portable::summarize, &kPortableMany};
}  // namespace llorch
