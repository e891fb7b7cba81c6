#define LLORCH_ISA avx512
#define LLORCH_BYTES 64
#include "attention_panels.h"
#include "gemm.h"

namespace llorch {
extern const ManyKernels kAvx512Many{avx512::pack, avx512::multiply_panels, avx512::panel_tasks, avx512::attend_panel};
}  // namespace llorch
