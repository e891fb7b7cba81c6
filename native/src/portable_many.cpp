#define LLORCH_ISA portable
#define LLORCH_BYTES 16
#include "attention_panels.h"
#include "gemm.h"

namespace llorch {
extern const ManyKernels kPortableMany{portable::pack, portable::multiply_panels, portable::panel_tasks, portable::attend_panel};
}  // namespace llorch
