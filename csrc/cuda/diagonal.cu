// XLA FFI handlers of diagonal_update on NVIDIA GPUs: operands and results as on the CPU, always with results for
// copies, and scratch memory as a last result. Leaves go by parameter dtype and by whether weight decay applies, a
// launch for each kind that occurs: usually one or two, for any number of leaves.

#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/diagonal_call.h"
#include "cuda/diagonal.cuh"
#include "cuda/diagonal.h"
#include "cuda/launch.h"
#include "cuda/tables.h"

namespace curvax {
namespace {

// Some leaves of a call, packed together, and the number that their first block has in the whole call.
struct Group {
  Layout layout;
  std::vector<Operands> vectors;
  int64_t slot = 0;
  int64_t member_blocks = 0;  // of the whole call

  template <typename Table>
  Table Place(Table table) const {
    table.slot += slot;
    table.member_blocks = member_blocks;
    return table;
  }
};

// The leaves for which `belongs(leaf)`, their blocks numbered from `slot` on, which goes on behind them. An empty
// vector stands for null pointers.
template <typename Belongs>
Group Select(const Layout& whole, const std::vector<const Operands*>& vectors, int64_t& slot, const Belongs& belongs) {
  Group group;
  group.layout.dtype = whole.dtype;
  group.layout.batch_dims = whole.batch_dims;
  group.layout.batch = whole.batch;
  group.layout.first_block = {0};
  group.vectors.resize(vectors.size());
  for (size_t leaf = 0; leaf < whole.sizes.size(); ++leaf) {
    if (!belongs(leaf)) continue;
    const int64_t blocks = whole.first_block[leaf + 1] - whole.first_block[leaf];
    group.layout.sizes.push_back(whole.sizes[leaf]);
    group.layout.elements += whole.sizes[leaf];
    group.layout.first_block.push_back(group.layout.blocks() + blocks);
    for (size_t v = 0; v < vectors.size(); ++v)
      group.vectors[v].push_back(vectors[v]->empty() ? Operand{} : (*vectors[v])[leaf]);
  }
  group.slot = slot;
  group.member_blocks = whole.blocks();
  slot += group.layout.blocks();
  return group;
}

template <int kVectors>
std::array<const Operand*, kVectors> Pointers(const Group& group) {
  std::array<const Operand*, kVectors> leaves;
  for (int v = 0; v < kVectors; ++v) leaves[v] = group.vectors[v].data();
  return leaves;
}

template <Denominator kind, typename P, typename T>
ffi::Error LaunchUpdate(cudaStream_t stream, const DiagonalUpdateCall& call, const Group& group,
                        const UpdateLaunch& launch) {
  return ForEachTable<kDiagonalVectors>(group.layout, Pointers<kDiagonalVectors>(group), [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return Launch("diagonal_update", call.layout.dtype, call.params[0].dims, stream, table.blocks * call.layout.batch,
                  kThreads, DiagonalUpdateKernel<kind, P, T, Table>, group.Place(table), launch);
  });
}

template <typename P, typename T>
ffi::Error LaunchKind(cudaStream_t stream, const DiagonalUpdateCall& call, const Group& group,
                      const UpdateLaunch& launch) {
  switch (call.denominator) {
    case Denominator::kFloor:
      return LaunchUpdate<Denominator::kFloor, P, T>(stream, call, group, launch);
    case Denominator::kLinear:
      return LaunchUpdate<Denominator::kLinear, P, T>(stream, call, group, launch);
    case Denominator::kRoot:
      return LaunchUpdate<Denominator::kRoot, P, T>(stream, call, group, launch);
    case Denominator::kPower:
      return LaunchUpdate<Denominator::kPower, P, T>(stream, call, group, launch);
    default:
      return LaunchUpdate<Denominator::kDamped, P, T>(stream, call, group, launch);
  }
}

template <typename P>
ffi::Error LaunchRestore(const char* op, cudaStream_t stream, const Layout& layout, const Group& group,
                         const bool* finite, const bool* sound) {
  return ForEachTable<kRestoreVectors>(group.layout, Pointers<kRestoreVectors>(group), [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return Launch(op, layout.dtype, layout.batch_dims, stream, table.blocks * layout.batch, kThreads,
                  DiagonalRestoreKernel<P, Table>, group.Place(table), finite, sound);
  });
}

template <typename P, typename T>
ffi::Error RunUpdate(cudaStream_t stream, const DiagonalUpdateCall& call, ffi::DataType dtype, int64_t& slot) {
  for (const bool decays : {false, true}) {
    const auto belongs = [&](size_t leaf) {
      return call.params[leaf].dtype == dtype && (call.decays[leaf] != 0) == decays;
    };
    const Group group =
        Select(call.layout,
               {&call.params, &call.params_out, &call.saved, &call.average, &call.gradient, &call.mean, &call.mean_out},
               slot, belongs);
    const UpdateLaunch launch = {call.scalars.data,
                                 Data<bool>(call.sound),
                                 Data<uint8_t>(call.scratch),
                                 call.scalars.dtype == ffi::DataType::F64,
                                 decays,
                                 call.has_mean};
    if (auto error = LaunchKind<P, T>(stream, call, group, launch); error.failure()) return error;
  }
  return ffi::Error::Success();
}

template <typename P>
ffi::Error RestoreUpdate(cudaStream_t stream, const DiagonalUpdateCall& call, ffi::DataType dtype) {
  int64_t slot = 0;
  const Group group = Select(call.layout, {&call.saved, &call.params_out}, slot,
                             [&](size_t leaf) { return call.params[leaf].dtype == dtype; });
  return LaunchRestore<P>("diagonal_update", stream, call.layout, group, Data<bool>(call.finite),
                          Data<bool>(call.sound));
}

ffi::Error DiagonalUpdate(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t denominator,
                          ffi::Span<const int64_t> decays) {
  constexpr const char* op = "diagonal_update";
  DiagonalUpdateCall call;
  if (auto error = ReadDiagonalUpdate(op, args, rets, denominator, decays, Where::kDevice, call); error.failure())
    return error;
  const Layout& layout = call.layout;
  using ffi::DataType;
  int64_t slot = 0;
  if (auto error = RunUpdate<float, float>(stream, call, DataType::F32, slot); error.failure()) return error;
  if (auto error = RunUpdate<double, double>(stream, call, DataType::F64, slot); error.failure()) return error;
  if (auto error = RunUpdate<BFloat16, float>(stream, call, DataType::BF16, slot); error.failure()) return error;
  if (auto error = RunUpdate<Float16, float>(stream, call, DataType::F16, slot); error.failure()) return error;
  if (auto error =
          Launch(op, layout.dtype, layout.batch_dims, stream, layout.batch, kThreads, DiagonalJudgeKernel<kThreads>,
                 Data<uint8_t>(call.scratch), layout.blocks(), Data<bool>(call.sound), Data<bool>(call.finite));
      error.failure())
    return error;
  if (auto error = RestoreUpdate<float>(stream, call, DataType::F32); error.failure()) return error;
  if (auto error = RestoreUpdate<double>(stream, call, DataType::F64); error.failure()) return error;
  if (auto error = RestoreUpdate<BFloat16>(stream, call, DataType::BF16); error.failure()) return error;
  return RestoreUpdate<Float16>(stream, call, DataType::F16);
}

template <bool root_mean_square, typename T>
ffi::Error LaunchAccumulate(cudaStream_t stream, const DiagonalAccumulateCall& call, const Group& group) {
  return ForEachTable<kAccumulateVectors>(group.layout, Pointers<kAccumulateVectors>(group), [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return Launch("diagonal_accumulate", call.layout.dtype, call.average[0].dims, stream,
                  table.blocks * call.layout.batch, kThreads, DiagonalAccumulateKernel<root_mean_square, T, Table>,
                  group.Place(table), call.scalars.data, call.scalars.dtype == ffi::DataType::F64, call.estimate,
                  Data<double>(call.scratch));
  });
}

template <typename T>
ffi::Error RunAccumulate(cudaStream_t stream, const DiagonalAccumulateCall& call, ffi::DataType dtype, int64_t& slot) {
  const Group group = Select(call.layout, {&call.average, &call.average_out, &call.saved, &call.a, &call.b}, slot,
                             [&](size_t leaf) { return call.average[leaf].dtype == dtype; });
  return call.root_mean_square ? LaunchAccumulate<true, T>(stream, call, group)
                               : LaunchAccumulate<false, T>(stream, call, group);
}

template <typename T>
ffi::Error RestoreAccumulate(cudaStream_t stream, const DiagonalAccumulateCall& call, ffi::DataType dtype) {
  int64_t slot = 0;
  const Group group = Select(call.layout, {&call.saved, &call.average_out}, slot,
                             [&](size_t leaf) { return call.average[leaf].dtype == dtype; });
  return LaunchRestore<T>("diagonal_accumulate", stream, call.layout, group, Data<bool>(call.finite), nullptr);
}

template <typename T>
ffi::Error LaunchScale(cudaStream_t stream, const DiagonalAccumulateCall& call) {
  const Layout& layout = call.layout;
  return Launch("diagonal_accumulate", layout.dtype, layout.batch_dims, stream, layout.batch, kThreads,
                DiagonalScaleKernel<T>, Data<double>(call.scratch), layout.blocks(), Data<T>(call.scalars),
                Data<T>(call.scale), Data<bool>(call.finite));
}

ffi::Error DiagonalAccumulate(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t estimate,
                              bool root_mean_square) {
  constexpr const char* op = "diagonal_accumulate";
  DiagonalAccumulateCall call;
  if (auto error = ReadDiagonalAccumulate(op, args, rets, estimate, root_mean_square, Where::kDevice, call);
      error.failure())
    return error;
  for (size_t leaf = 0; leaf < call.a.size(); ++leaf)
    if (!call.spreading[leaf].dense)
      return Refuse(op, "factor of leaf ", leaf, " has shape ", Shape(call.a[leaf].dims), ", expected ",
                    Shape(call.average[leaf].dims), ": block means are written out on a GPU");
  using ffi::DataType;
  int64_t slot = 0;
  if (auto error = RunAccumulate<float>(stream, call, DataType::F32, slot); error.failure()) return error;
  if (auto error = RunAccumulate<double>(stream, call, DataType::F64, slot); error.failure()) return error;
  if (auto error =
          call.layout.dtype == DataType::F32 ? LaunchScale<float>(stream, call) : LaunchScale<double>(stream, call);
      error.failure())
    return error;
  if (auto error = RestoreAccumulate<float>(stream, call, DataType::F32); error.failure()) return error;
  return RestoreAccumulate<double>(stream, call, DataType::F64);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DiagonalUpdateCudaHandler, DiagonalUpdate,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("denominator")
                                  .Attr<ffi::Span<const int64_t>>("decays"),
                              {kGraphSafe});
XLA_FFI_DEFINE_HANDLER_SYMBOL(DiagonalAccumulateCudaHandler, DiagonalAccumulate,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("estimate")
                                  .Attr<bool>("root_mean_square"),
                              {kGraphSafe});

}  // namespace curvax
