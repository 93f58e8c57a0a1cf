// The vector work of the diagonal methods (Sophia, AdaHessian), on one block of a leaf.
#pragma once

#include <cstdint>

#include "common/diagonal.h"

namespace curvax {

// Where one block of an update lies. The outputs may be the inputs; `mean` and `mean_out` are null without a mean.
template <typename T>
struct UpdateBlock {
  const T* gradient;
  const T* average;
  const T* mean;
  T* mean_out;
  const T* params;
  T* params_out;
  T* saved;  // takes the old parameters; null to keep none
};

template <typename T>
struct DiagonalKernels {
  // By denominator, without and with a mean. Returns whether all new parameters are finite.
  bool (*update[kDenominators][2])(const UpdateScalars<T>& scalars, const UpdateBlock<T>& block, int64_t n);
  // By estimate: estimate = f(a, b).
  void (*form[kEstimates])(const T* a, const T* b, T* estimate, int64_t n);
  // The mean, or the root mean square: out = mix(average, estimate), saved = average unless null; returns the sum of
  // |out|.
  double (*mix[2])(T keep, T gain, const T* estimate, const T* average, T* out, T* saved, int64_t n);
};

}  // namespace curvax
