// The handlers of tree_cg as XLA calls them, on the CPU and (emulated) on the GPU: random calls, most of them spoiled
// in one way or another. A call that fits gives what long double gives; every other is refused with a sentence that
// names the op, and none touches memory that is not its own.

#include "check.h"
#include "cuda_emulator.h"
//
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "call_frame.h"
#include "cpu/tree_cg.h"
#include "cuda/tree_cg.cu"

namespace curvax {
namespace {

using call_frame::Buffer;
using call_frame::Call;
using ffi::DataType;

std::mt19937 randomness(20);

int64_t Below(int64_t bound) { return static_cast<int64_t>(randomness() % bound); }

struct Platform {
  const char* name;
  XLA_FFI_Handler *update, *direction, *dots;
  bool cuda;
};
const Platform kPlatforms[] = {
    {"cpu", CgUpdateHandler, CgDirectionHandler, DotsHandler, false},
    {"cuda", CgUpdateCudaHandler, CgDirectionCudaHandler, DotsCudaHandler, true},
};

// A call with leaves of random shapes, its results and its exact answer.
struct Random {
  const Platform& platform;
  DataType dtype;
  std::vector<int64_t> batch;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<Buffer> operands, results;

  explicit Random(const Platform& p) : platform(p), dtype(Below(2) ? DataType::F32 : DataType::F64) {
    for (int64_t axes = Below(3); axes > 0; --axes) batch.push_back(Below(4));
    for (int64_t leaves = Below(6); leaves > 0; --leaves) {
      std::vector<int64_t> shape;
      for (int64_t axes = Below(3); axes >= 0; --axes) shape.push_back(Below(axes ? 9 : 90));
      if (Below(12) == 0) shape = {4096 + Below(3) - 1, Below(2) + 1};
      shapes.push_back(shape);
    }
  }

  Buffer Scalar() const { return Filled(batch); }

  Buffer Leaf(size_t leaf) const {
    std::vector<int64_t> dims = batch;
    dims.insert(dims.end(), shapes[leaf].begin(), shapes[leaf].end());
    return Filled(dims);
  }

  // Standard normal elements; not every buffer begins where 16 bytes can be read at once.
  Buffer Filled(const std::vector<int64_t>& dims) const {
    Buffer buffer(dtype, dims, Below(2) * ffi::ByteWidth(dtype));
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < buffer.size(); ++i) Set(buffer, i, normal(randomness));
    return buffer;
  }

  void Set(const Buffer& buffer, int64_t i, double value) const {
    if (dtype == DataType::F32)
      buffer.as<float>()[i] = static_cast<float>(value);
    else
      buffer.as<double>()[i] = value;
  }

  double Get(const Buffer& buffer, int64_t i) const {
    return dtype == DataType::F32 ? buffer.as<float>()[i] : buffer.as<double>()[i];
  }

  int64_t Members() const { return Buffer(DataType::U8, batch).size(); }

  void AddVector(std::vector<Buffer>& to) const {
    for (size_t leaf = 0; leaf < shapes.size(); ++leaf) to.push_back(Leaf(leaf));
  }

  void AddScratch(int64_t products) {
    if (!platform.cuda) return;
    int64_t blocks = 0;
    for (const auto& shape : shapes) blocks += (Buffer(DataType::U8, shape).size() + kBlock - 1) / kBlock;
    std::vector<int64_t> dims = batch;
    dims.push_back(8 * products * blocks);
    results.emplace_back(DataType::U8, dims);
  }

  std::optional<std::string> Run(XLA_FFI_Handler* handler) const {
    return Call(handler, operands, results, platform.cuda ? std::nullopt : std::optional(Below(5)), 1 + Below(3));
  }

  long double Epsilon() const {
    return dtype == DataType::F32 ? std::numeric_limits<float>::epsilon() : std::numeric_limits<double>::epsilon();
  }

  void Near(const Buffer& got, int64_t i, long double exact, long double bound, const char* what) const {
    CHECK(std::abs(Get(got, i) - exact) <= bound, "%s %s: element %d is %.17g, expected %.17Lg", platform.name, what,
          static_cast<int>(i), Get(got, i), exact);
  }

