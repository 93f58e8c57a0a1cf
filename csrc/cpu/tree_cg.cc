// XLA FFI handlers of the op family tree_cg: the vector work of one conjugate gradient iteration over all leaves of a
// pytree in one call. The contract of each (operands, results, meaning) is in kernels/tree_cg/api.py and native.py.

#include "cpu/tree_cg.h"

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "common/leaves.h"
#include "common/operands.h"
#include "common/pairwise.h"
#include "cpu/for_each_block.h"
#include "cpu/simd.h"
#include "xla/ffi/api/ffi.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

// ---------------------------------------------------------------------------------------------------- cg_update

struct UpdateCall {
  Layout layout;
  Operand alpha, lam, rr;
  std::vector<Operand> x, p, r, q, xo, ro;
};

ffi::Error ReadUpdate(ffi::RemainingArgs args, ffi::RemainingRets rets, UpdateCall& call) {
  constexpr const char* op = "cg_update";
  if (args.size() < 2 || (args.size() - 2) % 4 != 0)
    return Refuse(op, "got ", args.size(),
                  " operands, expected alpha, lam and the leaves of x, p, r and q: 2 + 4 leaves");
  const size_t leaves = (args.size() - 2) / 4;
  if (rets.size() != 1 + 2 * leaves)
    return Refuse(op, "got ", rets.size(), " results for ", leaves,
                  " leaves, expected rr and the leaves of x and r: ", 1 + 2 * leaves);
  if (auto error = Argument(op, args, 0, call.alpha); error.failure()) return error;
  if (auto error = Argument(op, args, 1, call.lam); error.failure()) return error;
  if (auto error = CheckDtype(op, call.alpha.dtype); error.failure()) return error;
  if (auto error = CheckSame(op, "operand", 1, call.lam, call.alpha.dtype, call.alpha.dims); error.failure())
    return error;
  if (auto error = Result(op, rets, 0, call.rr); error.failure()) return error;
  if (auto error = CheckSame(op, "result", 0, call.rr, call.alpha.dtype, call.alpha.dims); error.failure())
    return error;
  std::vector<Operand>* groups[] = {&call.x, &call.p, &call.r, &call.q};
  for (size_t g = 0; g < 4; ++g) {
    groups[g]->resize(leaves);
    for (size_t leaf = 0; leaf < leaves; ++leaf) {
      const size_t index = 2 + g * leaves + leaf;
      Operand& operand = (*groups[g])[leaf];
      if (auto error = Argument(op, args, index, operand); error.failure()) return error;
      if (auto error = CheckSame(op, "operand", index, operand, call.alpha.dtype, call.x[leaf].dims); error.failure())
        return error;
    }
  }
  std::vector<Operand>* outputs[] = {&call.xo, &call.ro};
  for (size_t g = 0; g < 2; ++g) {
    outputs[g]->resize(leaves);
    for (size_t leaf = 0; leaf < leaves; ++leaf) {
      const size_t index = 1 + g * leaves + leaf;
      Operand& operand = (*outputs[g])[leaf];
      if (auto error = Result(op, rets, index, operand); error.failure()) return error;
      if (auto error = CheckSame(op, "result", index, operand, call.alpha.dtype, call.x[leaf].dims); error.failure())
        return error;
    }
  }
  return MakeLayout(op, call.alpha.dtype, call.alpha.dims, call.x.data(), leaves, call.layout);
}

