// The threads that one factorization may use.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace curvax {

struct Workers {
  xla::ffi::ThreadPool& pool;
  int64_t threads;

  // body(k) once for each k in [0, count); returns when all are done.
  template <typename Body>
  void For(int64_t count, const Body& body) const {
    ParallelFor(pool, threads, count, body);
  }

  // The calling thread alone where `work` multiply-adds are not worth waking another.
  Workers Of(int64_t work) const { return {pool, work < kWork ? 1 : threads}; }

 private:
  static constexpr int64_t kWork = 1 << 20;
};

}  // namespace curvax
