// Work shared with XLA's own thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace curvax {

// Calls body(k) once for each k in [0, count), on the calling thread and up to `threads - 1` threads of the pool.
//
// The caller works too and waits only for pieces that another thread has begun. It never waits for a task that is still
// in the queue: the handler itself may hold a thread of this pool, and with every thread in a handler nobody would run
// the queue. A task that starts late finds nothing left and touches only the shared counters.
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t threads, int64_t count, const Body& body) {
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (int64_t k = 0; k < count; ++k) body(k);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto shared = std::make_shared<Shared>();
  const Body* work = &body;
  auto run = [shared, work, count] {
    for (int64_t k = shared->next.fetch_add(1); k < count; k = shared->next.fetch_add(1)) {
      (*work)(k);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t t = 1; t < threads; ++t) pool.Schedule(decltype(run)(run));
  run();
  while (shared->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace curvax
