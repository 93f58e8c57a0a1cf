// Host side of cuda/leaves.cuh: the leaves of a call, packed into as few tables as hold them.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "common/leaves.h"
#include "common/operands.h"
#include "cuda/leaves.cuh"

namespace curvax {

// Kernel parameters end at 4 KB before CUDA 12.1 and at 32,764 bytes from it on; what is left out of a table's bytes is
// for the kernel's other parameters.
inline constexpr int kSmallTable = 4096 - 96;
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12010
inline constexpr int kLargeTable = 32764 - 96;
#else
inline constexpr int kLargeTable = kSmallTable;
#endif

// Fills a table with leaves from `leaf` on, as many as it holds, and returns the leaf after the last.
template <int kVectors, int kCapacity>
size_t FillTable(const Layout& layout, const Operand* const* vectors, size_t leaf,
                 LeafTable<kVectors, kCapacity>& table) {
  table.slot = layout.first_block[leaf];
  table.member_blocks = layout.blocks();
  for (; leaf < layout.sizes.size(); ++leaf) {
    if (layout.sizes[leaf] == 0) continue;
    const int64_t end = layout.first_block[leaf + 1] - table.slot;
    // Blocks are counted in 32 bits on the device.
    if (table.leaves == kCapacity || (table.leaves > 0 && end > std::numeric_limits<int32_t>::max())) break;
    for (int v = 0; v < kVectors; ++v) table.data[v][table.leaves] = vectors[v][leaf].data;
    table.size[table.leaves] = layout.sizes[leaf];
    table.first_block[table.leaves] = table.blocks;
    table.blocks = static_cast<int32_t>(end);
    ++table.leaves;
  }
  return leaf;
}

// Calls launch(table) -> ffi::Error for tables that hold all leaves of `vectors`, each an array of a leaf's operands:
// one table for up to 66 leaves of six vectors, and one more for each further 543.
template <int kVectors, typename Body>
ffi::Error ForEachTable(const Layout& layout, const std::array<const Operand*, kVectors>& vectors, const Body& launch) {
  using Small = LeafTable<kVectors, Capacity<kVectors>(kSmallTable)>;
  using Large = LeafTable<kVectors, Capacity<kVectors>(kLargeTable)>;
  static_assert(sizeof(Small) <= kSmallTable && sizeof(Large) <= kLargeTable);
  const auto put = [&](auto table, size_t& leaf) {
    leaf = FillTable(layout, vectors.data(), leaf, table);
    return table.leaves == 0 ? ffi::Error::Success() : launch(table);
  };
  for (size_t leaf = 0; leaf < layout.sizes.size();) {
    const bool few = layout.sizes.size() - leaf <= static_cast<size_t>(Capacity<kVectors>(kSmallTable));
    if (auto error = few ? put(Small{}, leaf) : put(Large{}, leaf); error.failure()) return error;
  }
  return ffi::Error::Success();
}

}  // namespace curvax
