// XLA FFI handlers of batched_cg and batched_cholesky_solve: systems in parallel, each on one thread and in its cache.
// The contract of each is in kernels/batched_cg/native.py and kernels/batched_cholesky_solve/native.py.

#include "cpu/batched_handlers.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/batched_cg.h"
#include "common/batched_operands.h"
#include "cpu/large_cholesky.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

// Below this many multiply-adds in a call one thread is faster than waking another.
constexpr int64_t kThreadingWork = 1 << 19;
// Iterations that the estimate of a CG call's work counts with.
constexpr int64_t kUsualIterations = 20;
// A thread takes runs of neighboring systems: this many runs per thread balance systems of unlike length.
constexpr int64_t kRunsPerThread = 16;

// Two matrices of at most this size are worked on in turn: together they stay in the first-level cache.
constexpr int64_t kPairedBytes = 20 << 10;

// Calls body(begin, end) for runs of systems that together are all of them.
template <typename Body>
void ForEachRun(ffi::ThreadPool& pool, int64_t threads, int64_t systems, int64_t work, const Body& body) {
  if (threads <= 0) threads = systems * work < kThreadingWork ? 1 : std::max<int64_t>(1, pool.num_threads());
  const int64_t run =
      threads == 1 ? std::max<int64_t>(1, systems) : std::max<int64_t>(1, systems / (threads * kRunsPerThread));
  ParallelFor(pool, threads, (systems + run - 1) / run,
              [&](int64_t piece) { body(piece * run, std::min(systems, (piece + 1) * run)); });
}

// The matrix of a system with rows of whole vectors: the operand itself where its rows are, else a copy in `packed`.
// Systems in turn that share a matrix share the copy.
template <typename T>
class Matrices {
 public:
  Matrices(const SystemsCall& call, T* packed) : call_(call), packed_(packed) {}

  static bool MustPack(const SystemsCall& call) { return call.narrow || call.n != Padded<T>(call.n); }

  const T* Of(int64_t system) {
    if (!MustPack(call_)) return call_.matrices.Of<T>(system);
    const int64_t entry = call_.matrices.broadcast.At(system);
    if (entry != packed_entry_) {
      if (call_.narrow)
        Widen(call_.matrices.Of<uint16_t>(system));
      else
        Copy(call_.matrices.Of<T>(system));
      packed_entry_ = entry;
    }
    return packed_;
  }

 private:
  void Copy(const T* from) {
    const int64_t n = call_.n, stride = Padded<T>(n);
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(packed_ + i * stride, from + i * n, n * sizeof(T));
      std::fill(packed_ + i * stride + n, packed_ + (i + 1) * stride, T(0));
    }
  }

  // A bfloat16 is the upper half of a float.
  void Widen(const uint16_t* from) {
    const int64_t n = call_.n, stride = Padded<T>(n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const uint32_t bits = static_cast<uint32_t>(from[i * n + j]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        packed_[i * stride + j] = static_cast<T>(value);
      }
      std::fill(packed_ + i * stride + n, packed_ + (i + 1) * stride, T(0));
    }
  }

  const SystemsCall& call_;
  T* packed_;
  int64_t packed_entry_ = -1;
};

// ---------------------------------------------------------------------------------------------------- batched_cg

template <typename T>
CgProblem<T> ProblemOf(const CgCall& call, int64_t system, const T* matrix, T* scratch) {
  CgProblem<T> problem;
  problem.matrix = matrix;
  problem.stride = Padded<T>(call.n);
  problem.n = call.n;
  problem.rhs = call.rhs.Of<T>(system);
  problem.start = call.has_start ? call.start.Of<T>(system) : nullptr;
  problem.inverse = call.has_inverse ? call.inverse.Of<T>(system) : nullptr;
  problem.rtol = *call.rtol.Of<T>(system);
  problem.maxiter = *call.maxiter.Of<int32_t>(system);
  problem.value = Data<T>(call.value) + system * call.n;
  problem.scratch = scratch;
  return problem;
}

