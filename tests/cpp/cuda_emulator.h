// Runs a CUDA kernel on the CPU, thread by thread, so that its values and its memory accesses can be proved under
// sanitizers on a machine without a GPU. Include it before any .cuh file and compile as plain C++.
//
// Each CUDA thread is a fiber (ucontext). Within a block exactly one fiber runs at a time, until it ends or waits at a
// barrier; between two barriers the fibers run in an order that the test chooses: a kernel whose result depends on that
// order lacks a barrier. What is undefined in CUDA (a barrier that some threads never reach, a warp instruction whose
// lanes differ or have ended) stops the program with a sentence. Blocks run one after the other, so a kernel must not
// wait for another block, as it must not on a GPU.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define CURVAX_CUDA_EMULATOR
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, so the block's memory may be static.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

inline constexpr int kWarp = 32;
// A kernel's parameters, up to 32 KB, are copied onto it.
inline constexpr size_t kStackBytes = 256 << 10;
inline constexpr size_t kGuardBytes = 64 << 10;

// The order in which the fibers of a block run between two barriers.
enum class Order { kAscending, kDescending, kShuffled };
inline Order order = Order::kAscending;

[[noreturn]] inline void Fail(const char* sentence) {
  std::fprintf(stderr, "CUDA emulator: %s (block %u, thread %u)\n", sentence, blockIdx.x, threadIdx.x);
  std::abort();
}

// What a fiber waits for.
enum class Wait { kNothing, kBlock, kWarp, kEnded };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  uint3 index;
  Wait wait = Wait::kNothing;
  unsigned mask = 0;           // of the warp instruction it waits at
  unsigned source = 0;         // the lane whose value it asks for there
  unsigned char shown[16];     // its own value
  unsigned char received[16];  // what it gets
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Block {
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
#endif
};
inline Block* block = nullptr;
inline char* dynamic_shared = nullptr;

inline void ToScheduler(bool for_good) {
  Fiber* self = block->running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, block->scheduler_stack,
                                 block->scheduler_bytes);
#endif
  (void)for_good;
  swapcontext(&self->context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

inline void ToFiber(Fiber& fiber) {
  block->running = &fiber;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->fake_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&block->scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
#endif
}

inline void Enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_bytes);
#endif
  block->kernel();
  block->running->wait = Wait::kEnded;
  ToScheduler(true);
}

// Waits until every thread of the block does.
inline void BlockBarrier() {
  block->running->wait = Wait::kBlock;
  ToScheduler(false);
}

// Waits until every lane of `mask` does; `received` is then what lane `source` shows.
inline void WarpBarrier(unsigned mask, unsigned source) {
  Fiber& self = *block->running;
  if (!(mask >> (self.index.x % kWarp) & 1)) Fail("a thread calls a warp instruction whose mask leaves it out");
  if (!(mask >> source & 1)) Fail("a lane reads from a lane that takes no part in the warp instruction");
  self.source = source;
  self.wait = Wait::kWarp;
  self.mask = mask;
  ToScheduler(false);
}

inline void ReleaseBlock() {
  for (Fiber& fiber : block->fibers)
    if (fiber.wait != Wait::kBlock) return;
  for (Fiber& fiber : block->fibers) fiber.wait = Wait::kNothing;
}

inline void ReleaseWarp(size_t first) {
  const size_t end = std::min(first + kWarp, block->fibers.size());
  for (size_t lane = first; lane < end; ++lane) {
    const Fiber& fiber = block->fibers[lane];
    if (fiber.wait != Wait::kWarp) continue;
    bool all = true;
    for (size_t other = 0; other < kWarp; ++other) {
      if (!(fiber.mask >> other & 1)) continue;
      if (first + other >= end) Fail("a warp instruction names lanes that the block does not have");
      const Fiber& peer = block->fibers[first + other];
      if (peer.wait == Wait::kEnded) Fail("a warp instruction waits for a lane that has ended");
      if (peer.wait == Wait::kWarp && peer.mask != fiber.mask) Fail("lanes of one warp instruction differ in its mask");
      all = all && peer.wait == Wait::kWarp;
    }
    if (!all) continue;
    const unsigned mask = fiber.mask;
    for (size_t other = 0; other < kWarp; ++other) {
      if (!(mask >> other & 1)) continue;
      Fiber& peer = block->fibers[first + other];
      peer.wait = Wait::kNothing;
      std::memcpy(peer.received, block->fibers[first + peer.source].shown, sizeof(peer.received));
    }
  }
}

