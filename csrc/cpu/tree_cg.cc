// XLA FFI handlers of the op family tree_cg: the vector work of one conjugate gradient iteration over all leaves of a
// pytree in one call. The contract of each (operands, results, meaning) is in kernels/tree_cg/api.py and native.py.

#include "cpu/tree_cg.h"

#include <cstdint>
#include <vector>

#include "common/pairwise.h"
#include "common/tree_cg_operands.h"
#include "cpu/for_each_block.h"
#include "cpu/simd/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace curvax {
namespace {

// ---------------------------------------------------------------------------------------------------- cg_update

template <typename T>
void RunUpdate(ffi::ThreadPool& pool, int64_t threads, const UpdateCall& call) {
  const Layout& layout = call.layout;
  const TreeCgKernels<T>& kernels = Kernels<T>().tree_cg;
  const int64_t blocks = layout.blocks();
  std::vector<double> partial(blocks * layout.batch);
  const T* alpha = Data<T>(call.alpha);
  const T* lam = Data<T>(call.lam);
  ForEachBlock(pool, layout, 6 * sizeof(T), threads,
               [&](int64_t member, int64_t leaf, int64_t at, int64_t n, int64_t slot) {
                 partial[slot] =
                     kernels.update(alpha[member], lam[member], Data<T>(call.x[leaf]) + at, Data<T>(call.p[leaf]) + at,
                                    Data<T>(call.r[leaf]) + at, Data<T>(call.q[leaf]) + at, Data<T>(call.xo[leaf]) + at,
                                    Data<T>(call.ro[leaf]) + at, n);
               });
  for (int64_t member = 0; member < layout.batch; ++member)
    Data<T>(call.rr)[member] = static_cast<T>(PairwiseSum(partial.data() + member * blocks, blocks));
}

ffi::Error CgUpdate(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t threads) {
  UpdateCall call;
  if (auto error = ReadUpdate(args, rets, Scratch::kNone, call); error.failure()) return error;
  if (call.layout.dtype == ffi::DataType::F32)
    RunUpdate<float>(pool, threads, call);
  else
    RunUpdate<double>(pool, threads, call);
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------------------------------- cg_direction

template <typename T>
void RunDirection(ffi::ThreadPool& pool, int64_t threads, const DirectionCall& call) {
  const TreeCgKernels<T>& kernels = Kernels<T>().tree_cg;
  const T* beta = Data<T>(call.beta);
  ForEachBlock(pool, call.layout, 3 * sizeof(T), threads,
               [&](int64_t member, int64_t leaf, int64_t at, int64_t n, int64_t) {
                 kernels.direction(beta[member], Data<T>(call.z[leaf]) + at, Data<T>(call.p[leaf]) + at,
                                   Data<T>(call.po[leaf]) + at, n);
               });
}

ffi::Error CgDirection(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t threads) {
  DirectionCall call;
  if (auto error = ReadDirection(args, rets, call); error.failure()) return error;
  if (call.layout.dtype == ffi::DataType::F32)
    RunDirection<float>(pool, threads, call);
  else
    RunDirection<double>(pool, threads, call);
  return ffi::Error::Success();
}

// --------------------------------------------------------------------------------------------------------- dots

template <typename T>
void RunDots(ffi::ThreadPool& pool, int64_t threads, const DotsCall& call) {
  const Layout& layout = call.layout;
  const TreeCgKernels<T>& kernels = Kernels<T>().tree_cg;
  const int64_t pairs = static_cast<int64_t>(call.results.size());
  const int64_t blocks = layout.blocks();
  const int64_t total = blocks * layout.batch;
  std::vector<double> partial(pairs * total);
  const bool gram = IsGram(call);
  // All pairs of one block in turn: a vector that several pairs share is read from memory once.
  ForEachBlock(pool, layout, 2 * pairs * sizeof(T), threads,
               [&](int64_t, int64_t leaf, int64_t at, int64_t n, int64_t slot) {
                 if (gram) {
                   double products[3];
                   kernels.gram(Data<T>(call.a[0][leaf]) + at, Data<T>(call.b[0][leaf]) + at, n, products);
                   for (int64_t pair = 0; pair < 3; ++pair) partial[pair * total + slot] = products[pair];
                   return;
                 }
                 for (int64_t pair = 0; pair < pairs; ++pair)
                   partial[pair * total + slot] =
                       kernels.dot(Data<T>(call.a[pair][leaf]) + at, Data<T>(call.b[pair][leaf]) + at, n);
               });
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t member = 0; member < layout.batch; ++member)
      Data<T>(call.results[pair])[member] =
          static_cast<T>(PairwiseSum(partial.data() + pair * total + member * blocks, blocks));
}

ffi::Error Dots(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t threads) {
  DotsCall call;
  if (auto error = ReadDots(args, rets, Scratch::kNone, call); error.failure()) return error;
  if (call.layout.dtype == ffi::DataType::F32)
    RunDots<float>(pool, threads, call);
  else
    RunDots<double>(pool, threads, call);
  return ffi::Error::Success();
}

}  // namespace

// `threads`: 0 lets the handler decide; a positive number counts as it is.
#define CURVAX_BINDING ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("threads")

XLA_FFI_DEFINE_HANDLER_SYMBOL(CgUpdateHandler, CgUpdate, CURVAX_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(CgDirectionHandler, CgDirection, CURVAX_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DotsHandler, Dots, CURVAX_BINDING);

}  // namespace curvax