template <typename T>
void RunUpdate(ffi::ThreadPool& pool, int64_t threads, const UpdateCall& call) {
  const Layout& layout = call.layout;
  const BlockKernels<T>& kernels = Kernels<T>();
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
  if (auto error = ReadUpdate(args, rets, call); error.failure()) return error;
  if (call.layout.dtype == ffi::DataType::F32)
    RunUpdate<float>(pool, threads, call);
  else
    RunUpdate<double>(pool, threads, call);
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------------------------------- cg_direction

struct DirectionCall {
  Layout layout;
  Operand beta;
  std::vector<Operand> z, p, po;
};

ffi::Error ReadDirection(ffi::RemainingArgs args, ffi::RemainingRets rets, DirectionCall& call) {
  constexpr const char* op = "cg_direction";
  if (args.size() < 1 || (args.size() - 1) % 2 != 0)
    return Refuse(op, "got ", args.size(), " operands, expected beta and the leaves of z and p: 1 + 2 leaves");
  const size_t leaves = (args.size() - 1) / 2;
  if (rets.size() != leaves)
    return Refuse(op, "got ", rets.size(), " results for ", leaves, " leaves, expected the leaves of p: ", leaves);
  if (auto error = Argument(op, args, 0, call.beta); error.failure()) return error;
  if (auto error = CheckDtype(op, call.beta.dtype); error.failure()) return error;
  call.z.resize(leaves);
  call.p.resize(leaves);
  call.po.resize(leaves);
  for (size_t leaf = 0; leaf < leaves; ++leaf) {
    if (auto error = Argument(op, args, 1 + leaf, call.z[leaf]); error.failure()) return error;
    if (auto error = Argument(op, args, 1 + leaves + leaf, call.p[leaf]); error.failure()) return error;
    if (auto error = Result(op, rets, leaf, call.po[leaf]); error.failure()) return error;
    const Dims& dims = call.z[leaf].dims;
    const ffi::DataType dtype = call.beta.dtype;
    if (auto error = CheckSame(op, "operand", 1 + leaf, call.z[leaf], dtype, dims); error.failure()) return error;
    if (auto error = CheckSame(op, "operand", 1 + leaves + leaf, call.p[leaf], dtype, dims); error.failure())
      return error;
    if (auto error = CheckSame(op, "result", leaf, call.po[leaf], dtype, dims); error.failure()) return error;
  }
  return MakeLayout(op, call.beta.dtype, call.beta.dims, call.z.data(), leaves, call.layout);
}

template <typename T>
void RunDirection(ffi::ThreadPool& pool, int64_t threads, const DirectionCall& call) {
  const BlockKernels<T>& kernels = Kernels<T>();
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

struct DotsCall {
  Layout layout;
  std::vector<Operand> results;
  std::vector<std::vector<Operand>> a, b;  // per pair, per leaf
};

ffi::Error ReadDots(ffi::RemainingArgs args, ffi::RemainingRets rets, DotsCall& call) {
  constexpr const char* op = "dots";
  const size_t pairs = rets.size();
  if (pairs == 0 || args.size() % (2 * pairs) != 0)
    return Refuse(op, "got ", args.size(), " operands for ", pairs,
                  " results, expected the leaves of a and b for each pair: 2 leaves per result");
  const size_t leaves = args.size() / (2 * pairs);
  call.results.resize(pairs);
  call.a.assign(pairs, std::vector<Operand>(leaves));
  call.b.assign(pairs, std::vector<Operand>(leaves));
  for (size_t pair = 0; pair < pairs; ++pair) {
    if (auto error = Result(op, rets, pair, call.results[pair]); error.failure()) return error;
    const Operand& first = call.results[0];
    if (auto error = CheckDtype(op, first.dtype); error.failure()) return error;
    if (auto error = CheckSame(op, "result", pair, call.results[pair], first.dtype, first.dims); error.failure())
      return error;
    for (size_t leaf = 0; leaf < leaves; ++leaf) {
      const size_t index = 2 * pair * leaves + leaf;
      if (auto error = Argument(op, args, index, call.a[pair][leaf]); error.failure()) return error;
      if (auto error = Argument(op, args, index + leaves, call.b[pair][leaf]); error.failure()) return error;
      const Dims& dims = call.a[0][leaf].dims;
      if (auto error = CheckSame(op, "operand", index, call.a[pair][leaf], first.dtype, dims); error.failure())
        return error;
      if (auto error = CheckSame(op, "operand", index + leaves, call.b[pair][leaf], first.dtype, dims); error.failure())
        return error;
    }
  }
  return MakeLayout(op, call.results[0].dtype, call.results[0].dims, call.a[0].data(), leaves, call.layout);
}

// Whether the pairs are (a, b), (a, a), (b, b), as conjugate gradients ask for them.
bool IsGram(const DotsCall& call) {
  if (call.results.size() != 3) return false;
  const auto same = [](const std::vector<Operand>& x, const std::vector<Operand>& y) {
    return std::equal(x.begin(), x.end(), y.begin(),
                      [](const Operand& u, const Operand& v) { return u.data == v.data; });
  };
  const auto& a = call.a[0];
  const auto& b = call.b[0];
  return same(a, call.a[1]) && same(a, call.b[1]) && same(b, call.a[2]) && same(b, call.b[2]);
}

template <typename T>
void RunDots(ffi::ThreadPool& pool, int64_t threads, const DotsCall& call) {
  const Layout& layout = call.layout;
  const BlockKernels<T>& kernels = Kernels<T>();
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
  if (auto error = ReadDots(args, rets, call); error.failure()) return error;
  if (call.layout.dtype == ffi::DataType::F32)
    RunDots<float>(pool, threads, call);
  else
    RunDots<double>(pool, threads, call);
  return ffi::Error::Success();
}

}  // namespace

// `threads`: 0 lets the handler decide; a positive number is taken as it is.
#define CURVAX_BINDING ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("threads")

XLA_FFI_DEFINE_HANDLER_SYMBOL(CgUpdateHandler, CgUpdate, CURVAX_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(CgDirectionHandler, CgDirection, CURVAX_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DotsHandler, Dots, CURVAX_BINDING);

}  // namespace curvax
