// The kernels of the op family tree_cg. A thread block takes one block of a leaf (cuda/leaves.cuh); a sum comes out as
// one term per block (cuda/reduce.cuh).
#pragma once

#include "common/vector.h"
#include "cuda/leaves.cuh"
#include "cuda/reduce.cuh"

namespace curvax {

// The vectors of a cg_update table: xo = x + alpha p, ro = r - alpha (q + lam p). xo may be x, ro may be r.
enum UpdateVector { kX, kP, kR, kQ, kXo, kRo, kUpdateVectors };

// Writes <ro, ro> of each block to `partial`. A thread adds up at most kBlock / kThreads = 16 squares in the dtype
// itself; threads are added pairwise in double.
template <typename T, typename Table>
__global__ void __launch_bounds__(kThreads)
    CgUpdateKernel(const __grid_constant__ Table table, const T* alpha, const T* lam, double* partial) {
  constexpr int kUnroll = 2;
  const Work work = FindWork(table);
  const T* x = Begin<T>(table, kX, work);
  const T* p = Begin<T>(table, kP, work);
  const T* r = Begin<T>(table, kR, work);
  const T* q = Begin<T>(table, kQ, work);
  T* xo = Begin<T>(table, kXo, work);
  T* ro = Begin<T>(table, kRo, work);
  const bool aligned = Aligned(x, p, r, q, xo, ro);
  const int n = work.n;
  const T plus = alpha[work.member];
  const T minus = -plus;
  const T damp = minus * lam[work.member];
  T sum = 0;
  ForEachPack<T, kUnroll>(n, [&](const int (&at)[kUnroll]) {
    Pack<T> vx[kUnroll], vp[kUnroll], vr[kUnroll], vq[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      vx[u] = LoadPack(x, at[u], n, aligned);
      vp[u] = LoadPack(p, at[u], n, aligned);
      vr[u] = LoadPack(r, at[u], n, aligned);
      vq[u] = LoadPack(q, at[u], n, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int l = 0; l < kPack<T>; ++l) {
        AddScaled(plus, vp[u].lane[l], vx[u].lane[l]);
        AddScaled(minus, vq[u].lane[l], vr[u].lane[l]);
        AddScaled(damp, vp[u].lane[l], vr[u].lane[l]);
        // Past the end there are zeros, and 0 times an infinite alpha is no number.
        if (at[u] + l < n) AddProduct(vr[u].lane[l], vr[u].lane[l], sum);
      }
      StorePack(vx[u], xo, at[u], n, aligned);
      StorePack(vr[u], ro, at[u], n, aligned);
    }
  });
  const double total = BlockSum<kThreads>(static_cast<double>(sum));
  if (threadIdx.x == 0) partial[work.slot] = total;
}

// The vectors of a cg_direction table: po = z + beta p. po may be p.
enum DirectionVector { kDirectionZ, kDirectionP, kDirectionPo, kDirectionVectors };

template <typename T, typename Table>
__global__ void __launch_bounds__(kThreads) CgDirectionKernel(const __grid_constant__ Table table, const T* beta) {
  constexpr int kUnroll = 4;
  const Work work = FindWork(table);
  const T* z = Begin<T>(table, kDirectionZ, work);
  const T* p = Begin<T>(table, kDirectionP, work);
  T* po = Begin<T>(table, kDirectionPo, work);
  const bool aligned = Aligned(z, p, po);
  const int n = work.n;
  const T scale = beta[work.member];
  ForEachPack<T, kUnroll>(n, [&](const int (&at)[kUnroll]) {
    Pack<T> vz[kUnroll], vp[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      vz[u] = LoadPack(z, at[u], n, aligned);
      vp[u] = LoadPack(p, at[u], n, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int l = 0; l < kPack<T>; ++l) AddScaled(scale, vp[u].lane[l], vz[u].lane[l]);
      StorePack(vz[u], po, at[u], n, aligned);
    }
  });
}

// Vectors 2 k and 2 k + 1 of the table are the factors of pair k. A vector that stands in several pairs is read from
// memory once: its other loads follow at once and find it in the first-level cache. The terms of pair k begin at
// partial + k * stride.
template <typename T, int kPairs, typename Table>
__global__ void __launch_bounds__(kThreads)
    DotsKernel(const __grid_constant__ Table table, double* partial, int64_t stride) {
  constexpr int kUnroll = 2;
  const Work work = FindWork(table);
  const T* a[kPairs];
  const T* b[kPairs];
  bool aligned = true;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    a[k] = Begin<T>(table, 2 * k, work);
    b[k] = Begin<T>(table, 2 * k + 1, work);
    aligned = aligned && Aligned(a[k], b[k]);
  }
  const int n = work.n;
  T sums[kPairs] = {};
  ForEachPack<T, kUnroll>(n, [&](const int (&at)[kUnroll]) {
    Pack<T> va[kUnroll][kPairs], vb[kUnroll][kPairs];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        va[u][k] = LoadPack(a[k], at[u], n, aligned);
        vb[u][k] = LoadPack(b[k], at[u], n, aligned);
      }
    }
    // Past the end both factors are 0.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int k = 0; k < kPairs; ++k)
#pragma unroll
        for (int l = 0; l < kPack<T>; ++l) AddProduct(va[u][k].lane[l], vb[u][k].lane[l], sums[k]);
  });
  double totals[kPairs];
#pragma unroll
  for (int k = 0; k < kPairs; ++k) totals[k] = static_cast<double>(sums[k]);
  BlockSums<kThreads>(totals);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) partial[k * stride + work.slot] = totals[k];
}

// <a, b>, <a, a> and <b, b> of vectors 0 and 1 of the table, bit for bit as DotsKernel gives them, from one reading of
// both.
template <typename T, typename Table>
__global__ void __launch_bounds__(kThreads)
    GramKernel(const __grid_constant__ Table table, double* partial, int64_t stride) {
  constexpr int kUnroll = 2;
  const Work work = FindWork(table);
  const T* a = Begin<T>(table, 0, work);
  const T* b = Begin<T>(table, 1, work);
  const bool aligned = Aligned(a, b);
  const int n = work.n;
  T sums[3] = {};
  ForEachPack<T, kUnroll>(n, [&](const int (&at)[kUnroll]) {
    Pack<T> va[kUnroll], vb[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      va[u] = LoadPack(a, at[u], n, aligned);
      vb[u] = LoadPack(b, at[u], n, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int l = 0; l < kPack<T>; ++l) {
        AddProduct(va[u].lane[l], vb[u].lane[l], sums[0]);
        AddProduct(va[u].lane[l], va[u].lane[l], sums[1]);
        AddProduct(vb[u].lane[l], vb[u].lane[l], sums[2]);
      }
    }
  });
  double totals[3] = {static_cast<double>(sums[0]), static_cast<double>(sums[1]), static_cast<double>(sums[2])};
  BlockSums<kThreads>(totals);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < 3; ++k) partial[k * stride + work.slot] = totals[k];
}

}  // namespace curvax
