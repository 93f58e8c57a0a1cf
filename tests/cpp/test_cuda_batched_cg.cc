// The CUDA kernel of batched_cg, emulated, against Gaussian elimination in long double.

#include "check.h"
#include "cuda_emulator.h"
//
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/batched_cg.cuh"

namespace curvax {
namespace {

// Systems of one size: matrices with eigenvalues between 1 and about 9, and right-hand sides.
template <typename T>
struct Systems {
  int n, count;
  std::vector<T> a, b, value, residual, rtol{T(1e-5)};
  std::vector<int32_t> maxiter{1000}, result, iterations;

  Systems(int n_, int count_) : n(n_), count(count_), a(n * n * count), b(n * count), value(b.size()), residual(count) {
    result.resize(count);
    iterations.resize(count);
    std::mt19937 random(n);
    std::normal_distribution<double> normal;
    std::vector<double> half(n * n);
    for (int s = 0; s < count; ++s) {
      for (double& h : half) h = normal(random) / std::sqrt(n);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
          double sum = i == j;
          for (int k = 0; k < n; ++k) sum += 2 * half[i * n + k] * half[j * n + k];
          a[(s * n + i) * n + j] = static_cast<T>(sum);
        }
      for (int i = 0; i < n; ++i) b[s * n + i] = static_cast<T>(normal(random));
    }
  }

