// Walks the blocks of all leaves on XLA's threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/leaves.h"
#include "cpu/parallel.h"

namespace curvax {

// Below this many bytes per call one thread is faster than waking another.
inline constexpr int64_t kThreadingBytes = 2 << 20;
// A thread takes runs of neighboring blocks: this many runs per thread balance the load, and long runs suit the
// prefetcher.
inline constexpr int64_t kRunsPerThread = 8;

// Calls body(member, leaf, offset, n, slot) for every block of every leaf of every batch member; `offset` counts from
// the start of the leaf's buffer, `slot` numbers the blocks. Which thread runs a block has no influence on its result.
template <typename Body>
void ForEachBlock(ffi::ThreadPool& pool, const Layout& layout, int64_t bytes_per_element, int64_t threads,
                  const Body& body) {
  const int64_t blocks = layout.blocks();
  const int64_t total = blocks * layout.batch;
  if (threads <= 0)
    threads = layout.elements * layout.batch * bytes_per_element < kThreadingBytes
                  ? 1
                  : std::max<int64_t>(1, pool.num_threads());
  const int64_t run = std::max<int64_t>(1, total / (threads * kRunsPerThread));
  ParallelFor(pool, threads, (total + run - 1) / run, [&](int64_t piece) {
    const int64_t end = std::min(total, (piece + 1) * run);
    for (int64_t slot = piece * run; slot < end; ++slot) {
      const int64_t member = slot / blocks;
      const int64_t block = slot % blocks;
      const auto& first = layout.first_block;
      const int64_t leaf = std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1;
      const int64_t start = (block - first[leaf]) * kBlock;
      const int64_t n = std::min(kBlock, layout.sizes[leaf] - start);
      body(member, leaf, member * layout.sizes[leaf] + start, n, slot);
    }
  });
}

}  // namespace curvax
