// Conjugate gradients on one system per thread block, with the matrix on the chip for the whole solve: read from memory
// once, in registers, and for the largest size in part in shared memory.
//
// kGroup neighboring threads own one unknown: each has kEntries = kUnknowns / kGroup entries of its column (the matrix
// is symmetric, and columns are read coalesced), and all of them have that unknown's entry of every vector. A product
// reads the direction from shared memory, kGroup x 4 neighboring entries at a time, which every group of a warp shares:
//
//            unknown 0       unknown 1       unknown 2          kGroup = 2
//   thread   0       1       2       3       4       5   ...
//   rows     0-3     4-7     0-3     4-7     0-3     4-7        of column 0, 0, 1, 1, 2, 2 of the matrix
//            8-11    12-15   8-11    12-15   ...
//            ...
//
// Of a thread's entries the first kRegisters are in registers, the last kShared in shared memory (CgShared).
//
// Three barriers per iteration: one for the direction, one for each of two groups of sums. The steps 1 to 5 are those
// of common/batched_cg.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/batch.h"
#include "common/batched_cg.h"
#include "cuda/reduce.cuh"
#include "cuda/shared.cuh"

namespace curvax {

// How a system of at most kUnknowns_ unknowns is spread over a block: kGroup_ threads for each of them, which have
// kShared_ of their entries in shared memory and the others in registers.
template <int kUnknowns_, int kGroup_, int kShared_>
struct Spread {
  static constexpr int kUnknowns = kUnknowns_;
  static constexpr int kGroup = kGroup_;
  static constexpr int kShared = kShared_;
  static constexpr int kThreads = kUnknowns * kGroup;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kEntries = kUnknowns / kGroup;
  static constexpr int kRegisters = kEntries - kShared;
  static_assert(kThreads % kWarp == 0 && kEntries % 4 == 0 && kShared % 4 == 0 && kShared < kEntries);
};

// A block's shared memory, in elements of T:
//
//   | direction: kUnknowns | partial 0: 4 kWarps | partial 1: 4 kWarps | entries: kShared x kThreads |
//
// Thread t has its entries at entries[k * kThreads + t]: neighboring threads meet no bank twice. The two groups of sums
// of an iteration alternate between the partial sums, so that neither waits for the other's readers.
template <typename T, typename Spread>
struct CgShared {
  T* direction;
  T* partial[2];
  T* entries;

  static constexpr int64_t kBytes =
      static_cast<int64_t>(sizeof(T)) * (Spread::kUnknowns + 8 * Spread::kWarps + Spread::kShared * Spread::kThreads);

  __device__ __forceinline__ explicit CgShared(char* bytes)
      : direction(reinterpret_cast<T*>(bytes)),
        partial{direction + Spread::kUnknowns, direction + Spread::kUnknowns + 4 * Spread::kWarps},
        entries(direction + Spread::kUnknowns + 8 * Spread::kWarps) {}
};

template <typename T>
struct CgArguments {
  const void* matrices;
  const T *rhs, *rtol, *start, *inverse;  // start and inverse may be null
  const int32_t* maxiter;
  Broadcast of_matrices, of_rhs, of_rtol, of_maxiter, of_start, of_inverse;
  T *value, *residual;
  int32_t *result, *iterations;
  int n;
};

template <typename T, typename Element>
__device__ __forceinline__ T Widened(Element element) {
  return static_cast<T>(element);
}

// A bfloat16, which is the upper half of a float.
template <>
__device__ __forceinline__ float Widened<float, uint16_t>(uint16_t element) {
  union {
    uint32_t bits;
    float value;
  } both;
  both.bits = static_cast<uint32_t>(element) << 16;
  return both.value;
}

struct Plus {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Larger {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Combines kValues values over the block, by halves, and gives every thread the same. `partial` holds kValues per warp;
// it may be used again after another barrier of the block.
template <int kWarps, int kValues, typename T, typename Combine>
__device__ __forceinline__ void Everywhere(T (&values)[kValues], T* partial, const Combine& combine) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      values[v] = combine(values[v], __shfl_xor_sync(kAllLanes, values[v], distance, kWarp));
    if (thread % kWarp == 0) partial[v * kWarps + thread / kWarp] = values[v];
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    // Every lane takes a warp's value, so that the halves again come by shuffles; kWarps is a power of two.
    T value = partial[v * kWarps + thread % kWarps];
#pragma unroll
    for (int distance = kWarps / 2; distance > 0; distance /= 2)
      value = combine(value, __shfl_xor_sync(kAllLanes, value, distance, kWarp));
    values[v] = value;
  }
}

// One thread's part of a column, and its product with a vector in shared memory.
template <typename T, typename Spread>
struct Column {
  T in_registers[Spread::kRegisters];
  T* in_shared;  // entry k at k * kThreads

