#define LLORCH_ISA avx2
#define LLORCH_BYTES 32
#include "attention_panels.h"
#include "gemm.h"

namespace llorch {
extern const ManyKernels kAvx2Many{avx2::pack, avx2::multiply_panels, avx2::panel_tasks, avx2::attend_panel};
}  // namespace llorch
