// Sums whose value depends on the terms and their number alone: no floating-point atomics, one fixed order.
//
// An op that sums over all leaves takes two launches: its own kernel leaves one term per block in a scratch result that
// XLA allocates, and SumRows adds the terms up. (To leave that to an XLA reduction costs more: for the two inner
// products of a CG iteration XLA 0.11 launches a kernel each and one more for the scalar arithmetic. To let the last
// block to finish do it needs a counter set to zero first, which is a launch as well.)
//
//   elements of a block      thread 0    thread 1   ...  thread 255      in the dtype, at most 16 products each
//   BlockSums                   warp 0 ..... warp 7                      halves by shuffles, then across warps, in
//   double `partial`, one per block   [ . . . . . . . . ] SumRows                     one thread block per result and
//   member   in double
#pragma once

#include <cstdint>

namespace curvax {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the lanes of a full warp, in every lane: a tree of five additions.
__device__ __forceinline__ double WarpSum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance, kWarp);
  return value;
}

// The sums of kSums values over the kThreads threads of a block, in thread 0. Every thread of the block calls it; a
// second call in one kernel needs a __syncthreads() in between.
template <int kThreads, int kSums>
__device__ __forceinline__ void BlockSums(double (&values)[kSums]) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0);
  __shared__ double of_warp[kSums][kWarps];
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    values[s] = WarpSum(values[s]);
    if (thread % kWarp == 0) of_warp[s][thread / kWarp] = values[s];
  }
  __syncthreads();
  if (thread != 0) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2)
#pragma unroll
      for (int w = 0; w < half; ++w) of_warp[s][w] += of_warp[s][w + half];
    values[s] = of_warp[s][0];
  }
}

template <int kThreads>
__device__ __forceinline__ double BlockSum(double value) {
  double values[1] = {value};
  BlockSums<kThreads>(values);
  return values[0];
}

// Where the sums of an op go: result k holds one number per batch member.
template <typename T, int kResults>
struct Sums {
  T* result[kResults];
};

// Threads of the last stage, and terms that each of them has in flight: 4096 terms, of 16 million elements, in one go.
inline constexpr int kSumThreads = 512;
inline constexpr int kSumUnroll = 8;

// The last stage: row k * batch + member of `partial`, of `count` terms, is summed up for member `member` of result k.
// One thread block per row. In double whatever T is, so that nothing is lost to the number of blocks.
template <typename T, int kResults>
__global__ void __launch_bounds__(kSumThreads)
    SumRows(const double* partial, int64_t count, int batch, const __grid_constant__ Sums<T, kResults> sums) {
  const int row = static_cast<int>(blockIdx.x);
  const double* terms = partial + row * count;
  double running[kSumUnroll] = {};
  for (int64_t first = static_cast<int64_t>(threadIdx.x); first < count; first += kSumUnroll * kSumThreads) {
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const int64_t at = first + u * kSumThreads;
      if (at < count) running[u] += terms[at];
    }
  }
#pragma unroll
  for (int half = kSumUnroll / 2; half > 0; half /= 2)
#pragma unroll
    for (int u = 0; u < half; ++u) running[u] += running[u + half];
  const double sum = BlockSum<kSumThreads>(running[0]);
  if (threadIdx.x == 0) sums.result[row / batch][row % batch] = static_cast<T>(sum);
}

}  // namespace curvax