  // The row of entry k: four neighbors, then those of the group's other threads.
  static __device__ __forceinline__ int Row(int k, int part) { return k / 4 * 4 * Spread::kGroup + part * 4 + k % 4; }

  template <typename Element>
  __device__ __forceinline__ void Read(const Element* matrix, int n, int column, int part, T* entries) {
    in_shared = entries + threadIdx.x;
    const auto entry = [&](int k) {
      const int row = Row(k, part);
      return column < n && row < n ? Widened<T, Element>(matrix[static_cast<int64_t>(row) * n + column]) : T(0);
    };
    // Few at a time: what is in flight takes registers too.
#pragma unroll 8
    for (int k = Spread::kRegisters; k < Spread::kEntries; ++k)
      in_shared[(k - Spread::kRegisters) * Spread::kThreads] = entry(k);
#pragma unroll
    for (int k = 0; k < Spread::kRegisters; ++k) in_registers[k] = entry(k);
  }

  // The column's inner product with v, in all threads of the group.
  __device__ __forceinline__ T Times(const T* v, int part) const {
    T sums[4] = {};
#pragma unroll
    for (int k = 0; k < Spread::kEntries; k += 4) {
      const T* four = v + Row(k, part);
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        const T entry = k < Spread::kRegisters ? in_registers[k < Spread::kRegisters ? k + l : 0]
                                               : in_shared[(k + l - Spread::kRegisters) * Spread::kThreads];
        AddProduct(entry, four[l], sums[l]);
      }
    }
    T sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
    for (int distance = Spread::kGroup / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, distance, kWarp);
    return sum;
  }
};

// Blocks that a multiprocessor is to hold at once: one waits for its barriers while another works.
template <typename T, typename Spread>
inline constexpr int kResidentBlocks = sizeof(T) == 4 && Spread::kUnknowns == 128 ? 2 : 1;

