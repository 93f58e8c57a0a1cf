// The kernels of diagonal_update. A thread block takes one block of a leaf (cuda/leaves.cuh) and leaves word of how it
// went; one thread block per batch member reads those words; and a last launch puts the old values back where a
// member's outcome is not finite, and ends at once everywhere else.
#pragma once

#include "common/diagonal.h"
#include "common/half.h"
#include "cuda/leaves.cuh"
#include "cuda/reduce.cuh"

namespace curvax {

// As many parameters as a 16-byte pack has wide entries.
template <typename P, typename T>
struct alignas(kPack<T> * sizeof(P)) Lanes {
  P lane[kPack<T>];
};

template <typename P, typename T>
__device__ __forceinline__ Lanes<P, T> LoadLanes(const P* from, int at, int n, bool aligned) {
  if (aligned && at + kPack<T> <= n) return *reinterpret_cast<const Lanes<P, T>*>(from + at);
  Lanes<P, T> lanes = {};
#pragma unroll
  for (int l = 0; l < kPack<T>; ++l)
    if (at + l < n) lanes.lane[l] = from[at + l];
  return lanes;
}

template <typename P, typename T>
__device__ __forceinline__ void StoreLanes(const Lanes<P, T>& lanes, P* to, int at, int n, bool aligned) {
  if (aligned && at + kPack<T> <= n) {
    *reinterpret_cast<Lanes<P, T>*>(to + at) = lanes;
    return;
  }
#pragma unroll
  for (int l = 0; l < kPack<T>; ++l)
    if (at + l < n) to[at + l] = lanes.lane[l];
}

// Scalar `index` of a vector of float64 or float32.
template <typename T>
__device__ __forceinline__ T ScalarAt(const void* scalars, bool is_double, int64_t index) {
  return is_double ? static_cast<T>(static_cast<const double*>(scalars)[index])
                   : static_cast<T>(static_cast<const float*>(scalars)[index]);
}

// What every leaf of a launch has in common.
struct UpdateLaunch {
  const void* scalars;
  const bool* sound;
  uint8_t* spoiled;  // per slot: whether the block's outcome is not finite
  bool is_double;    // the scalars
  bool decays;       // whether weight decay applies
  bool has_mean;
};

// The vectors of a diagonal_update table. Outputs may be their inputs; without a mean its pointers are null.
enum DiagonalVector { kParams, kParamsOut, kSaved, kAverage, kGradient, kMean, kMeanOut, kDiagonalVectors };

template <Denominator kind, bool has_mean, typename P, typename T, typename Table>
__device__ __forceinline__ T UpdateWork(const Table& table, const Work& work, const UpdateScalars<T>& scalars) {
  constexpr int kUnroll = 2;
  const P* params = Begin<P>(table, kParams, work);
  P* params_out = Begin<P>(table, kParamsOut, work);
  P* saved = Begin<P>(table, kSaved, work);
  const T* average = Begin<T>(table, kAverage, work);
  const T* gradient = Begin<T>(table, kGradient, work);
  const T* mean = has_mean ? Begin<T>(table, kMean, work) : average;
  T* mean_out = has_mean ? Begin<T>(table, kMeanOut, work) : nullptr;
  const bool aligned =
      Aligned(params, params_out, saved) && Aligned(average, gradient, mean) && (!has_mean || Aligned(mean_out));
  const int n = work.n;
  T spoiled = 0;
  ForEachPack<T, kUnroll>(n, [&](const int (&at)[kUnroll]) {
    Lanes<P, T> p[kUnroll];
    Pack<T> a[kUnroll], g[kUnroll], m[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      p[u] = LoadLanes<P, T>(params, at[u], n, aligned);
      a[u] = LoadPack(average, at[u], n, aligned);
      g[u] = LoadPack(gradient, at[u], n, aligned);
      if constexpr (has_mean) m[u] = LoadPack(mean, at[u], n, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      StoreLanes<P, T>(p[u], saved, at[u], n, aligned);
#pragma unroll
      for (int l = 0; l < kPack<T>; ++l) {
        T wide, none = 0;
        Widen(p[u].lane[l], wide);
        UpdateEntry<kind, has_mean>(scalars, g[u].lane[l], a[u].lane[l], m[u].lane[l], wide, none);
        Narrow(wide, p[u].lane[l]);
        Widen(p[u].lane[l], wide);
        // As stored; and past the end there is nothing to be spoiled.
        if (at[u] + l < n) spoiled += wide * T(0);
      }
      StoreLanes<P, T>(p[u], params_out, at[u], n, aligned);
      if constexpr (has_mean) StorePack(m[u], mean_out, at[u], n, aligned);
    }
  });
  return spoiled;
}

template <typename T>
__device__ __forceinline__ void CopyWork(const T* from, T* to, int n) {
  if (from == to) return;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) to[i] = from[i];
}

// Two thread blocks to a multiprocessor leave the 128 registers that the widest form takes; left to itself the compiler
// spills some for a third block.
template <Denominator kind, typename P, typename T, typename Table>
__global__ void __launch_bounds__(kThreads, 2)
    DiagonalUpdateKernel(const __grid_constant__ Table table, const UpdateLaunch launch) {
  const Work work = FindWork(table);
  if (!launch.sound[work.member]) {
    CopyWork(Begin<P>(table, kParams, work), Begin<P>(table, kParamsOut, work), work.n);
    if (launch.has_mean) CopyWork(Begin<T>(table, kMean, work), Begin<T>(table, kMeanOut, work), work.n);
    if (threadIdx.x == 0) launch.spoiled[work.slot] = 1;
    return;
  }
  UpdateScalars<T> scalars;
  T* target = &scalars.keep;
#pragma unroll
  for (int i = 0; i < kUpdateScalars; ++i)
    target[i] = ScalarAt<T>(launch.scalars, launch.is_double, work.member * kUpdateScalars + i);
  if (!launch.decays) scalars.decay = 0;
  const T spoiled = launch.has_mean ? UpdateWork<kind, true, P, T>(table, work, scalars)
                                    : UpdateWork<kind, false, P, T>(table, work, scalars);
  const double total = BlockSum<kThreads>(static_cast<double>(spoiled));
  if (threadIdx.x == 0) launch.spoiled[work.slot] = total == 0 ? 0 : 1;
}

// One thread block per batch member: finite unless unsound or one of its blocks is spoiled.
template <int kSize>
__global__ void __launch_bounds__(kSize)
    DiagonalJudgeKernel(const uint8_t* spoiled, int64_t blocks, const bool* sound, bool* finite) {
  const int64_t member = blockIdx.x;
  double sum = 0;
  for (int64_t block = static_cast<int64_t>(threadIdx.x); block < blocks; block += kSize)
    sum += spoiled[member * blocks + block];
  const double total = BlockSum<kSize>(sum);
  if (threadIdx.x == 0) finite[member] = sound[member] && total == 0;
}

// Vector kSavedFrom goes back into kRestored for the members that are not finite; `sound` may be null.
enum RestoreVector { kSavedFrom, kRestored, kRestoreVectors };

template <typename P, typename Table>
__global__ void __launch_bounds__(kThreads)
    DiagonalRestoreKernel(const __grid_constant__ Table table, const bool* finite, const bool* sound) {
  const Work work = FindWork(table);
  if (finite[work.member] || (sound != nullptr && !sound[work.member])) return;
  CopyWork(Begin<P>(table, kSavedFrom, work), Begin<P>(table, kRestored, work), work.n);
}

// The vectors of a diagonal_accumulate table; `b` is null where the estimate has one factor.
enum AccumulateVector { kOld, kNew, kCopy, kFirst, kSecond, kAccumulateVectors };

template <typename T>
__device__ __forceinline__ T EstimateOf(Estimate kind, const T& a, const T& b) {
  T estimate;
  if (kind == Estimate::kValue)
    EstimateEntry<Estimate::kValue>(a, b, estimate);
  else if (kind == Estimate::kSquare)
    EstimateEntry<Estimate::kSquare>(a, b, estimate);
  else if (kind == Estimate::kProduct)
    EstimateEntry<Estimate::kProduct>(a, b, estimate);
  else
    EstimateEntry<Estimate::kMagnitude>(a, b, estimate);
  return estimate;
}

// Writes the sum of |new average| of each block to `partial`.
template <bool root_mean_square, typename T, typename Table>
__global__ void __launch_bounds__(kThreads)
    DiagonalAccumulateKernel(const __grid_constant__ Table table, const void* scalars, bool is_double, Estimate kind,
                             double* partial) {
  constexpr int kUnroll = 2;
  const Work work = FindWork(table);
  const bool two = kind == Estimate::kProduct || kind == Estimate::kMagnitude;
  const T* average = Begin<T>(table, kOld, work);
  T* out = Begin<T>(table, kNew, work);
  T* saved = Begin<T>(table, kCopy, work);
  const T* a = Begin<T>(table, kFirst, work);
  const T* b = two ? Begin<T>(table, kSecond, work) : a;
  const bool aligned = Aligned(average, out, saved, a, b);
  const T keep = ScalarAt<T>(scalars, is_double, work.member * kAccumulateScalars);
  const T gain = ScalarAt<T>(scalars, is_double, work.member * kAccumulateScalars + 1);
  const int n = work.n;
  T total = 0;
  ForEachPack<T, kUnroll>(n, [&](const int (&at)[kUnroll]) {
    Pack<T> v[kUnroll], va[kUnroll], vb[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      v[u] = LoadPack(average, at[u], n, aligned);
      va[u] = LoadPack(a, at[u], n, aligned);
      vb[u] = two ? LoadPack(b, at[u], n, aligned) : va[u];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      StorePack(v[u], saved, at[u], n, aligned);
      // Past the end all are 0, and so is what is added.
#pragma unroll
      for (int l = 0; l < kPack<T>; ++l)
        MixEntry<root_mean_square>(keep, gain, EstimateOf(kind, va[u].lane[l], vb[u].lane[l]), v[u].lane[l], total);
      StorePack(v[u], out, at[u], n, aligned);
    }
  });
  const double sum = BlockSum<kThreads>(static_cast<double>(total));
  if (threadIdx.x == 0) partial[work.slot] = sum;
}

// One thread block per batch member: the mean magnitude, and whether it is finite.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    DiagonalScaleKernel(const double* partial, int64_t blocks, const T* scalars, T* scale, bool* finite) {
  const int64_t member = blockIdx.x;
  double sum = 0;
  for (int64_t block = static_cast<int64_t>(threadIdx.x); block < blocks; block += kThreads)
    sum += partial[member * blocks + block];
  const double total = BlockSum<kThreads>(sum);
  if (threadIdx.x != 0) return;
  const T mean = static_cast<T>(static_cast<double>(scalars[member * kAccumulateScalars + 2]) * total);
  scale[member] = mean;
  finite[member] = mean * T(0) == T(0);
}

}  // namespace curvax
