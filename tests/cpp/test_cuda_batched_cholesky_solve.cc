// The CUDA kernel of batched_cholesky_solve, emulated: the residual of what it finds, and what it says of the rest.

#include "check.h"
#include "cuda_emulator.h"
//
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cuda/batched_cholesky_solve.cuh"

namespace curvax {
namespace {

template <typename T>
struct Systems {
  int n, count;
  std::vector<T> a, b, value, residual, damping{T(0.25)};
  std::vector<int32_t> result, iterations;

  Systems(int n_, int count_)
      : n(n_),
        count(count_),
        a(n * n * count),
        b(n * count),
        value(n * count),
        residual(count),
        result(count),
        iterations(count, -1) {
    std::mt19937 random(n);
    std::normal_distribution<double> normal;
    std::vector<double> half(n * n);
    for (int s = 0; s < count; ++s) {
      for (double& h : half) h = normal(random) / std::sqrt(n);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
          double sum = i == j ? 0.25 : 0;
          for (int k = 0; k < n; ++k) sum += 2 * half[i * n + k] * half[j * n + k];
          a[(s * n + i) * n + j] = static_cast<T>(sum);
        }
      for (int i = 0; i < n; ++i) b[s * n + i] = static_cast<T>(normal(random));
    }
  }

  void Run() {
    CholeskyArguments<T> arguments = {};
    arguments.matrices = a.data();
    arguments.rhs = b.data();
    arguments.damping = damping.data();
    arguments.value = value.data();
    arguments.residual = residual.data();
    arguments.result = result.data();
    arguments.iterations = iterations.data();
    arguments.n = n;
    const Dims batch{count};
    const Operand each{ffi::DataType::F32, {count, n}, nullptr}, all{ffi::DataType::F32, {1}, nullptr};
    CHECK(MakeBroadcast("test", 0, each, batch, {n}, arguments.of_rhs).success(), "n %d", n);
    CHECK(MakeBroadcast("test", 0, all, batch, {}, arguments.of_damping).success(), "n %d", n);
    arguments.of_matrices = arguments.of_rhs;
    emulator::Launch(dim3(count), dim3(kCholeskyThreads), CholeskyShared<T>::Bytes(n),
                     [&] { BatchedCholeskySolveKernel<T, T>(arguments); });
  }
};

template <typename T>
void TestSolutions(int n) {
  Systems<T> systems(n, 2);
  systems.Run();
  for (int s = 0; s < 2; ++s) {
    CHECK(systems.result[s] == kConverged && systems.iterations[s] == 0, "n %d: %d", n, systems.result[s]);
    long double rest = 0, size = 0;
    for (int i = 0; i < n; ++i) {
      long double left = systems.b[s * n + i] - 0.25L * systems.value[s * n + i];
      for (int j = 0; j < n; ++j)
        left -= static_cast<long double>(systems.a[(s * n + i) * n + j]) * systems.value[s * n + j];
      rest += left * left;
      size += static_cast<long double>(systems.b[s * n + i]) * systems.b[s * n + i];
    }
    const double residual = static_cast<double>(std::sqrt(rest / size));
    const double bound = 64 * static_cast<double>(std::numeric_limits<T>::epsilon());
    CHECK(residual <= bound, "n %d: residual %g", n, residual);
    CHECK(std::abs(residual - systems.residual[s]) <= bound, "n %d: it says %g, it is %g", n,
          static_cast<double>(systems.residual[s]), residual);
  }
}

void TestOutcomes() {
  const int n = 21;
  Systems<float> systems(n, 6);
  systems.damping[0] = 0;
  const auto matrix = [&](int s) { return systems.a.data() + s * n * n; };
  std::transform(matrix(1), matrix(2), matrix(1), [](float v) { return -v; });
  std::fill(matrix(2), matrix(3), 0.0f);
  matrix(3)[5] = matrix(3)[5 * n] = std::numeric_limits<float>::quiet_NaN();
  std::fill(systems.b.begin() + 4 * n, systems.b.begin() + 5 * n, 0.0f);
  systems.b[5 * n + 1] = std::numeric_limits<float>::infinity();
  systems.Run();
  const int expected[] = {kConverged, kNotPositiveDefinite, kNotPositiveDefinite, kNonFinite, kConverged, kNonFinite};
  for (int s = 0; s < 6; ++s) {
    CHECK(systems.result[s] == expected[s], "system %d: %d", s, systems.result[s]);
    for (int i = 0; i < n; ++i)
      CHECK(std::isnan(systems.value[s * n + i]) == (expected[s] != kConverged), "system %d, unknown %d", s, i);
  }
  CHECK(systems.residual[4] == 0 && systems.value[4 * n] == 0, "%g", static_cast<double>(systems.residual[4]));
}

}  // namespace
}  // namespace curvax

int main() {
  using namespace curvax;
  using emulator::Order;
  for (Order order : {Order::kAscending, Order::kDescending, Order::kShuffled}) {
    emulator::order = order;
    for (int n : {1, 2, 3, 31, 33}) TestSolutions<float>(n);
    TestSolutions<double>(40);
    TestOutcomes();
  }
  TestSolutions<float>(128);
  TestSolutions<double>(128);
  std::puts("ok");
}
