// XLA FFI handlers of diagonal_update: the vector work of Sophia and AdaHessian over all leaves of a pytree in one
// call.
//
// A step changes all parameters or none, and which, is known only at its end. Where the call has results
// for copies, each block keeps what it overwrites there, and the copies go back in the rare call whose outcome is not
// finite: one more stream of writes. Where it has none, a pass that writes nothing looks first: twice the reading, no
// memory.

#include "cpu/diagonal.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/diagonal_call.h"
#include "common/half.h"
#include "common/pairwise.h"
#include "cpu/for_each_block.h"
#include "cpu/simd/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace curvax {
namespace {

// Copies `n` elements of `size` bytes from position `at` on, unless both are the same memory.
void CopyBlock(const Operand& from, const Operand& to, int64_t at, int64_t n, int64_t size) {
  if (from.data != to.data)
    std::memcpy(static_cast<char*>(to.data) + at * size, static_cast<const char*>(from.data) + at * size, n * size);
}

int64_t ItemSize(ffi::DataType dtype) { return static_cast<int64_t>(ffi::ByteWidth(dtype)); }

// ---------------------------------------------------------------------------------------------- diagonal_update

// What a pass over the blocks writes.
enum class Writes { kNothing, kMean, kAll };

// One block's operands, and `nowhere` for each output that is not to be written.
template <typename T>
UpdateBlock<T> BlockOf(const DiagonalUpdateCall& call, int64_t leaf, int64_t at, Writes writes, T* nowhere) {
  UpdateBlock<T> block = {};
  block.gradient = Data<T>(call.gradient[leaf]) + at;
  block.average = Data<T>(call.average[leaf]) + at;
  if (call.has_mean) {
    block.mean = Data<T>(call.mean[leaf]) + at;
    block.mean_out = writes == Writes::kNothing ? nowhere : Data<T>(call.mean_out[leaf]) + at;
  }
  return block;
}

template <typename T>
bool UpdateWide(const DiagonalUpdateCall& call, int64_t member, int64_t leaf, int64_t at, int64_t n, Writes writes) {
  T nowhere[kBlock];
  UpdateBlock<T> block = BlockOf<T>(call, leaf, at, writes, nowhere);
  block.params = Data<T>(call.params[leaf]) + at;
  block.params_out = writes == Writes::kAll ? Data<T>(call.params_out[leaf]) + at : nowhere;
  if (writes == Writes::kAll && !call.saved.empty()) block.saved = Data<T>(call.saved[leaf]) + at;
  const auto update = Kernels<T>().diagonal.update[static_cast<int>(call.denominator)][call.has_mean];
  return update(ScalarsOf<T>(call, member, leaf), block, n);
}

// Parameters narrower than float32 go through a wide block on the stack, and are looked at again once rounded.
template <typename Half>
bool UpdateNarrow(const DiagonalUpdateCall& call, int64_t member, int64_t leaf, int64_t at, int64_t n, Writes writes) {
  float wide[kBlock], nowhere[kBlock];
  Half rounded[kBlock];
  const Half* params = Data<Half>(call.params[leaf]) + at;
  for (int64_t i = 0; i < n; ++i) Widen(params[i], wide[i]);
  UpdateBlock<float> block = BlockOf<float>(call, leaf, at, writes, nowhere);
  block.params = wide;
  block.params_out = wide;
  const auto update = Kernels<float>().diagonal.update[static_cast<int>(call.denominator)][call.has_mean];
  update(ScalarsOf<float>(call, member, leaf), block, n);
  float spoiled = 0;
  for (int64_t i = 0; i < n; ++i) {
    Narrow(wide[i], rounded[i]);
    Widen(rounded[i], wide[i]);
    spoiled += wide[i] * 0.0f;
  }
  if (writes == Writes::kAll) {
    if (!call.saved.empty()) std::memcpy(Data<Half>(call.saved[leaf]) + at, params, n * sizeof(Half));
    std::memcpy(Data<Half>(call.params_out[leaf]) + at, rounded, n * sizeof(Half));
  }
  return spoiled == 0;
}

bool UpdateOne(const DiagonalUpdateCall& call, int64_t member, int64_t leaf, int64_t at, int64_t n, Writes writes) {
  switch (call.params[leaf].dtype) {
    case ffi::DataType::BF16:
      return UpdateNarrow<BFloat16>(call, member, leaf, at, n, writes);
    case ffi::DataType::F16:
      return UpdateNarrow<Float16>(call, member, leaf, at, n, writes);
    case ffi::DataType::F64:
      return UpdateWide<double>(call, member, leaf, at, n, writes);
    default:
      return UpdateWide<float>(call, member, leaf, at, n, writes);
  }
}

void LeaveParams(const DiagonalUpdateCall& call, int64_t leaf, int64_t at, int64_t n) {
  CopyBlock(call.params[leaf], call.params_out[leaf], at, n, ItemSize(call.params[leaf].dtype));
}

void LeaveMean(const DiagonalUpdateCall& call, int64_t leaf, int64_t at, int64_t n) {
  if (call.has_mean) CopyBlock(call.mean[leaf], call.mean_out[leaf], at, n, ItemSize(call.mean[leaf].dtype));
}

ffi::Error DiagonalUpdate(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t denominator,
                          ffi::Span<const int64_t> decays, int64_t threads) {
  DiagonalUpdateCall call;
  if (auto error = ReadDiagonalUpdate("diagonal_update", args, rets, denominator, decays, Where::kHost, call);
      error.failure())
    return error;
  const Layout& layout = call.layout;
  const bool* sound = Data<bool>(call.sound);
  bool* finite = Data<bool>(call.finite);
  const int64_t blocks = layout.blocks();
  const int64_t bytes = 7 * ItemSize(layout.dtype);
  const bool look_first = call.saved.empty();
  std::vector<uint8_t> fine(blocks * layout.batch);
  ForEachBlock(pool, layout, bytes, threads, [&](int64_t member, int64_t leaf, int64_t at, int64_t n, int64_t slot) {
    const Writes writes = look_first ? Writes::kNothing : Writes::kAll;
    fine[slot] = sound[member] && UpdateOne(call, member, leaf, at, n, writes);
  });
  bool done = !look_first;
  for (int64_t member = 0; member < layout.batch; ++member) {
    const auto* first = fine.data() + member * blocks;
    finite[member] = sound[member] && std::all_of(first, first + blocks, [](uint8_t f) { return f != 0; });
    done = done && finite[member];
  }
  if (done) return ffi::Error::Success();
  ForEachBlock(pool, layout, bytes, threads, [&](int64_t member, int64_t leaf, int64_t at, int64_t n, int64_t) {
    if (!sound[member]) {
      LeaveParams(call, leaf, at, n);
      LeaveMean(call, leaf, at, n);
    } else if (!look_first) {
      if (!finite[member]) CopyBlock(call.saved[leaf], call.params_out[leaf], at, n, ItemSize(call.params[leaf].dtype));
    } else {
      UpdateOne(call, member, leaf, at, n, finite[member] ? Writes::kAll : Writes::kMean);
      if (!finite[member]) LeaveParams(call, leaf, at, n);
    }
  });
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------------------------ diagonal_accumulate

// The part of a factor that goes with the entries [start, start + n) of one member's leaf.
template <typename T>
void Expand(const Spreading& spreading, const T* factor, int64_t start, int64_t n, T* to) {
  for (int64_t i = 0; i < n;) {
    const int64_t at = start + i;
    const int64_t entry = (at / spreading.inner) % spreading.count;
    int64_t run;
    if (spreading.inner == 1) {
      run = std::min(n - i, spreading.count - entry);
      std::memcpy(to + i, factor + entry, run * sizeof(T));
    } else {
      run = std::min(n - i, spreading.inner - at % spreading.inner);
      std::fill_n(to + i, run, factor[entry]);
    }
    i += run;
  }
}

template <typename T>
double Accumulate(const DiagonalAccumulateCall& call, int64_t member, int64_t leaf, int64_t at, int64_t n, bool write) {
  const DiagonalKernels<T>& kernels = Kernels<T>().diagonal;
  const Spreading& spreading = call.spreading[leaf];
  T formed[kBlock], nowhere[kBlock];
  const T* estimate = Data<T>(call.a[leaf]) + at;
  if (!spreading.dense) {
    const int64_t start = at - member * call.layout.sizes[leaf];
    Expand(spreading, Data<T>(call.a[leaf]) + member * spreading.count, start, n, formed);
    estimate = formed;
  } else if (call.estimate != Estimate::kValue) {
    const T* b = call.b.empty() ? estimate : Data<T>(call.b[leaf]) + at;
    kernels.form[static_cast<int>(call.estimate)](estimate, b, formed, n);
    estimate = formed;
  }
  T scalars[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t from = member * kAccumulateScalars + i;
    scalars[i] = call.scalars.dtype == ffi::DataType::F64 ? static_cast<T>(Data<double>(call.scalars)[from])
                                                          : static_cast<T>(Data<float>(call.scalars)[from]);
  }
  T* out = write ? Data<T>(call.average_out[leaf]) + at : nowhere;
  T* saved = write && !call.saved.empty() ? Data<T>(call.saved[leaf]) + at : nullptr;
  return kernels.mix[call.root_mean_square](scalars[0], scalars[1], estimate, Data<T>(call.average[leaf]) + at, out,
                                            saved, n);
}

double AccumulateOne(const DiagonalAccumulateCall& call, int64_t member, int64_t leaf, int64_t at, int64_t n,
                     bool write) {
  return call.average[leaf].dtype == ffi::DataType::F32 ? Accumulate<float>(call, member, leaf, at, n, write)
                                                        : Accumulate<double>(call, member, leaf, at, n, write);
}

// The mean magnitudes and whether they are finite: one entry that is not spoils the sum.
template <typename T>
void Finish(const DiagonalAccumulateCall& call, const std::vector<double>& partial) {
  const int64_t blocks = call.layout.blocks();
  for (int64_t member = 0; member < call.layout.batch; ++member) {
    const double unit = static_cast<double>(Data<T>(call.scalars)[member * kAccumulateScalars + 2]);
    const T scale = static_cast<T>(unit * PairwiseSum(partial.data() + member * blocks, blocks));
    Data<T>(call.scale)[member] = scale;
    Data<bool>(call.finite)[member] = std::isfinite(scale);
  }
}

ffi::Error DiagonalAccumulate(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t estimate,
                              bool root_mean_square, int64_t threads) {
  DiagonalAccumulateCall call;
  if (auto error =
          ReadDiagonalAccumulate("diagonal_accumulate", args, rets, estimate, root_mean_square, Where::kHost, call);
      error.failure())
    return error;
  const Layout& layout = call.layout;
  std::vector<double> partial(layout.blocks() * layout.batch);
  const int64_t bytes = 5 * ItemSize(layout.dtype);
  const bool look_first = call.saved.empty();
  ForEachBlock(pool, layout, bytes, threads, [&](int64_t member, int64_t leaf, int64_t at, int64_t n, int64_t slot) {
    partial[slot] = AccumulateOne(call, member, leaf, at, n, !look_first);
  });
  if (layout.dtype == ffi::DataType::F32)
    Finish<float>(call, partial);
  else
    Finish<double>(call, partial);
  const bool* finite = Data<bool>(call.finite);
  const bool all = std::all_of(finite, finite + layout.batch, [](bool f) { return f; });
  if (all && !look_first) return ffi::Error::Success();
  ForEachBlock(pool, layout, bytes, threads, [&](int64_t member, int64_t leaf, int64_t at, int64_t n, int64_t) {
    const int64_t size = ItemSize(call.average[leaf].dtype);
    if (!finite[member])
      CopyBlock(look_first ? call.average[leaf] : call.saved[leaf], call.average_out[leaf], at, n, size);
    else if (look_first)
      AccumulateOne(call, member, leaf, at, n, true);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DiagonalUpdateHandler, DiagonalUpdate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("denominator")
                                  .Attr<ffi::Span<const int64_t>>("decays")
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DiagonalAccumulateHandler, DiagonalAccumulate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("estimate")
                                  .Attr<bool>("root_mean_square")
                                  .Attr<int64_t>("threads"));

}  // namespace curvax