  CgArguments<T> Arguments() {
    CgArguments<T> arguments = {};
    arguments.matrices = a.data();
    arguments.rhs = b.data();
    arguments.rtol = rtol.data();
    arguments.maxiter = maxiter.data();
    arguments.value = value.data();
    arguments.residual = residual.data();
    arguments.result = result.data();
    arguments.iterations = iterations.data();
    arguments.n = n;
    const Dims batch{count};
    const Operand each{ffi::DataType::F32, {count, n}, nullptr}, all{ffi::DataType::F32, {1}, nullptr};
    CHECK(MakeBroadcast("test", 0, each, batch, {n}, arguments.of_rhs).success(), "n %d", n);
    CHECK(MakeBroadcast("test", 0, all, batch, {}, arguments.of_rtol).success(), "n %d", n);
    arguments.of_matrices = arguments.of_start = arguments.of_inverse = arguments.of_rhs;
    arguments.of_maxiter = arguments.of_rtol;
    return arguments;
  }
};

std::vector<long double> Eliminate(std::vector<long double> a, std::vector<long double> b) {
  const int n = static_cast<int>(b.size());
  for (int k = 0; k < n; ++k)
    for (int i = k + 1; i < n; ++i) {
      const long double factor = a[i * n + k] / a[k * n + k];
      for (int j = k; j < n; ++j) a[i * n + j] -= factor * a[k * n + j];
      b[i] -= factor * b[k];
    }
  for (int i = n - 1; i >= 0; --i) {
    for (int j = i + 1; j < n; ++j) b[i] -= a[i * n + j] * b[j];
    b[i] /= a[i * n + i];
  }
  return b;
}

template <typename T, typename Element, typename Spread>
void Run(const CgArguments<T>& arguments, int count) {
  emulator::Launch(dim3(count), dim3(Spread::kThreads), CgShared<T, Spread>::kBytes,
                   [&] { BatchedCgKernel<T, Element, Spread>(arguments); });
}

template <typename T, typename Spread>
void TestSolutions(int n) {
  Systems<T> systems(n, 2);
  Run<T, T, Spread>(systems.Arguments(), 2);
  for (int s = 0; s < 2; ++s) {
    CHECK(systems.result[s] == kConverged, "n %d: result %d", n, systems.result[s]);
    CHECK(systems.iterations[s] >= 1 && systems.iterations[s] <= 40, "n %d: %d", n, systems.iterations[s]);
    CHECK(systems.residual[s] <= 2e-5, "n %d: residual %g", n, static_cast<double>(systems.residual[s]));
    const std::vector<long double> a(systems.a.begin() + s * n * n, systems.a.begin() + (s + 1) * n * n);
    const std::vector<long double> b(systems.b.begin() + s * n, systems.b.begin() + (s + 1) * n);
    const auto exact = Eliminate(a, b);
    for (int i = 0; i < n; ++i)
      CHECK(std::abs(systems.value[s * n + i] - exact[i]) < 1e-3, "n %d, unknown %d: %g, exact %Lg", n, i,
            static_cast<double>(systems.value[s * n + i]), exact[i]);
  }
}

// Indefinite, zero and NaN matrices, and right-hand sides that are zero or NaN.
void TestOutcomes() {
  const int n = 13;
  Systems<float> systems(n, 6);
  const auto matrix = [&](int s) { return systems.a.data() + s * n * n; };
  std::transform(matrix(1), matrix(2), matrix(1), [](float v) { return -v; });
  std::fill(matrix(2), matrix(3), 0.0f);
  matrix(3)[5] = matrix(3)[5 * n] = std::numeric_limits<float>::quiet_NaN();
  std::fill(systems.b.begin() + 4 * n, systems.b.begin() + 5 * n, 0.0f);
  systems.b[5 * n + 1] = std::numeric_limits<float>::infinity();
  Run<float, float, Spread<16, 2, 0>>(systems.Arguments(), 6);
  const int expected[] = {kConverged, kNegativeCurvature, kBreakdown, kNonFinite, kConverged, kNonFinite};
  for (int s = 0; s < 6; ++s) CHECK(systems.result[s] == expected[s], "system %d: %d", s, systems.result[s]);
  CHECK(systems.iterations[4] == 0 && systems.residual[4] == 0, "%d iterations", systems.iterations[4]);
  for (int i = 0; i < n; ++i) {
    CHECK(systems.value[n + i] * systems.b[n + i] >= 0, "unknown %d", i);
    CHECK(systems.value[2 * n + i] == 0 && systems.value[4 * n + i] == 0, "unknown %d", i);
  }
}

// A start and a preconditioner change the way and not the solution; the solution itself is where nothing is left to do.
void TestStartAndInverse() {
  const int n = 30;
  Systems<float> systems(n, 2);
  auto arguments = systems.Arguments();
  Run<float, float, Spread<32, 1, 0>>(arguments, 2);
  const std::vector<float> solution = systems.value;
  std::vector<float> inverse(2 * n), start = solution;
  for (int i = 0; i < 2 * n; ++i) inverse[i] = 1 + i % 3;
  for (int i = 0; i < n; ++i) start[i] = -start[i];
  arguments.inverse = inverse.data();
  arguments.start = start.data();
  systems.rtol[0] = 2e-5f;
  Run<float, float, Spread<32, 1, 0>>(arguments, 2);
  CHECK(systems.iterations[1] == 0, "%d", systems.iterations[1]);
  CHECK(systems.iterations[0] > 2, "%d", systems.iterations[0]);
  for (int i = 0; i < 2 * n; ++i) CHECK(std::abs(systems.value[i] - solution[i]) < 1e-3, "unknown %d", i);
}

void TestNarrowMatrices() {
  const int n = 20;
  Systems<float> systems(n, 2);
  std::vector<uint16_t> narrow(systems.a.size());
  for (size_t k = 0; k < narrow.size(); ++k) {
    uint32_t bits;
    std::memcpy(&bits, &systems.a[k], sizeof(bits));
    narrow[k] = static_cast<uint16_t>(bits >> 16);
    bits = static_cast<uint32_t>(narrow[k]) << 16;
    std::memcpy(&systems.a[k], &bits, sizeof(bits));
  }
  auto arguments = systems.Arguments();
  Run<float, float, Spread<32, 1, 0>>(arguments, 2);
  const std::vector<float> wide = systems.value;
  arguments.matrices = narrow.data();
  Run<float, uint16_t, Spread<32, 1, 0>>(arguments, 2);
  CHECK(wide == systems.value, "bfloat16 matrices and the same in float32 differ");
}

// A tolerance that float32 cannot meet on an ill-conditioned matrix: the recurrence meets it, the solution does not.
void TestInaccurate() {
  const int n = 64;
  Systems<float> systems(n, 1);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) systems.a[i * n + j] += i == j ? std::pow(1.2f, static_cast<float>(i)) : 0.0f;
  systems.rtol[0] = 1e-7f;
  Run<float, float, Spread<64, 2, 0>>(systems.Arguments(), 1);
  CHECK(systems.result[0] == kInaccurate && systems.iterations[0] < 1000, "result %d after %d", systems.result[0],
        systems.iterations[0]);
  CHECK(systems.residual[0] > 2e-7, "%g", static_cast<double>(systems.residual[0]));
}

}  // namespace
}  // namespace curvax

int main() {
  using namespace curvax;
  using emulator::Order;
  for (Order order : {Order::kAscending, Order::kDescending, Order::kShuffled}) {
    emulator::order = order;
    for (int n : {1, 3, 16}) TestSolutions<float, Spread<16, 2, 0>>(n);
    TestSolutions<float, Spread<32, 1, 0>>(31);
    TestSolutions<double, Spread<64, 4, 0>>(50);
    TestOutcomes();
    TestStartAndInverse();
    TestNarrowMatrices();
    TestInaccurate();
  }
  TestSolutions<float, Spread<128, 2, 16>>(100);
  TestSolutions<double, Spread<128, 2, 0>>(128);
  TestSolutions<float, Spread<256, 2, 80>>(200);
  std::puts("ok");
}
