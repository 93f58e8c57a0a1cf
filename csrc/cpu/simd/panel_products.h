// Products of panels (cpu/simd/panel_kernels.h has the drawing).
#pragma once

#include <cstdint>

#include "common/vector.h"
#include "cpu/simd/panel_kernels.h"
#include "cpu/simd/vectors.h"

namespace curvax {

template <typename Isa, typename T>
struct PanelProducts : RegisterVectors<Isa, T> {
  using Base = RegisterVectors<Isa, T>;
  using Base::kWidth;
  using Base::Load;
  using Base::Store;
  using typename Base::V;

  // kStrip * kVectors sums, the vectors of an entry of Y and a scalar of X fill the registers:
  //
  //                sums      vectors   scalar
  //   baseline     4 x 2        2         1      and one for a product: no fused multiply-add
  //   AVX2         4 x 3        3         1
  //   AVX-512      8 x 2        2         1      16 sums keep two units of a latency of 4 busy twice over
  static constexpr int kVectors = Isa::kRegisterBytes == 32 ? 3 : 2;
  static constexpr int kStrip = Isa::kRegisterBytes == 64 ? 8 : 4;
  // Systems of so many unknowns and more are factored by panels; measured with each set.
  static constexpr int64_t kLeastUnknowns = Isa::kRegisterBytes == 64 ? 256 : Isa::kRegisterBytes == 32 ? 48 : 128;
  static constexpr int64_t kPanel = kVectors * kWidth;

  // A scalar less zero is that scalar in every lane, and the compiler knows it; plus zero would be an addition.
  static CURVAX_INLINE void Sums(const T* left, const T* right, int64_t depth, V (&sums)[kStrip][kVectors]) {
#pragma GCC unroll 8
    for (int s = 0; s < kStrip; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[s][v] = V{};
    for (int64_t k = 0; k < depth; ++k, left += kPanel, right += kPanel) {
      V of_right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Load(right + v * kWidth, of_right[v]);
#pragma GCC unroll 8
      for (int s = 0; s < kStrip; ++s) {
        const V scalar = left[s] - V{};
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) AddProduct(scalar, of_right[v], sums[s][v]);
      }
    }
  }

  static void Multiply(const T* left, const T* right, int64_t depth, T* sums) {
    V part[kStrip][kVectors];
    Sums(left, right, depth < kDepth ? depth : kDepth, part);
#pragma GCC unroll 8
    for (int s = 0; s < kStrip; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Store(part[s][v], sums + s * kPanel + v * kWidth);
    for (int64_t k = kDepth; k < depth; k += kDepth) {
      Sums(left + k * kPanel, right + k * kPanel, depth - k < kDepth ? depth - k : kDepth, part);
      for (int s = 0; s < kStrip; ++s)
        for (int v = 0; v < kVectors; ++v) {
          T* at = sums + s * kPanel + v * kWidth;
          V before;
          Load(at, before);
          before += part[s][v];
          Store(before, at);
        }
    }
  }

  // The same for what does not fill whole registers, or takes several sums.
  static void AccumulatePart(const T* left, const T* right, int64_t depth, const T* const* scales, const T* from, T* to,
                             int64_t stride, int64_t rows, int64_t width) {
    T sums[kStrip * kPanel];
    Multiply(left, right, depth, sums);
    for (int64_t s = 0; s < rows; ++s)
      for (int64_t j = 0; j < width; ++j) {
        const T product = sums[s * kPanel + j], scaled = scales != nullptr ? product * scales[s][j] : product;
        to[s * stride + j] = (from != nullptr ? from[s * stride + j] : T(0)) + scaled;
      }
  }

  static void Accumulate(const T* left, const T* right, int64_t depth, const T* const* scales, const T* from, T* to,
                         int64_t stride, int64_t rows, int64_t width) {
    if (rows < kStrip || width < kPanel || depth > kDepth)
      return AccumulatePart(left, right, depth, scales, from, to, stride, rows, width);
    V sums[kStrip][kVectors];
    Sums(left, right, depth, sums);
    if (scales != nullptr)
#pragma GCC unroll 8
      for (int s = 0; s < kStrip; ++s)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          V scale;
          Load(scales[s] + v * kWidth, scale);
          sums[s][v] = sums[s][v] * scale;
        }
    if (from != nullptr)
#pragma GCC unroll 8
      for (int s = 0; s < kStrip; ++s)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          V before;
          Load(from + s * stride + v * kWidth, before);
          sums[s][v] = before + sums[s][v];
        }
#pragma GCC unroll 8
    for (int s = 0; s < kStrip; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Store(sums[s][v], to + s * stride + v * kWidth);
  }
};

}  // namespace curvax