  // Checks result `index` to be the inner product of two vectors, whose leaves begin there.
  void NearDot(size_t index, const std::vector<Buffer>& a, size_t a0, const std::vector<Buffer>& b, size_t b0) const {
    for (int64_t member = 0; member < Members(); ++member) {
      long double exact = 0, magnitude = 0;
      for (size_t leaf = 0; leaf < shapes.size(); ++leaf) {
        const int64_t n = a[a0 + leaf].size() / Members();
        for (int64_t i = member * n; i < (member + 1) * n; ++i) {
          const long double term = static_cast<long double>(Get(a[a0 + leaf], i)) * Get(b[b0 + leaf], i);
          exact += term;
          magnitude += std::abs(term);
        }
      }
      Near(results[index], member, exact, 64 * Epsilon() * magnitude, "inner product");
    }
  }
};

void SetUpdate(Random& call) {
  call.operands = {call.Scalar(), call.Scalar()};
  for (int vector = 0; vector < 4; ++vector) call.AddVector(call.operands);
  call.results = {call.Scalar()};
  for (int vector = 0; vector < 2; ++vector) call.AddVector(call.results);
  call.AddScratch(1);
}

void CheckUpdate(const Random& call) {
  const size_t n = call.shapes.size();
  for (size_t leaf = 0; leaf < n; ++leaf) {
    const auto at = [&](size_t vector, int64_t i) -> long double {
      return call.Get(call.operands[2 + vector * n + leaf], i);
    };
    for (int64_t i = 0; i < call.operands[2 + leaf].size(); ++i) {
      const int64_t member = i / (call.operands[2 + leaf].size() / call.Members());
      const long double a = call.Get(call.operands[0], member), d = call.Get(call.operands[1], member);
      const long double x = at(0, i), p = at(1, i), r = at(2, i), q = at(3, i);
      const long double bound = 8 * call.Epsilon();
      call.Near(call.results[1 + leaf], i, x + a * p, bound * (std::abs(x) + std::abs(a * p)), "x");
      call.Near(call.results[1 + n + leaf], i, r - a * (q + d * p),
                bound * (std::abs(r) + std::abs(a) * (std::abs(q) + std::abs(d * p))), "r");
    }
  }
  call.NearDot(0, call.results, 1 + n, call.results, 1 + n);
}

void SetDirection(Random& call) {
  call.operands = {call.Scalar()};
  for (int vector = 0; vector < 2; ++vector) call.AddVector(call.operands);
  call.AddVector(call.results);
}

void CheckDirection(const Random& call) {
  const size_t n = call.shapes.size();
  for (size_t leaf = 0; leaf < n; ++leaf)
    for (int64_t i = 0; i < call.results[leaf].size(); ++i) {
      const long double beta = call.Get(call.operands[0], i / (call.results[leaf].size() / call.Members()));
      const long double z = call.Get(call.operands[1 + leaf], i), p = call.Get(call.operands[1 + n + leaf], i);
      call.Near(call.results[leaf], i, z + beta * p, 4 * call.Epsilon() * (std::abs(z) + std::abs(beta * p)), "p");
    }
}

// One to five pairs; now and then (a, b), (a, a), (b, b).
void SetDots(Random& call) {
  const size_t n = call.shapes.size();
  const int64_t pairs = 1 + Below(5);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    call.AddVector(call.operands);
    call.AddVector(call.operands);
    call.results.push_back(call.Scalar());
  }
  if (pairs == 3 && Below(2))
    for (size_t leaf = 0; leaf < n; ++leaf) {
      call.operands[2 * n + leaf] = call.operands[3 * n + leaf] = call.operands[leaf];
      call.operands[4 * n + leaf] = call.operands[5 * n + leaf] = call.operands[n + leaf];
    }
  call.AddScratch(pairs);
}

void CheckDots(const Random& call) {
  const size_t n = call.shapes.size();
  const size_t pairs = call.results.size() - call.platform.cuda;
  for (size_t pair = 0; pair < pairs; ++pair)
    call.NearDot(pair, call.operands, 2 * pair * n, call.operands, (2 * pair + 1) * n);
}

struct Op {
  const char* name;
  XLA_FFI_Handler* Platform::* handler;
  void (*set)(Random&);
  void (*check)(const Random&);
};
const Op kOps[] = {
    {"cg_update", &Platform::update, SetUpdate, CheckUpdate},
    {"cg_direction", &Platform::direction, SetDirection, CheckDirection},
    {"dots", &Platform::dots, SetDots, CheckDots},
};

// Spoils one buffer of a call, or the number of them; says whether it could.
bool Spoil(Random& call) {
  std::vector<Buffer>& list = Below(2) || call.results.empty() ? call.operands : call.results;
  if (list.empty()) return false;
  const int64_t which = Below(list.size());
  Buffer& buffer = list[which];
  switch (Below(5)) {
    case 0:
      list.erase(list.begin() + which);
      return true;
    case 1:
      list.insert(list.begin() + which, buffer.Copy());
      return true;
    case 2: {
      constexpr DataType others[] = {DataType::F16, DataType::BF16, DataType::S32, DataType::PRED, DataType::C64};
      buffer = Buffer(others[Below(5)], buffer.dims);
      return true;
    }
    case 3:
      if (buffer.dims.empty()) return false;
      buffer.dims[Below(buffer.dims.size())] += 1 + Below(2);
      buffer = Buffer(buffer.dtype, buffer.dims);
      return true;
    default:
      buffer.dims.insert(buffer.dims.begin() + Below(buffer.dims.size() + 1), 2);
      buffer = Buffer(buffer.dtype, buffer.dims);
      return true;
  }
}

