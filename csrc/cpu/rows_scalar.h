// The scalar row kernels, a part of scalar_kernels().
#pragma once

#include "cpu/kernels.h"

namespace wsync {

RowKernels scalar_bf16_rows();
RowKernels scalar_f32_rows();

}  // namespace wsync
