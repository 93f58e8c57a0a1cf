// The kernels of cpu/simd/tree_cg_kernels.h: whole vectors, then what is left, entry by entry.
#pragma once

#include <cstdint>

#include "common/vector.h"
#include "cpu/simd/tree_cg_kernels.h"
#include "cpu/simd/vectors.h"

namespace curvax {

template <typename Isa, typename T>
struct TreeCgLoops : WideVectors<Isa, T> {
  using Base = WideVectors<Isa, T>;
  using Base::kWidth;
  using Base::Load;
  using Base::Store;
  using typename Base::V;

  // Four independent accumulators hide the latency of a fused multiply-add.
  static constexpr int kAccumulators = 4;

  // Adds the lanes of the accumulators and a scalar remainder, pairwise and in double.
  static CURVAX_INLINE double Collect(const V* accumulators, double rest) {
    double sums[kAccumulators * kWidth];
    for (int a = 0; a < kAccumulators; ++a)
      for (int64_t l = 0; l < kWidth; ++l) sums[a * kWidth + l] = static_cast<double>(accumulators[a][l]);
    for (int64_t half = kAccumulators * kWidth / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
    return sums[0] + rest;
  }

  static double Update(T alpha, T lam, const T* x, const T* p, const T* r, const T* q, T* xo, T* ro, int64_t n) {
    V plus = V{} + alpha;
    V minus = V{} - alpha;
    const T both = -alpha * lam;
    V damp = V{} + both;
    V sums[kAccumulators] = {};
    int64_t i = 0;
    for (; i + kAccumulators * kWidth <= n; i += kAccumulators * kWidth) {
      for (int a = 0; a < kAccumulators; ++a) {
        const int64_t at = i + a * kWidth;
        V vx, vp, vr, vq;
        Load(x + at, vx);
        Load(p + at, vp);
        Load(r + at, vr);
        Load(q + at, vq);
        AddScaled(plus, vp, vx);
        AddScaled(minus, vq, vr);
        AddScaled(damp, vp, vr);
        Store(vx, xo + at);
        Store(vr, ro + at);
        AddProduct(vr, vr, sums[a]);
      }
    }
    double rest = 0;
    for (; i < n; ++i) {
      T ex = x[i], er = r[i];
      AddScaled(alpha, p[i], ex);
      AddScaled(static_cast<T>(-alpha), q[i], er);
      AddScaled(both, p[i], er);
      xo[i] = ex;
      ro[i] = er;
      rest += static_cast<double>(er) * static_cast<double>(er);
    }
    return Collect(sums, rest);
  }

  static void Direction(T beta, const T* z, const T* p, T* po, int64_t n) {
    const V scale = V{} + beta;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      V vz, vp;
      Load(z + i, vz);
      Load(p + i, vp);
      AddScaled(scale, vp, vz);
      Store(vz, po + i);
    }
    for (; i < n; ++i) {
      T e = z[i];
      AddScaled(beta, p[i], e);
      po[i] = e;
    }
  }

  static double Dot(const T* a, const T* b, int64_t n) {
    V sums[kAccumulators] = {};
    int64_t i = 0;
    for (; i + kAccumulators * kWidth <= n; i += kAccumulators * kWidth) {
      for (int k = 0; k < kAccumulators; ++k) {
        V va, vb;
        Load(a + i + k * kWidth, va);
        Load(b + i + k * kWidth, vb);
        AddProduct(va, vb, sums[k]);
      }
    }
    double rest = 0;
    for (; i < n; ++i) rest += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return Collect(sums, rest);
  }

  static void Gram(const T* a, const T* b, int64_t n, double* products) {
    V ab[kAccumulators] = {}, aa[kAccumulators] = {}, bb[kAccumulators] = {};
    int64_t i = 0;
    for (; i + kAccumulators * kWidth <= n; i += kAccumulators * kWidth) {
      for (int k = 0; k < kAccumulators; ++k) {
        V va, vb;
        Load(a + i + k * kWidth, va);
        Load(b + i + k * kWidth, vb);
        AddProduct(va, vb, ab[k]);
        AddProduct(va, va, aa[k]);
        AddProduct(vb, vb, bb[k]);
      }
    }
    double rest[3] = {0, 0, 0};
    for (; i < n; ++i) {
      const double da = static_cast<double>(a[i]), db = static_cast<double>(b[i]);
      rest[0] += da * db;
      rest[1] += da * da;
      rest[2] += db * db;
    }
    products[0] = Collect(ab, rest[0]);
    products[1] = Collect(aa, rest[1]);
    products[2] = Collect(bb, rest[2]);
  }

  static constexpr TreeCgKernels<T> kKernels = {Update, Direction, Dot, Gram};
};

}  // namespace curvax
