// The kernels of cpu/simd/diagonal_kernels.h: common/diagonal.h on whole vectors, then on what is left, entry by entry.
#pragma once

#include <cstdint>

#include "common/diagonal.h"
#include "cpu/simd/diagonal_kernels.h"
#include "cpu/simd/vectors.h"

namespace curvax {

template <typename Isa, typename T>
struct DiagonalLoops : WideVectors<Isa, T> {
  using Base = WideVectors<Isa, T>;
  using Base::kWidth;
  using Base::Load;
  using Base::Store;
  using typename Base::V;

  static CURVAX_INLINE void Spread(const UpdateScalars<T>& from, UpdateScalars<V>& to) {
    const T* scalars = &from.keep;
    V* vectors = &to.keep;
    for (int i = 0; i < kUpdateScalars; ++i) vectors[i] = V{} + scalars[i];
  }

  template <Denominator kind, bool has_mean>
  static bool Update(const UpdateScalars<T>& scalars, const UpdateBlock<T>& b, int64_t n) {
    UpdateScalars<V> spread;
    Spread(scalars, spread);
    V spoiled = {};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      V g, average, m = {}, p;
      Load(b.gradient + i, g);
      Load(b.average + i, average);
      if constexpr (has_mean) Load(b.mean + i, m);
      Load(b.params + i, p);
      if (b.saved != nullptr) Store(p, b.saved + i);
      UpdateEntry<kind, has_mean>(spread, g, average, m, p, spoiled);
      if constexpr (has_mean) Store(m, b.mean_out + i);
      Store(p, b.params_out + i);
    }
    T rest = 0;
    for (; i < n; ++i) {
      T m = has_mean ? b.mean[i] : T(0), p = b.params[i];
      if (b.saved != nullptr) b.saved[i] = p;
      UpdateEntry<kind, has_mean>(scalars, b.gradient[i], b.average[i], m, p, rest);
      if constexpr (has_mean) b.mean_out[i] = m;
      b.params_out[i] = p;
    }
    for (int64_t lane = 0; lane < kWidth; ++lane) rest += spoiled[lane];
    return rest == 0;
  }

  template <Estimate kind>
  static void Form(const T* a, const T* b, T* estimate, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      V va, vb, ve;
      Load(a + i, va);
      Load(b + i, vb);
      EstimateEntry<kind>(va, vb, ve);
      Store(ve, estimate + i);
    }
    for (; i < n; ++i) EstimateEntry<kind>(a[i], b[i], estimate[i]);
  }

  template <bool root_mean_square>
  static double Mix(T keep, T gain, const T* estimate, const T* average, T* out, T* saved, int64_t n) {
    const V vkeep = V{} + keep, vgain = V{} + gain;
    V total = {};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      V ve, va;
      Load(estimate + i, ve);
      Load(average + i, va);
      if (saved != nullptr) Store(va, saved + i);
      MixEntry<root_mean_square>(vkeep, vgain, ve, va, total);
      Store(va, out + i);
    }
    double sum = 0;
    for (; i < n; ++i) {
      T a = average[i], magnitude = 0;
      if (saved != nullptr) saved[i] = a;
      MixEntry<root_mean_square>(keep, gain, estimate[i], a, magnitude);
      out[i] = a;
      sum += static_cast<double>(magnitude);
    }
    for (int64_t lane = 0; lane < kWidth; ++lane) sum += static_cast<double>(total[lane]);
    return sum;
  }

  static constexpr DiagonalKernels<T> kKernels = {
      {
          {Update<Denominator::kFloor, false>, Update<Denominator::kFloor, true>},
          {Update<Denominator::kLinear, false>, Update<Denominator::kLinear, true>},
          {Update<Denominator::kRoot, false>, Update<Denominator::kRoot, true>},
          {Update<Denominator::kPower, false>, Update<Denominator::kPower, true>},
          {Update<Denominator::kDamped, false>, Update<Denominator::kDamped, true>},
      },
      {Form<Estimate::kValue>, Form<Estimate::kSquare>, Form<Estimate::kProduct>, Form<Estimate::kMagnitude>},
      {Mix<false>, Mix<true>},
  };
};

}  // namespace curvax
