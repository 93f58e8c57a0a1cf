// XLA FFI handlers of the op family tree_cg on NVIDIA GPUs: operands and results as on the CPU, and scratch memory as a
// last result for ops with sums.

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "common/tree_cg_operands.h"
#include "cuda/launch.h"
#include "cuda/tables.h"
#include "cuda/tree_cg.cuh"
#include "cuda/tree_cg.h"

namespace curvax {
namespace {

template <typename T>
ffi::Error RunUpdate(cudaStream_t stream, const UpdateCall& call) {
  const Layout& layout = call.layout;
  double* partial = Data<double>(call.scratch);
  auto error = ForEachTable<kUpdateVectors>(
      layout, {call.x.data(), call.p.data(), call.r.data(), call.q.data(), call.xo.data(), call.ro.data()},
      [&](const auto& table) {
        using Table = std::decay_t<decltype(table)>;
        return Launch("cg_update", layout.dtype, call.x[0].dims, stream, table.blocks * layout.batch, kThreads,
                      CgUpdateKernel<T, Table>, table, Data<T>(call.alpha), Data<T>(call.lam), partial);
      });
  if (error.failure()) return error;
  return LaunchSums("cg_update", layout, stream, partial, Sums<T, 1>{{Data<T>(call.rr)}});
}

ffi::Error CgUpdate(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  UpdateCall call;
  if (auto error = ReadUpdate(args, rets, Scratch::kResult, call); error.failure()) return error;
  return call.layout.dtype == ffi::DataType::F32 ? RunUpdate<float>(stream, call) : RunUpdate<double>(stream, call);
}

template <typename T>
ffi::Error RunDirection(cudaStream_t stream, const DirectionCall& call) {
  const Layout& layout = call.layout;
  return ForEachTable<kDirectionVectors>(
      layout, {call.z.data(), call.p.data(), call.po.data()}, [&](const auto& table) {
        using Table = std::decay_t<decltype(table)>;
        return Launch("cg_direction", layout.dtype, call.z[0].dims, stream, table.blocks * layout.batch, kThreads,
                      CgDirectionKernel<T, Table>, table, Data<T>(call.beta));
      });
}

ffi::Error CgDirection(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  DirectionCall call;
  if (auto error = ReadDirection(args, rets, call); error.failure()) return error;
  return call.layout.dtype == ffi::DataType::F32 ? RunDirection<float>(stream, call)
                                                 : RunDirection<double>(stream, call);
}

// Pairs [first, first + kPairs) of the call.
template <typename T, int kPairs>
ffi::Error RunPairs(cudaStream_t stream, const DotsCall& call, size_t first) {
  const Layout& layout = call.layout;
  const int64_t stride = layout.blocks() * layout.batch;
  double* partial = Data<double>(call.scratch) + static_cast<int64_t>(first) * stride;
  std::array<const Operand*, 2 * kPairs> vectors;
  Sums<T, kPairs> sums;
  for (int k = 0; k < kPairs; ++k) {
    vectors[2 * k] = call.a[first + k].data();
    vectors[2 * k + 1] = call.b[first + k].data();
    sums.result[k] = Data<T>(call.results[first + k]);
  }
  auto error = ForEachTable<2 * kPairs>(layout, vectors, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return Launch("dots", layout.dtype, call.a[0][0].dims, stream, table.blocks * layout.batch, kThreads,
                  DotsKernel<T, kPairs, Table>, table, partial, stride);
  });
  if (error.failure()) return error;
  return LaunchSums("dots", layout, stream, partial, sums);
}

// The pairs (a, b), (a, a), (b, b).
template <typename T>
ffi::Error RunGram(cudaStream_t stream, const DotsCall& call) {
  const Layout& layout = call.layout;
  double* partial = Data<double>(call.scratch);
  auto error = ForEachTable<2>(layout, {call.a[0].data(), call.b[0].data()}, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return Launch("dots", layout.dtype, call.a[0][0].dims, stream, table.blocks * layout.batch, kThreads,
                  GramKernel<T, Table>, table, partial, layout.blocks() * layout.batch);
  });
  if (error.failure()) return error;
  const auto& results = call.results;
  return LaunchSums("dots", layout, stream, partial,
                    Sums<T, 3>{{Data<T>(results[0]), Data<T>(results[1]), Data<T>(results[2])}});
}

// The most pairs that a launch takes: more would need more registers than a full multiprocessor has.
constexpr size_t kMostPairs = 3;

template <typename T>
ffi::Error RunDots(cudaStream_t stream, const DotsCall& call) {
  if (IsGram(call)) return RunGram<T>(stream, call);
  for (size_t first = 0; first < call.results.size(); first += kMostPairs) {
    const size_t pairs = std::min(kMostPairs, call.results.size() - first);
    auto error = pairs == 1   ? RunPairs<T, 1>(stream, call, first)
                 : pairs == 2 ? RunPairs<T, 2>(stream, call, first)
                              : RunPairs<T, 3>(stream, call, first);
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

ffi::Error Dots(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  DotsCall call;
  if (auto error = ReadDots(args, rets, Scratch::kResult, call); error.failure()) return error;
  return call.layout.dtype == ffi::DataType::F32 ? RunDots<float>(stream, call) : RunDots<double>(stream, call);
}

}  // namespace

#define CURVAX_BINDING ffi::Ffi::Bind().Ctx<Stream>().RemainingArgs().RemainingRets()

XLA_FFI_DEFINE_HANDLER_SYMBOL(CgUpdateCudaHandler, CgUpdate, CURVAX_BINDING, {kGraphSafe});
XLA_FFI_DEFINE_HANDLER_SYMBOL(CgDirectionCudaHandler, CgDirection, CURVAX_BINDING, {kGraphSafe});
XLA_FFI_DEFINE_HANDLER_SYMBOL(DotsCudaHandler, Dots, CURVAX_BINDING, {kGraphSafe});

}  // namespace curvax
