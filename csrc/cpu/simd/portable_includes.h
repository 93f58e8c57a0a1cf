// What the kernels use from elsewhere: included before the compiler is told an instruction set (compile_kernels.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "common/batched_cg.h"
#include "common/diagonal.h"
#include "common/vector.h"
#include "cpu/simd/instruction_set.h"
#include "cpu/simd/kernels.h"