inline void RunBlock(unsigned seed) {
  std::vector<size_t> turns(block->fibers.size());
  for (size_t t = 0; t < turns.size(); ++t) turns[t] = t;
  if (order == Order::kDescending) std::reverse(turns.begin(), turns.end());
  std::mt19937 random(seed);
  for (;;) {
    if (order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    bool progress = false, left = false;
    for (size_t t : turns) {
      Fiber& fiber = block->fibers[t];
      left = left || fiber.wait != Wait::kEnded;
      if (fiber.wait != Wait::kNothing) continue;
      ToFiber(fiber);
      progress = true;
    }
    if (!left) return;
    if (!progress) Fail("threads wait at a barrier that others never reach");
    for (size_t first = 0; first < block->fibers.size(); first += kWarp) ReleaseWarp(first);
    ReleaseBlock();
  }
}

// The stack of thread `thread`, which no access can leave downwards. Kept from launch to launch: to the system fresh
// ones would be pages to clear each time.
inline char* Stack(unsigned thread) {
  static std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) Fail("no memory for a stack");
    stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
  }
  return stacks[thread];
}

// Sets a fiber to the kernel's first line.
inline void Prepare(Fiber& fiber, unsigned thread) {
  fiber.index = {thread, 0, 0};
  fiber.wait = Wait::kNothing;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &Enter, 0);
}

// Runs kernel() once per thread of every block of the grid; blocks have their x axis alone. `shared_bytes` are what
// DynamicShared gives.
template <typename Kernel>
void Launch(dim3 grid, dim3 threads, size_t shared_bytes, const Kernel& kernel) {
  gridDim = grid;
  blockDim = threads;
  if (threads.y != 1 || threads.z != 1) Fail("blocks of more than one axis are not emulated");
  Block state;
  block = &state;
  state.kernel = kernel;
  state.fibers = std::vector<Fiber>(threads.x);
  for (unsigned t = 0; t < threads.x; ++t) state.fibers[t].stack = Stack(t);
  // Of exactly this size, so that the address sanitizer sees what lies past it.
  void* memory = nullptr;
  if (shared_bytes && posix_memalign(&memory, 128, shared_bytes)) Fail("no memory");
  const std::unique_ptr<void, void (*)(void*)> shared(memory, std::free);
  dynamic_shared = static_cast<char*>(memory);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        // Shared memory begins with anything.
        if (shared_bytes) std::memset(dynamic_shared, 0xa5, shared_bytes);
        for (unsigned t = 0; t < threads.x; ++t) Prepare(state.fibers[t], t);
        RunBlock(x + 1000003u * y + 998244353u * z);
      }
  block = nullptr;
}

// The value that lane `source` of the warp shows at the same instruction.
template <typename T>
T Exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(Fiber::shown) && std::is_trivially_copyable_v<T>);
  Fiber& self = *block->running;
  std::memcpy(self.shown, &value, sizeof(T));
  WarpBarrier(mask, source);
  std::memcpy(&value, self.received, sizeof(T));
  return value;
}

inline unsigned Lane() { return threadIdx.x % kWarp; }

template <typename T, typename Combine>
T Atomic(T* address, const Combine& combine) {
  const T old = *address;
  *address = combine(old);
  return old;
}

}  // namespace emulator

inline void __syncthreads() { emulator::BlockBarrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::WarpBarrier(mask, emulator::Lane()); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulator::Lane();
  return emulator::Exchange(mask, value, lane / width * width + static_cast<unsigned>(source) % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  const unsigned lane = emulator::Lane(), source = lane ^ static_cast<unsigned>(with);
  return emulator::Exchange(mask, value, source / width <= lane / width ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emulator::Lane();
  return emulator::Exchange(mask, value, lane % width + by < static_cast<unsigned>(width) ? lane + by : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emulator::Lane();
  return emulator::Exchange(mask, value, lane % width >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  const unsigned own = predicate ? 1u : 0u;
  for (unsigned source = 0; source < 32; ++source)
    if (mask >> source & 1) votes |= emulator::Exchange(mask, own, source) << source;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T>
T atomicAdd(T* address, T value) {
  return emulator::Atomic(address, [&](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* address, T value) {
  return emulator::Atomic(address, [&](T old) { return std::max(old, value); });
}
template <typename T>
T atomicExch(T* address, T value) {
  return emulator::Atomic(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return emulator::Atomic(address, [&](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulator::Atomic(address, [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

// The runtime as far as csrc/cuda/launch.h needs it.
using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace emulator {
// What the launches that follow report.
inline cudaError_t launch_status = cudaSuccess;
}  // namespace emulator

inline cudaError_t cudaGetLastError() { return emulator::launch_status; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
