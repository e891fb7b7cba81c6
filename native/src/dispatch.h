// Chooses the kernels for this machine.
#pragma once

#include "kernels.h"

namespace llorch {

// The fastest kernels that the processor supports, or those that the environment variable LLORCH_JAX_ISA names; nullptr
// if it names none that this machine can run. Determined once.
const Kernels* kernels();

}  // namespace llorch