template <typename T>
void WriteEnd(const CgCall& call, int64_t system, const CgEnd<T>& end) {
  Data<int32_t>(call.result)[system] = end.result;
  Data<int32_t>(call.iterations)[system] = end.iterations;
  Data<T>(call.residual)[system] = end.residual;
}

// Systems begin .. end - 1, one per lane.
template <typename T>
void RunLanes(const CgCall& call, int64_t begin, int64_t end) {
  Scratch<T> scratch(LaneScratch<T>(call.n));
  CgProblem<T> problems[kWideEntries<T>];
  CgEnd<T> ends[kWideEntries<T>];
  for (int64_t system = begin; system < end; system += kWideEntries<T>) {
    const int count = static_cast<int>(std::min<int64_t>(kWideEntries<T>, end - system));
    for (int l = 0; l < count; ++l) {
      problems[l] = ProblemOf<T>(call, system + l, call.matrices.Of<T>(system + l), scratch.data());
      problems[l].stride = call.n;
    }
    Kernels<T>().systems.cg_by_lane(problems, count, ends);
    for (int l = 0; l < count; ++l) WriteEnd<T>(call, system + l, ends[l]);
  }
}

// Systems begin .. end - 1, each by itself or with its neighbor.
template <typename T>
void RunEach(const CgCall& call, int64_t begin, int64_t end) {
  const int64_t padded = Padded<T>(call.n);
  const int64_t matrix = Matrices<T>::MustPack(call) ? call.n * padded : 0;
  const int slots = call.n * padded * static_cast<int64_t>(sizeof(T)) <= kPairedBytes ? 2 : 1;
  Scratch<T> vectors(slots * kCgVectors * padded);
  Scratch<T> packed(slots * matrix);
  Matrices<T> matrices[2] = {{call, packed.data()}, {call, packed.data() + (slots - 1) * matrix}};
  CgProblem<T> problems[2];
  CgEnd<T> ends[2];
  for (int64_t system = begin; system < end; system += slots) {
    const int count = static_cast<int>(std::min<int64_t>(slots, end - system));
    for (int k = 0; k < count; ++k)
      problems[k] =
          ProblemOf<T>(call, system + k, matrices[k].Of(system + k), vectors.data() + k * kCgVectors * padded);
    Kernels<T>().systems.cg(problems, count, ends);
    for (int k = 0; k < count; ++k) WriteEnd<T>(call, system + k, ends[k]);
  }
}

template <typename T>
void RunCg(ffi::ThreadPool& pool, int64_t threads, const CgCall& call) {
  const bool lanes = call.n <= kLaneUnknowns && !call.narrow;
  // Runs of whole vectors of lanes.
  const int64_t unit = lanes ? kWideEntries<T> : 1;
  const int64_t units = (call.systems + unit - 1) / unit;
  ForEachRun(pool, threads, units, kUsualIterations * call.n * Padded<T>(call.n) * unit,
             [&](int64_t begin, int64_t end) {
               const int64_t last = std::min(call.systems, end * unit);
               if (lanes)
                 RunLanes<T>(call, begin * unit, last);
               else
                 RunEach<T>(call, begin, last);
             });
}

