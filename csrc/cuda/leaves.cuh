// All leaves of a pytree in one kernel launch. A table of the leaves' pointers and sizes travels as a kernel parameter,
// so a launch needs no copy to the device, no allocation and no synchronization, and a CUDA graph can record it.
//
// The work is cut into the blocks of common/leaves.h: one thread block takes one block of one leaf of one batch member.
// Three leaves of 10000, 3 and 4096 elements, two members:
//
//   leaf              0               1      2
//   member 0   [ 4096 | 4096 | 1808 ][ 3 ][ 4096 ]     blocks 0 to 4
//   member 1   [ 4096 | 4096 | 1808 ][ 3 ][ 4096 ]     blocks 5 to 9
//
//   a block    | thread 0 | thread 1 | ... | thread 255 | thread 0 | ...      packs of 16 bytes
//
// Which thread takes which elements depends on the sizes of the leaves alone, never on the device or on the alignment
// of the buffers, and so do the sums over a block.
#pragma once

#include <cstdint>

#include "common/leaves.h"

namespace curvax {

// Threads of every kernel that walks over leaves.
inline constexpr int kThreads = 256;

// The widest memory access of a thread is 16 bytes.
template <typename T>
inline constexpr int kPack = 16 / sizeof(T);

template <typename T>
struct alignas(16) Pack {
  T lane[kPack<T>];
};

// `kVectors` vectors over at most `kCapacity` leaves; leaves without elements are left out.
template <int kVectors, int kCapacity>
struct LeafTable {
  int64_t slot = 0;           // the number, among all blocks of a member, of this table's first block
  int64_t member_blocks = 0;  // blocks of a member in all tables of the call
  int32_t blocks = 0;         // blocks of a member in this table
  int32_t leaves = 0;
  void* data[kVectors][kCapacity];
  int64_t size[kCapacity];         // elements of a member's leaf
  int32_t first_block[kCapacity];  // of the leaf, in this table
};

// How many leaves a table of so many bytes holds.
template <int kVectors>
inline constexpr int Capacity(int bytes) {
  return (bytes - 24) / (kVectors * 8 + 12);
}

// What one thread block works on.
struct Work {
  int leaf;        // in the table
  int n;           // elements
  int64_t member;  // of the batch
  int64_t offset;  // of the first element, from the start of the leaf's buffer
  int64_t slot;    // of the block, among those of all members: where its partial sum belongs
};

template <typename Table>
__device__ __forceinline__ Work FindWork(const Table& table) {
  const int member = static_cast<int>(blockIdx.x) / table.blocks;
  const int block = static_cast<int>(blockIdx.x) % table.blocks;
  // The last leaf whose first block is not past `block`.
  int leaf = 0;
  for (int end = table.leaves; end - leaf > 1;) {
    const int middle = (leaf + end) / 2;
    if (table.first_block[middle] <= block)
      leaf = middle;
    else
      end = middle;
  }
  const int64_t start = (block - table.first_block[leaf]) * kBlock;
  const int64_t rest = table.size[leaf] - start;
  return {leaf, static_cast<int>(rest < kBlock ? rest : kBlock), member, member * table.size[leaf] + start,
          member * table.member_blocks + table.slot + block};
}

// The first element of vector `vector` in this thread block's work.
template <typename T, typename Table>
__device__ __forceinline__ T* Begin(const Table& table, int vector, const Work& work) {
  return static_cast<T*>(table.data[vector][work.leaf]) + work.offset;
}

// Whether all of these may be read and written 16 bytes at a time.
template <typename... T>
__device__ __forceinline__ bool Aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// Elements [at, at + kPack) of n; those past the end are 0.
template <typename T>
__device__ __forceinline__ Pack<T> LoadPack(const T* from, int at, int n, bool aligned) {
  if (aligned && at + kPack<T> <= n) return *reinterpret_cast<const Pack<T>*>(from + at);
  Pack<T> pack;
#pragma unroll
  for (int l = 0; l < kPack<T>; ++l) pack.lane[l] = at + l < n ? from[at + l] : T(0);
  return pack;
}

// Writes those elements of [at, at + kPack) that are below n.
template <typename T>
__device__ __forceinline__ void StorePack(const Pack<T>& pack, T* to, int at, int n, bool aligned) {
  if (aligned && at + kPack<T> <= n) {
    *reinterpret_cast<Pack<T>*>(to + at) = pack;
    return;
  }
#pragma unroll
  for (int l = 0; l < kPack<T>; ++l)
    if (at + l < n) to[at + l] = pack.lane[l];
}

// Calls body(positions) for the packs of this thread, `kUnroll` at a time: the loads of all of them can then be in
// flight before the first result is stored. Positions past n occur: LoadPack gives zeros there, StorePack does nothing.
template <typename T, int kUnroll, typename Body>
__device__ __forceinline__ void ForEachPack(int n, const Body& body) {
  constexpr int kStep = kThreads * kPack<T>;
  for (int at = static_cast<int>(threadIdx.x) * kPack<T>; at < n; at += kUnroll * kStep) {
    int positions[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) positions[u] = at + u * kStep;
    body(positions);
  }
}

}  // namespace curvax
