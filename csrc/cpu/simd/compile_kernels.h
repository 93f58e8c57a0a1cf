// Compiles every kernel for one instruction set: baseline.cc, avx2.cc and avx512f.cc include this, no other file.
//
// They first include what is not theirs, so that it is compiled for any processor of the architecture, then tell the
// compiler the instruction set, then include this. So no compiler flag differs between files, and std::max in avx2.cc
// is the std::max of all files. tests/cpp/test_cpp.py disassembles all files to make sure.
#pragma once

#include "cpu/simd/conjugate_gradients.h"
#include "cpu/simd/conjugate_gradients_by_lane.h"
#include "cpu/simd/diagonal_loops.h"
#include "cpu/simd/factorization_loops.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/panel_products.h"
#include "cpu/simd/panel_triangles.h"
#include "cpu/simd/small_cholesky.h"
#include "cpu/simd/tree_cg_loops.h"

namespace curvax {

template <typename Isa, typename T>
const KernelSet<T>& KernelsCompiledFor() {
  static constexpr KernelSet<T> kernels = {
      TreeCgLoops<Isa, T>::kKernels,
      DiagonalLoops<Isa, T>::kKernels,
      {ConjugateGradients<Isa, T>::Solve, ConjugateGradientsByLane<Isa, T>::Solve, SmallCholesky<Isa, T>::Factorize,
       SmallCholesky<Isa, T>::Solve},
      PanelTriangles<Isa, T>::kKernels,
      FactorizationLoops<Isa, T>::kKernels,
  };
  return kernels;
}

}  // namespace curvax