void TestRandomCalls(int calls) {
  int refused = 0;
  for (int i = 0; i < calls; ++i)
    for (const Platform& platform : kPlatforms)
      for (const Op& op : kOps) {
        Random call(platform);
        op.set(call);
        const bool spoiled = Below(3) == 0 && Spoil(call);
        const auto error = call.Run(platform.*op.handler);
        if (!spoiled) {
          CHECK(!error, "%s: %s", platform.name, error->c_str());
          op.check(call);
          continue;
        }
        // A spoiled call may still be a call: an operand more and one less in another group, say, of the same shape.
        if (!error) continue;
        ++refused;
        CHECK(error->rfind(std::string("curvax ") + op.name + ": ", 0) == 0, "%s", error->c_str());
      }
  CHECK(refused > calls, "only %d calls were refused", refused);
}

void CheckRefused(const std::optional<std::string>& error, const char* sentence) {
  CHECK(error && error->find(sentence) != std::string::npos, "got: %s", error ? error->c_str() : "no error");
}

// What only the GPU's handlers refuse.
void TestCudaRefusals() {
  const Buffer scalar(DataType::F32, {}), leaf(DataType::F32, {5000});
  for (Buffer* v : {const_cast<Buffer*>(&leaf)}) std::fill_n(v->as<float>(), 5000, 1.0f);
  const auto dots = [&](const Buffer& scratch) {
    return Call(DotsCudaHandler, {leaf, leaf}, {scalar, scratch}, std::nullopt);
  };
  CHECK(!dots(Buffer(DataType::U8, {16})) && *scalar.as<float>() == 5000, "%g", *scalar.as<float>());
  CheckRefused(dots(Buffer(DataType::U8, {8})), "curvax dots: result 1 has shape (8), expected (16)");
  CheckRefused(dots(Buffer(DataType::F64, {2})), "curvax dots: result 1 has dtype F64, expected U8");
  CheckRefused(dots(Buffer(DataType::U8, {16}, 4)), "the scratch memory, is not aligned to 8 bytes");
  CheckRefused(Call(DotsCudaHandler, {leaf, leaf}, {scalar}, std::nullopt), "got 2 operands for 0 results");
  CheckRefused(Call(CgUpdateCudaHandler, {scalar, scalar, leaf, leaf, leaf, leaf}, {scalar, leaf, leaf}, std::nullopt),
               "got 3 results for 1 leaves, expected rr and the leaves of x and r, and scratch memory: 4");
  // What CUDA itself refuses to launch.
  emulator::launch_status = cudaErrorInvalidConfiguration;
  CheckRefused(dots(Buffer(DataType::U8, {16})),
               "curvax dots: the CUDA kernel for F32(5000) was not launched: cudaErrorInvalidConfiguration, invalid");
  emulator::launch_status = cudaSuccess;
}

// A thousand leaves, in place, on every platform.
void TestManyLeaves() {
  for (const Platform& platform : kPlatforms) {
    Random call(platform);
    call.dtype = DataType::F32;
    call.batch = {};
    call.shapes.clear();
    for (int64_t leaf = 0; leaf < 1000; ++leaf) call.shapes.push_back({leaf % 4});
    SetDots(call);
    CHECK(!call.Run(platform.dots), "%s", platform.name);
    CheckDots(call);
  }
}

// (a, b), (a, a), (b, b) but for one vector.
void TestAlmostGram() {
  for (const Platform& platform : kPlatforms)
    for (int other = 0; other < 6; ++other) {
      Random call(platform);
      call.batch = {};
      call.shapes = {{50}};
      const Buffer a = call.Leaf(0), b = call.Leaf(0);
      call.operands = {a, b, a, a, b, b};
      call.operands[other] = call.Leaf(0);
      call.results = {call.Scalar(), call.Scalar(), call.Scalar()};
      call.AddScratch(3);
      CHECK(!call.Run(platform.dots), "%s", platform.name);
      CheckDots(call);
    }
}

// x and r are also the results: every element is read before it is written.
void TestInPlace() {
  for (const Platform& platform : kPlatforms)
    for (int i = 0; i < 20; ++i) {
      Random call(platform);
      SetUpdate(call);
      const Random before = [&] {
        Random copy = call;
        for (Buffer& operand : copy.operands) operand = operand.Copy();
        return copy;
      }();
      const size_t n = call.shapes.size();
      for (size_t leaf = 0; leaf < n; ++leaf) {
        call.results[1 + leaf] = call.operands[2 + leaf];
        call.results[1 + n + leaf] = call.operands[2 + 2 * n + leaf];
      }
      CHECK(!call.Run(platform.update), "%s", platform.name);
      Random seen = before;
      seen.results = call.results;
      CheckUpdate(seen);
    }
}

}  // namespace
}  // namespace curvax

int main() {
  curvax::TestCudaRefusals();
  curvax::TestRandomCalls(60);
  curvax::TestInPlace();
  curvax::TestAlmostGram();
  curvax::TestManyLeaves();
  std::puts("ok");
}
