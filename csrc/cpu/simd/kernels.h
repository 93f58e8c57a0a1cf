// All vector code of the CPU handlers, behind function pointers: what one instruction set and one dtype have.
#pragma once

#include "cpu/simd/diagonal_kernels.h"
#include "cpu/simd/factorization_kernels.h"
#include "cpu/simd/panel_kernels.h"
#include "cpu/simd/system_kernels.h"
#include "cpu/simd/tree_cg_kernels.h"

namespace curvax {

template <typename T>
struct KernelSet {
  TreeCgKernels<T> tree_cg;
  DiagonalKernels<T> diagonal;
  SystemKernels<T> systems;
  PanelKernels<T> panels;
  FactorizationKernels<T> factorizations;
};

// The kernels for the instruction set of ChosenLevel(), which is asked once.
template <typename T>
const KernelSet<T>& Kernels();

// Those for one instruction set, to be called on processors that have it: cpu/simd/compile_kernels.h.
template <typename Isa, typename T>
const KernelSet<T>& KernelsCompiledFor();

}  // namespace curvax
