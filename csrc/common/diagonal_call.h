// Operands and results of the diagonal methods' foreign calls, read and checked; the same for host and device. The
// contract of each (operands, results, meaning) is in kernels/diagonal_update/api.py and native.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/diagonal.h"
#include "common/leaves.h"
#include "common/operands.h"

namespace curvax {

using Operands = std::vector<Operand>;

// float64 for float64, float32 for everything narrower: the dtype in which a leaf is computed.
inline ffi::DataType WideDtype(ffi::DataType dtype) {
  return dtype == ffi::DataType::F64 ? ffi::DataType::F64 : ffi::DataType::F32;
}

inline ffi::Error CheckParameterDtype(const char* op, ffi::DataType dtype) {
  if (dtype == ffi::DataType::BF16 || dtype == ffi::DataType::F16) return ffi::Error::Success();
  return CheckDtype(op, dtype);
}

// Reads `count` operands from `index` on, each of the shape of `like` and of its wide dtype.
inline ffi::Error WideArguments(const char* op, ffi::RemainingArgs args, size_t index, const Operands& like,
                                Operands& operands) {
  operands.resize(like.size());
  for (size_t leaf = 0; leaf < like.size(); ++leaf) {
    if (auto error = Argument(op, args, index + leaf, operands[leaf]); error.failure()) return error;
    const ffi::DataType dtype = WideDtype(like[leaf].dtype);
    if (auto error = CheckSame(op, "operand", index + leaf, operands[leaf], dtype, like[leaf].dims); error.failure())
      return error;
  }
  return ffi::Error::Success();
}

// Reads results from `index` on, each like its operand.
inline ffi::Error Results(const char* op, ffi::RemainingRets rets, size_t index, const Operands& like,
                          Operands& operands) {
  operands.resize(like.size());
  for (size_t leaf = 0; leaf < like.size(); ++leaf) {
    if (auto error = Result(op, rets, index + leaf, operands[leaf]); error.failure()) return error;
    if (auto error = CheckSame(op, "result", index + leaf, operands[leaf], like[leaf].dtype, like[leaf].dims);
        error.failure())
      return error;
  }
  return ffi::Error::Success();
}

// Reads the scalars, a float32 or float64 vector of `count` behind the batch axes, which it gives too.
inline ffi::Error Scalars(const char* op, ffi::RemainingArgs args, size_t index, int64_t count, Operand& scalars,
                          Dims& batch) {
  if (auto error = Argument(op, args, index, scalars); error.failure()) return error;
  if (auto error = CheckDtype(op, scalars.dtype); error.failure()) return error;
  if (scalars.dims.empty() || scalars.dims.back() != count)
    return Refuse(op, "operand ", index, " has shape ", Shape(scalars.dims), ", expected ", count, " scalars last");
  batch.assign(scalars.dims.begin(), scalars.dims.end() - 1);
  return ffi::Error::Success();
}

// Host handlers may do without copies of what they overwrite and have memory of their own; those of a device have both
// as results that XLA allocates.
enum class Where { kHost, kDevice };

// Reads scratch memory: `bytes` for each block of each member, the batch axes in front.
inline ffi::Error ReadBytes(const char* op, ffi::RemainingRets rets, size_t index, const Layout& layout, int64_t bytes,
                            Operand& scratch) {
  if (auto error = Result(op, rets, index, scratch); error.failure()) return error;
  Dims dims = layout.batch_dims;
  dims.push_back(bytes * layout.blocks());
  if (auto error = CheckSame(op, "result", index, scratch, ffi::DataType::U8, dims); error.failure()) return error;
  if (reinterpret_cast<uintptr_t>(scratch.data) % bytes != 0)
    return Refuse(op, "result ", index, ", the scratch memory, is not aligned to ", bytes, " bytes");
  return ffi::Error::Success();
}

struct DiagonalUpdateCall {
  Layout layout;
  Denominator denominator;
  bool has_mean;
  std::vector<int64_t> decays;  // per leaf: 1 where weight decay applies
  Operand sound, scalars, finite, scratch;
  Operands params, average, gradient, mean;
  Operands params_out, mean_out, saved;  // saved: for a copy of the old params; empty if there is to be none
};

inline ffi::Error ReadDiagonalUpdate(const char* op, ffi::RemainingArgs args, ffi::RemainingRets rets,
                                     int64_t denominator, ffi::Span<const int64_t> decays, Where where,
                                     DiagonalUpdateCall& call) {
  const size_t leaves = decays.size();
  call.decays.assign(decays.begin(), decays.end());
  call.has_mean = args.size() == 2 + 4 * leaves;
  if (!call.has_mean && args.size() != 2 + 3 * leaves)
    return Refuse(op, "got ", args.size(), " operands for ", leaves,
                  " leaves, expected sound, scalars and the leaves of params, average, gradient and maybe mean");
  const size_t groups = call.has_mean ? 2 : 1;
  const bool device = where == Where::kDevice;
  const bool saves = device || rets.size() == 1 + (groups + 1) * leaves;
  if (rets.size() != 1 + (groups + saves) * leaves + device)
    return Refuse(op, "got ", rets.size(), " results for ", leaves,
                  " leaves, expected finite and the leaves of params, of mean if there is one, and ",
                  device ? "of a copy, and scratch memory" : "maybe of a copy");
  if (denominator < 0 || denominator >= kDenominators) return Refuse(op, "no denominator has number ", denominator);
  call.denominator = static_cast<Denominator>(denominator);
  Dims batch;
  if (auto error = Scalars(op, args, 1, kUpdateScalars, call.scalars, batch); error.failure()) return error;
  if (auto error = Argument(op, args, 0, call.sound); error.failure()) return error;
  if (auto error = CheckSame(op, "operand", 0, call.sound, ffi::DataType::PRED, batch); error.failure()) return error;
  if (auto error = Result(op, rets, 0, call.finite); error.failure()) return error;
  if (auto error = CheckSame(op, "result", 0, call.finite, ffi::DataType::PRED, batch); error.failure()) return error;
  call.params.resize(leaves);
  for (size_t leaf = 0; leaf < leaves; ++leaf) {
    if (auto error = Argument(op, args, 2 + leaf, call.params[leaf]); error.failure()) return error;
    if (auto error = CheckParameterDtype(op, call.params[leaf].dtype); error.failure()) return error;
  }
  if (auto error = WideArguments(op, args, 2 + leaves, call.params, call.average); error.failure()) return error;
  if (auto error = WideArguments(op, args, 2 + 2 * leaves, call.params, call.gradient); error.failure()) return error;
  if (auto error = Results(op, rets, 1, call.params, call.params_out); error.failure()) return error;
  if (saves) {
    if (auto error = Results(op, rets, 1 + groups * leaves, call.params, call.saved); error.failure()) return error;
  }
  if (call.has_mean) {
    if (auto error = WideArguments(op, args, 2 + 3 * leaves, call.params, call.mean); error.failure()) return error;
    if (auto error = Results(op, rets, 1 + leaves, call.mean, call.mean_out); error.failure()) return error;
  }
  if (auto error = MakeLayout(op, call.scalars.dtype, batch, call.params.data(), leaves, call.layout); error.failure())
    return error;
  return device ? ReadBytes(op, rets, rets.size() - 1, call.layout, 1, call.scratch) : ffi::Error::Success();
}

// The scalars of one member in the dtype of a leaf, weight decay left out where it does not apply.
template <typename T>
UpdateScalars<T> ScalarsOf(const DiagonalUpdateCall& call, int64_t member, int64_t leaf) {
  UpdateScalars<T> scalars;
  T* target = &scalars.keep;
  for (int i = 0; i < kUpdateScalars; ++i) {
    const int64_t at = member * kUpdateScalars + i;
    target[i] = call.scalars.dtype == ffi::DataType::F64 ? static_cast<T>(Data<double>(call.scalars)[at])
                                                         : static_cast<T>(Data<float>(call.scalars)[at]);
  }
  if (call.decays[leaf] == 0) scalars.decay = 0;
  return scalars;
}

// How a factor lies over a leaf: entry i of the leaf goes with entry (i / inner) % count of the factor.
struct Spreading {
  int64_t inner = 1;
  int64_t count = 1;
  bool dense = true;
};

inline ffi::Error MakeSpreading(const char* op, size_t index, const Dims& leaf, const Dims& factor, size_t batch_axes,
                                Spreading& spreading) {
  bool fits = leaf.size() == factor.size();
  size_t begin = batch_axes, end = leaf.size();
  for (size_t axis = 0; fits && axis < batch_axes; ++axis) fits = leaf[axis] == factor[axis];
  spreading.dense = leaf == factor;
  if (fits && !spreading.dense) {
    while (begin < end && factor[begin] == 1) ++begin;
    while (end > begin && factor[end - 1] == 1) --end;
    for (size_t axis = begin; axis < end; ++axis) fits = fits && leaf[axis] == factor[axis];
  }
  if (!fits)
    return Refuse(op, "operand ", index, " has shape ", Shape(factor), ", expected that of its leaf ", Shape(leaf),
                  ", or 1 on some first and some last axes");
  spreading.count = Product(Dims(leaf.begin() + begin, leaf.begin() + end));
  spreading.inner = Product(Dims(leaf.begin() + end, leaf.end()));
  return ffi::Error::Success();
}

struct DiagonalAccumulateCall {
  Layout layout;
  Estimate estimate;
  bool root_mean_square;
  Operand scalars, finite, scale, scratch;
  Operands average, a, b, average_out, saved;
  std::vector<Spreading> spreading;
};

inline ffi::Error ReadDiagonalAccumulate(const char* op, ffi::RemainingArgs args, ffi::RemainingRets rets,
                                         int64_t estimate, bool root_mean_square, Where where,
                                         DiagonalAccumulateCall& call) {
  if (estimate < 0 || estimate >= kEstimates) return Refuse(op, "no estimate has number ", estimate);
  call.estimate = static_cast<Estimate>(estimate);
  call.root_mean_square = root_mean_square;
  const bool two = call.estimate == Estimate::kProduct || call.estimate == Estimate::kMagnitude;
  const size_t groups = two ? 3 : 2;
  if (args.size() < 1 || (args.size() - 1) % groups != 0)
    return Refuse(op, "got ", args.size(), " operands, expected scalars and the leaves of average and of ", groups - 1,
                  " factors");
  const size_t leaves = (args.size() - 1) / groups;
  const bool device = where == Where::kDevice;
  const bool saves = device || rets.size() == 2 + 2 * leaves;
  if (rets.size() != 2 + (1 + saves) * leaves + device)
    return Refuse(op, "got ", rets.size(), " results for ", leaves,
                  " leaves, expected finite, scale and the leaves of average and ",
                  device ? "of a copy, and scratch memory" : "maybe of a copy");
  Dims batch;
  if (auto error = Scalars(op, args, 0, kAccumulateScalars, call.scalars, batch); error.failure()) return error;
  if (auto error = Result(op, rets, 0, call.finite); error.failure()) return error;
  if (auto error = CheckSame(op, "result", 0, call.finite, ffi::DataType::PRED, batch); error.failure()) return error;
  if (auto error = Result(op, rets, 1, call.scale); error.failure()) return error;
  if (auto error = CheckSame(op, "result", 1, call.scale, call.scalars.dtype, batch); error.failure()) return error;
  call.average.resize(leaves);
  call.a.resize(leaves);
  call.spreading.resize(leaves);
  for (size_t leaf = 0; leaf < leaves; ++leaf) {
    const size_t index = 1 + leaves + leaf;
    Operand &average = call.average[leaf], &a = call.a[leaf];
    if (auto error = Argument(op, args, 1 + leaf, average); error.failure()) return error;
    if (auto error = CheckDtype(op, average.dtype); error.failure()) return error;
    if (auto error = Argument(op, args, index, a); error.failure()) return error;
    const Dims& dims = call.estimate == Estimate::kValue ? a.dims : average.dims;
    if (auto error = CheckSame(op, "operand", index, a, average.dtype, dims); error.failure()) return error;
    if (auto error = MakeSpreading(op, index, average.dims, a.dims, batch.size(), call.spreading[leaf]);
        error.failure())
      return error;
  }
  if (two) {
    if (auto error = WideArguments(op, args, 1 + 2 * leaves, call.average, call.b); error.failure()) return error;
  }
  if (auto error = Results(op, rets, 2, call.average, call.average_out); error.failure()) return error;
  if (saves) {
    if (auto error = Results(op, rets, 2 + leaves, call.average, call.saved); error.failure()) return error;
  }
  if (auto error = MakeLayout(op, call.scalars.dtype, batch, call.average.data(), leaves, call.layout); error.failure())
    return error;
  return device ? ReadBytes(op, rets, rets.size() - 1, call.layout, sizeof(double), call.scratch)
                : ffi::Error::Success();
}

}  // namespace curvax