// Block b solves system b. The scalars of CgState are the same in every thread, and so is the way through the code.
template <typename T, typename Element, typename Spread>
__global__ void __launch_bounds__(Spread::kThreads, (kResidentBlocks<T, Spread>))
    BatchedCgKernel(const __grid_constant__ CgArguments<T> a) {
  const CgShared<T, Spread> shared(DynamicShared());
  const int thread = static_cast<int>(threadIdx.x);
  const int i = thread / Spread::kGroup, part = thread % Spread::kGroup, n = a.n;
  const int64_t system = blockIdx.x;
  const bool inside = i < n;
  // A group's unknown counts once.
  const bool counts = part == 0;
  Column<T, Spread> column;
  column.Read(static_cast<const Element*>(a.matrices) + a.of_matrices.At(system) * n * n, n, i, part, shared.entries);
  const T rtol = a.rtol[a.of_rtol.At(system)];
  const int maxiter = a.maxiter[a.of_maxiter.At(system)];
  const bool preconditioned = a.inverse != nullptr;
  const T inverse = preconditioned && inside ? a.inverse[a.of_inverse.At(system) * n + i] : T(1);

  // A v, through shared memory; the caller has passed a barrier since the last product.
  const auto times = [&](T v) {
    if (counts) shared.direction[i] = v;
    __syncthreads();
    return column.Times(shared.direction, part);
  };

  // The right-hand side at norm 1.
  T b = inside ? a.rhs[a.of_rhs.At(system) * n + i] : T(0);
  T one[1] = {b < 0 ? -b : b};
  Everywhere<Spread::kWarps>(one, shared.partial[0], Larger());
  const T largest_b = one[0];
  one[0] = b / (largest_b > 0 && IsFinite(largest_b) ? largest_b : T(1));
  one[0] = counts ? one[0] * one[0] : T(0);
  Everywhere<Spread::kWarps>(one, shared.partial[1], Plus());
  T size, unit;
  UnitScale<T>(largest_b, one[0], size, unit);
  b *= unit;

  T x = 0, r = b;
  bool cold = true;
  if (a.start != nullptr) {
    const T start = inside ? a.start[a.of_start.At(system) * n + i] * unit : T(0);
    const T rest = b - times(start);
    T products[2] = {counts ? start * b : T(0), counts ? start * rest : T(0)};
    Everywhere<Spread::kWarps>(products, shared.partial[0], Plus());
    cold = !StartIsGood<T>(products[0], products[1]);
    if (!cold) {
      x = start;
      r = rest;
    }
  }

  T p = inverse * r, y = 0;
  T sums[3] = {counts ? r * r : T(0), counts ? r * p : T(0), counts ? p * p : T(0)};
  Everywhere<Spread::kWarps>(sums, shared.partial[1], Plus());
  T rr = sums[0], rz = sums[1];
  CgState<T> state;
  Begin<T>(rr, rz, rtol, state);
  PowersOfTwo<T> powers;
  while (state.result == kRunning && state.count < maxiter) {
    // 1. q = A p, divided by the power of two that the first product tells.
    T q = times(p * powers.first);
    if (state.count == 0) {
      T largest[2] = {q < 0 ? -q : q, p < 0 ? -p : p};
      Everywhere<Spread::kWarps>(largest, shared.partial[1], Larger());
      powers = DivideBy<T>(largest[0], largest[1]);
      q *= powers.first;
    }
    q *= powers.second;
    // 2. alpha = r.z / p.q.
    T products[3] = {counts ? p * q : T(0), counts ? p * p : T(0), counts ? q * q : T(0)};
    Everywhere<Spread::kWarps>(products, shared.partial[0], Plus());
    const CgStep<T> step = Measure<T>(products[0], products[1], products[2], cold, state);
    // 3. y = y + alpha p, r = r - alpha q.
    if (step.moves) {
      AddScaled(step.alpha, p, y);
      AddScaled(-step.alpha, q, r);
    }
    // 4. z = inverse r, beta = r.z / (the old r.z).
    const T z = inverse * r;
    T rest[2] = {counts ? r * r : T(0), counts ? r * z : T(0)};
    Everywhere<Spread::kWarps>(rest, shared.partial[1], Plus());
    rr = rest[0];
    rz = rest[1];
    const T beta = Proceed<T>(step, rr, rz, rtol, state);
    // 5. p = z + beta p.
    p = z + beta * p;
  }

  x += y * powers.first * powers.second;
  one[0] = counts ? x * b : T(0);
  Everywhere<Spread::kWarps>(one, shared.partial[0], Plus());
  // On an indefinite system what is added to a start may point uphill: then a short step along b instead.
  if (one[0] < 0) x = b / (state.largest > 0 ? state.largest : T(1)) * powers.first * powers.second;
  const T last = b - times(x);
  one[0] = counts ? last * last : T(0);
  Everywhere<Spread::kWarps>(one, shared.partial[1], Plus());
  if (counts && inside) a.value[system * n + i] = x * size;
  if (thread == 0) {
    const T residual = size == 0 ? T(0) : static_cast<T>(std::sqrt(one[0]));
    a.result[system] = Outcome<T>(size, residual, rtol, state);
    a.iterations[system] = state.count;
    a.residual[system] = residual;
  }
}

}  // namespace curvax