ffi::Error BatchedCg(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t start,
                     int64_t inverse, int64_t threads) {
  CgCall call;
  if (auto error = ReadCg(args, rets, start, inverse, call); error.failure()) return error;
  if (call.dtype == ffi::DataType::F32)
    RunCg<float>(pool, threads, call);
  else
    RunCg<double>(pool, threads, call);
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------------------------- batched_cholesky_solve

template <typename T>
void WriteEnd(const CholeskyCall& call, int64_t system, const CholeskyEnd<T>& end) {
  Data<int32_t>(call.result)[system] = end.result;
  Data<int32_t>(call.iterations)[system] = 0;
  Data<T>(call.residual)[system] = end.residual;
}

// Systems begin .. end - 1, each in blocks on `threads` threads.
template <typename T>
void RunLarge(ffi::ThreadPool& pool, int64_t threads, const CholeskyCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.n;
  Scratch<T> packed(call.narrow ? n * Padded<T>(n) : 0);
  Matrices<T> upcast(call, packed.data());
  LargeCholesky<T> solver({pool, threads}, n);
  int64_t last_entry = -1;
  T damping = 0;
  for (int64_t system = begin; system < end; ++system) {
    const int64_t entry = call.matrices.broadcast.At(system);
    const T own = *call.damping.Of<T>(system);
    if (entry != last_entry || own != damping) {
      const T rounding = static_cast<T>(n) * Precision<T>::eps;
      if (call.narrow)
        solver.Factorize(upcast.Of(system), Padded<T>(n), own, rounding);
      else
        solver.Factorize(call.matrices.Of<T>(system), n, own, rounding);
    }
    last_entry = entry;
    damping = own;
    WriteEnd<T>(call, system, solver.Solve(call.rhs.Of<T>(system), Data<T>(call.value) + system * n));
  }
}

// All threads share one system after the other where there are fewer systems than threads.
template <typename T>
void RunLarge(ffi::ThreadPool& pool, int64_t threads, const CholeskyCall& call) {
  if (threads <= 0) threads = std::max<int64_t>(1, pool.num_threads());
  if (call.systems < threads) return RunLarge<T>(pool, threads, call, 0, call.systems);
  ForEachRun(pool, threads, call.systems, call.n * call.n * call.n / 6,
             [&](int64_t begin, int64_t end) { RunLarge<T>(pool, 1, call, begin, end); });
}

template <typename T>
void RunCholesky(ffi::ThreadPool& pool, int64_t threads, const CholeskyCall& call) {
  if (call.n >= Kernels<T>().panels.unknowns) return RunLarge<T>(pool, threads, call);
  const SystemKernels<T>& kernels = Kernels<T>().systems;
  const int64_t n = call.n, padded = Padded<T>(n);
  ForEachRun(pool, threads, call.systems, n * padded * (n / 6 + 4), [&](int64_t begin, int64_t end) {
    Scratch<T> vectors(kCholeskyVectors * padded);
    Scratch<T> factor(padded * padded);
    Scratch<T> packed(Matrices<T>::MustPack(call) ? n * padded : 0);
    Matrices<T> matrices(call, packed.data());
    int64_t last_entry = -1;
    T damping = 0;
    bool factorized = false;
    for (int64_t system = begin; system < end; ++system) {
      const int64_t entry = call.matrices.broadcast.At(system);
      const CholeskyProblem<T> problem = {matrices.Of(system),         padded,        n,
                                          *call.damping.Of<T>(system), factor.data(), vectors.data()};
      if (entry != last_entry || problem.damping != damping) factorized = kernels.factorize(problem);
      last_entry = entry;
      damping = problem.damping;
      const T* rhs = call.rhs.Of<T>(system);
      WriteEnd<T>(call, system, kernels.solve(problem, factorized, rhs, Data<T>(call.value) + system * n));
    }
  });
}

ffi::Error BatchedCholeskySolve(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                                int64_t threads) {
  CholeskyCall call;
  if (auto error = ReadCholesky(args, rets, call); error.failure()) return error;
  if (call.dtype == ffi::DataType::F32)
    RunCholesky<float>(pool, threads, call);
  else
    RunCholesky<double>(pool, threads, call);
  return ffi::Error::Success();
}

}  // namespace

// `threads`: 0 lets the handler decide; a positive number counts as it is.
XLA_FFI_DEFINE_HANDLER_SYMBOL(BatchedCgHandler, BatchedCg,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("start")
                                  .Attr<int64_t>("inverse")
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchedCholeskySolveHandler, BatchedCholeskySolve,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("threads"));

}  // namespace curvax
