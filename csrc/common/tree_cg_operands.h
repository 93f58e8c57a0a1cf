// The operands of the op family tree_cg, read and checked for the CPU and the CUDA handlers. The contract of each
// handler (operands, results, meaning) is in kernels/tree_cg/api.py and native.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/leaves.h"
#include "common/operands.h"

namespace curvax {

// Memory for a handler's partial sums: none on the CPU, which has its own, and on a GPU a last result that XLA
// allocates, of bytes with the batch axes in front: 8 for each inner product and block (common/leaves.h).
enum class Scratch { kNone, kResult };

inline ffi::Error ReadScratch(const char* op, ffi::RemainingRets rets, size_t index, const Layout& layout,
                              int64_t products, Operand& scratch) {
  if (auto error = Result(op, rets, index, scratch); error.failure()) return error;
  Dims dims = layout.batch_dims;
  dims.push_back(products * layout.blocks() * static_cast<int64_t>(sizeof(double)));
  if (auto error = CheckSame(op, "result", index, scratch, ffi::DataType::U8, dims); error.failure()) return error;
  if (reinterpret_cast<uintptr_t>(scratch.data) % sizeof(double) != 0)
    return Refuse(op, "result ", index, ", the scratch memory, is not aligned to ", sizeof(double), " bytes");
  return ffi::Error::Success();
}

struct UpdateCall {
  Layout layout;
  Operand alpha, lam, rr, scratch;
  std::vector<Operand> x, p, r, q, xo, ro;
};

inline ffi::Error ReadUpdate(ffi::RemainingArgs args, ffi::RemainingRets rets, Scratch scratch, UpdateCall& call) {
  constexpr const char* op = "cg_update";
  if (args.size() < 2 || (args.size() - 2) % 4 != 0)
    return Refuse(op, "got ", args.size(),
                  " operands, expected alpha, lam and the leaves of x, p, r and q: 2 + 4 leaves");
  const size_t leaves = (args.size() - 2) / 4;
  const size_t results = 1 + 2 * leaves + (scratch == Scratch::kResult);
  if (rets.size() != results)
    return Refuse(op, "got ", rets.size(), " results for ", leaves, " leaves, expected rr and the leaves of x and r",
                  scratch == Scratch::kResult ? ", and scratch memory: " : ": ", results);
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
  if (auto error = MakeLayout(op, call.alpha.dtype, call.alpha.dims, call.x.data(), leaves, call.layout);
      error.failure())
    return error;
  if (scratch == Scratch::kNone) return ffi::Error::Success();
  return ReadScratch(op, rets, results - 1, call.layout, 1, call.scratch);
}

struct DirectionCall {
  Layout layout;
  Operand beta;
  std::vector<Operand> z, p, po;
};

inline ffi::Error ReadDirection(ffi::RemainingArgs args, ffi::RemainingRets rets, DirectionCall& call) {
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

struct DotsCall {
  Layout layout;
  Operand scratch;
  std::vector<Operand> results;
  std::vector<std::vector<Operand>> a, b;  // per pair, per leaf
};

inline ffi::Error ReadDots(ffi::RemainingArgs args, ffi::RemainingRets rets, Scratch scratch, DotsCall& call) {
  constexpr const char* op = "dots";
  const size_t own = scratch == Scratch::kResult;
  const size_t pairs = rets.size() < own ? 0 : rets.size() - own;
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
  const Operand& first = call.results[0];
  if (auto error = MakeLayout(op, first.dtype, first.dims, call.a[0].data(), leaves, call.layout); error.failure())
    return error;
  if (scratch == Scratch::kNone) return ffi::Error::Success();
  return ReadScratch(op, rets, pairs, call.layout, static_cast<int64_t>(pairs), call.scratch);
}

// Whether the pairs are (a, b), (a, a), (b, b), as conjugate gradients ask for them.
inline bool IsGram(const DotsCall& call) {
  if (call.results.size() != 3) return false;
  const auto same = [](const std::vector<Operand>& x, const std::vector<Operand>& y) {
    return std::equal(x.begin(), x.end(), y.begin(),
                      [](const Operand& u, const Operand& v) { return u.data == v.data; });
  };
  const auto& a = call.a[0];
  const auto& b = call.b[0];
  return same(a, call.a[1]) && same(a, call.b[1]) && same(b, call.a[2]) && same(b, call.b[2]);
}

}  // namespace curvax
