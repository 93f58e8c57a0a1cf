// One block of a vector, in the widest instructions that this processor has.
#pragma once

#include <cstdint>
#include <string_view>

namespace curvax {

// Within a block (common/leaves.h) a lane of the accumulators adds up at most kBlock / kLanes = 64 (float) or 128
// (double) products in the dtype itself; lanes and blocks are added pairwise in double.
template <typename T>
struct BlockKernels {
  // xo = x + alpha p, ro = r - alpha (q + lam p); returns <ro, ro>. xo may be x, ro may be r.
  double (*update)(T alpha, T lam, const T* x, const T* p, const T* r, const T* q, T* xo, T* ro, int64_t n);
  // po = z + beta p. po may be p.
  void (*direction)(T beta, const T* z, const T* p, T* po, int64_t n);
  // <a, b>.
  double (*dot)(const T* a, const T* b, int64_t n);
  // <a, b>, <a, a> and <b, b> from one reading of both; each is bit for bit what `dot` gives.
  void (*gram)(const T* a, const T* b, int64_t n, double* products);
};

// The kernels for the chosen level.
template <typename T>
const BlockKernels<T>& Kernels();

// Instruction sets that code is compiled for, narrowest first.
enum class Level { kBaseline, kAvx2, kAvx512f };

// The widest one that this processor has and the environment variable CURVAX_SIMD, which names one, allows: so that all
// of them can be tested on one machine, and machines of a cluster made to round alike. Throws if it names none.
Level ChosenLevel();

// "baseline", "avx2" or "avx512f".
std::string_view SimdLevel();

}  // namespace curvax
