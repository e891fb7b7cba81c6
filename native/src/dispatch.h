// Which kernels this machine runs.
#pragma once

#include "kernels.h"

namespace llorch {

// The fastest kernels that the processor has the instructions for, or those that the environment variable
// LLORCH_JAX_ISA names; nullptr where it names none that this machine can run. Looked up once.
const Kernels* kernels();

}  // namespace llorch
