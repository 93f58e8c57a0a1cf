// The instruction sets that vector code is compiled for, and which of them this process uses.
//
// A kernel is a class template over a tag below and a dtype (cpu/simd/*_loops.h). One source file per tag compiles all
// of them (baseline.cc, avx2.cc, avx512f.cc). The tag is part of every symbol's name: the linker cannot take a function
// that was compiled for a wide instruction set for its namesake on a processor without it.
#pragma once

#include <string_view>

namespace curvax {

// What every processor of the architecture has: SSE2 on x86-64, NEON on ARM. 16 registers.
struct Baseline {
  static constexpr int kRegisterBytes = 16;
};

// With fused multiply-add. 16 registers.
struct Avx2 {
  static constexpr int kRegisterBytes = 32;
};

// 32 registers.
struct Avx512f {
  static constexpr int kRegisterBytes = 64;
};

// The same at run time, narrowest first.
enum class Level { kBaseline, kAvx2, kAvx512f };

// The widest one that this processor has and the environment variable CURVAX_SIMD, which names one, allows: so that all
// of them can be tested on one machine, and machines of a cluster made to round alike. Throws if it names none.
Level ChosenLevel();

// "baseline", "avx2" or "avx512f".
std::string_view SimdLevel();

}  // namespace curvax
