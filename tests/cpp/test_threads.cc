// What runs on several threads, under the thread sanitizer: pieces are done once each, results do not depend on the
// number of threads, and handlers may run at the same time.

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "call_frame.h"
#include "check.h"
#include "cpu/batched_handlers.h"
#include "cpu/gram.h"
#include "cpu/linalg/handlers.h"
#include "cpu/parallel.h"
#include "cpu/tree_cg.h"

namespace curvax {
namespace {

using call_frame::Buffer;
using call_frame::Call;
using xla::ffi::DataType;

std::vector<int> visits;  // written without atomics: no piece may be done twice, or seen before it is done
std::atomic<int> unfinished{0};

xla::ffi::Error Visit(xla::ffi::ThreadPool pool, int64_t threads) {
  ParallelFor(pool, threads, static_cast<int64_t>(visits.size()), [](int64_t piece) {
    // Long enough for the other threads to take pieces too.
    if (visits.size() <= 50) std::this_thread::sleep_for(std::chrono::microseconds(100));
    ++visits[piece];
  });
  for (int visit : visits) unfinished += visit != 1;
  return xla::ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kVisit, Visit, xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attr<int64_t>("threads"));

void TestParallelFor() {
  for (int64_t pieces : {0, 1, 2, 3, 50, 1000})
    for (int64_t threads : {-1, 0, 1, 2, 5, 64}) {
      visits.assign(pieces, 0);
      const auto error = Call(kVisit, {}, {}, threads);
      CHECK(!error && unfinished == 0, "%d pieces on %d threads", static_cast<int>(pieces), static_cast<int>(threads));
    }
}

Buffer Filled(std::vector<int64_t> dims, float first) {
  Buffer buffer(DataType::F32, std::move(dims));
  for (int64_t i = 0; i < buffer.size(); ++i) buffer.as<float>()[i] = first + static_cast<float>(i % 97) / 97;
  return buffer;
}

struct Update {
  std::vector<Buffer> operands, results;

  Update() {
    operands = {Filled({2}, 0.5f), Filled({2}, 0.25f)};
    for (int vector = 0; vector < 4; ++vector) {
      operands.push_back(Filled({2, 70001}, static_cast<float>(vector)));
      operands.push_back(Filled({2, 3, 7}, static_cast<float>(-vector)));
    }
    results = {Filled({2}, 0)};
    for (int vector = 0; vector < 2; ++vector) {
      results.push_back(Filled({2, 70001}, 0));
      results.push_back(Filled({2, 3, 7}, 0));
    }
  }

  void Run(int64_t threads) const {
    const auto error = Call(CgUpdateHandler, operands, results, threads, 3);
    CHECK(!error, "%s", error->c_str());
  }

  bool Same(const Update& other) const {
    for (size_t i = 0; i < results.size(); ++i)
      if (std::memcmp(results[i].data, other.results[i].data, 4 * results[i].size()) != 0) return false;
    return true;
  }
};

void TestHandlers() {
  const Update one;
  one.Run(1);
  for (int64_t threads : {0, 2, 7}) {
    const Update many;
    many.Run(threads);
    CHECK(many.Same(one), "the result depends on the threads: %d", static_cast<int>(threads));
  }
  // Several handlers at once, each with tasks of its own.
  std::vector<Update> calls(3);
  std::vector<std::thread> callers;
  for (const Update& call : calls) callers.emplace_back([&call] { call.Run(3); });
  for (std::thread& caller : callers) caller.join();
  for (const Update& call : calls) CHECK(call.Same(one), "handlers disturb each other");
}

// One large system, whose block columns wait for each other, and a Gram matrix in tiles.
void TestBlocks() {
  const int64_t n = 300;
  const Buffer matrix = Filled({1, n, n}, 0), rhs = Filled({1, n}, 1), damping = Filled({1}, 2 * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) matrix.as<float>()[j * n + i] = matrix.as<float>()[i * n + j];
  const Buffer activations = Filled({40, 1, 1, 3}, 0), cotangents = Filled({40, 1, 5, 1, 4}, 1);
  std::vector<Buffer> values, grams;
  for (int64_t threads : {1, 2, 4}) {
    values.push_back(Filled({1, n}, 0));
    const std::vector<Buffer> results = {values.back(), Buffer(DataType::S32, {1}), Buffer(DataType::S32, {1}),
                                         Filled({1}, 0)};
    CHECK(!Call(BatchedCholeskySolveHandler, {matrix, rhs, damping}, results, threads, 4), "a large system");
    grams.push_back(Filled({200, 200}, 0));
    CHECK(!Call(GramAccumulateHandler, {activations, cotangents}, {grams.back()},
                {{"scaled", {1}, call_frame::Attribute::kIntegers},
                 {"start", {0}},
                 {"against", {0}},
                 {"mirror", {1}},
                 {"threads", {threads}}},
                4),
          "a Gram matrix");
    CHECK(std::memcmp(values[0].data, values.back().data, 4 * n) == 0, "a system depends on the threads");
    CHECK(std::memcmp(grams[0].data, grams.back().data, 4 * 200 * 200) == 0, "a matrix depends on the threads");
  }
}

// A factorization that shares each of its steps, two of them at once, and a stack with threads inside and around.
void TestFactorisations() {
  const int64_t n = 180;
  const Buffer large = Filled({1, n, n}, 0), small = Filled({9, 20, 20}, 0);
  const auto run = [](const Buffer& matrices, int64_t threads) {
    const int64_t count = matrices.dims[0], size = matrices.dims[1];
    std::vector<Buffer> results = {Filled({count, size}, 0), Filled({count, size, size}, 0),
                                   Buffer(DataType::S32, {count}), Filled({count, size, size}, 0),
                                   Filled({count, size, size}, 0)};
    CHECK(!Call(EighHandler, {matrices}, {results[0], results[1], results[2]}, {{"threads", {threads}}}, 4), "eigh");
    CHECK(!Call(QrHandler, {matrices}, {results[3], results[4], results[2]}, {{"threads", {threads}}}, 4), "qr");
    return results;
  };
  for (const Buffer& matrices : {large, small}) {
    const std::vector<Buffer> one = run(matrices, 1);
    std::vector<std::vector<Buffer>> others(2);
    std::vector<std::thread> callers;
    for (auto& other : others) callers.emplace_back([&] { other = run(matrices, 3); });
    for (std::thread& caller : callers) caller.join();
    for (const auto& other : others)
      for (size_t i = 0; i < one.size(); ++i)
        CHECK(std::memcmp(one[i].data, other[i].data, 4 * one[i].size()) == 0, "result %d depends on the threads",
              static_cast<int>(i));
  }
}

}  // namespace
}  // namespace curvax

int main() {
  curvax::TestParallelFor();
  curvax::TestHandlers();
  curvax::TestBlocks();
  curvax::TestFactorisations();
  std::puts("ok");
}
