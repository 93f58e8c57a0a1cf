// Packed products and the steps of a Cholesky factor, in every instruction set that this processor has, against long
// double; then whole large systems and gram_accumulate as XLA calls them. Buffers end with their last element: the
// address sanitizer sees every access behind it.

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "call_frame.h"
#include "check.h"
#include "cpu/batched_handlers.h"
#include "cpu/gram.h"
#include "levels.h"

namespace curvax {
namespace {
std::mt19937 randomness(5);

template <typename T>
std::vector<T> Normal(int64_t n) {
  std::vector<T> elements(n);
  std::normal_distribution<double> normal;
  for (T& element : elements) element = static_cast<T>(normal(randomness));
  return elements;
}

template <typename T>
void Near(T got, long double exact, long double magnitude, int roundings, const char* what) {
  const long double bound = roundings * static_cast<long double>(std::numeric_limits<T>::epsilon()) * magnitude;
  CHECK(std::abs(static_cast<long double>(got) - exact) <= bound, "%s: got %.17g, expected %.17Lg", what,
        static_cast<double>(got), exact);
}

template <typename T>
void TestProducts(const CompiledLevel<T>& level, int64_t depth) {
  const PanelKernels<T>& kernels = level.kernels.panels;
  const int64_t panel = kernels.panel, strip = kernels.strip;
  const std::vector<T> left = Normal<T>(depth * panel), right = Normal<T>(depth * panel);
  for (int64_t at = 0; at < panel; at += strip) {
    std::vector<T> sums(strip * panel), rest = Normal<T>(strip * panel), before = rest;
    kernels.product(left.data() + at, right.data(), depth, sums.data());
    kernels.subtract(left.data() + at, right.data(), depth, rest.data());
    for (int64_t rows : {strip, strip - 1})
      for (int64_t width : {panel, panel - 1, int64_t{1}}) {
        const int64_t stride = panel + 3;
        const std::vector<T> from = Normal<T>(stride * (rows - 1) + width), scale = Normal<T>(strip * panel);
        std::vector<const T*> scales;
        for (int64_t s = 0; s < strip; ++s) scales.push_back(scale.data() + s * panel);
        std::vector<T> both = from, neither = from;
        kernels.accumulate(left.data() + at, right.data(), depth, scales.data(), from.data(), both.data(), stride, rows,
                           width);
        kernels.accumulate(left.data() + at, right.data(), depth, nullptr, nullptr, neither.data(), stride, rows,
                           width);
        for (int64_t s = 0; s < rows; ++s)
          for (int64_t j = 0; j < width; ++j) {
            const long double sum = sums[s * panel + j], factor = scales[s][j], start = from[s * stride + j];
            Near(neither[s * stride + j], sum, std::abs(sum), 0, level.name);
            Near(both[s * stride + j], start + factor * sum, std::abs(start) + std::abs(factor * sum), 2, level.name);
          }
      }
    for (int64_t s = 0; s < strip; ++s)
      for (int64_t j = 0; j < panel; ++j) {
        long double exact = 0, magnitude = 0;
        for (int64_t k = 0; k < depth; ++k) {
          const long double term = static_cast<long double>(left[k * panel + at + s]) * right[k * panel + j];
          exact += term;
          magnitude += std::abs(term);
        }
        Near(sums[s * panel + j], exact, magnitude, 32, level.name);
        const long double start = before[s * panel + j];
        Near(rest[s * panel + j], start - exact, std::abs(start) + magnitude, 32, level.name);
      }
  }
}

// One panel of identity plus a small random matrix, factorized strip by strip, and solved with.
template <typename T>
void TestTriangles(const CompiledLevel<T>& level) {
  const PanelKernels<T>& kernels = level.kernels.panels;
  const int64_t n = kernels.panel, strip = kernels.strip;
  std::vector<T> a = Normal<T>(n * n), least(n, T(0)), inverse(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) a[i * n + j] = a[j * n + i] = i == j ? static_cast<T>(2 * n) : a[i * n + j];
  std::vector<T> l = a;
  for (int64_t column = 0; column < n; column += strip)
    CHECK(kernels.factorize(l.data(), 0, 0, column, least.data(), inverse.data()), "%s", level.name);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      long double exact = 0;
      for (int64_t k = 0; k < n; ++k) exact += static_cast<long double>(l[k * n + i]) * l[k * n + j];
      Near(a[i * n + j], exact, 2 * n, 8, level.name);
      CHECK(i >= j || l[j * n + i] == 0, "%s: above the diagonal", level.name);
    }
  // The rows of a panel below: X L^T = C. Then L y = c and L^T y = c.
  const std::vector<T> c = Normal<T>(n * n);
  std::vector<T> x = c;
  for (int64_t column = 0; column < n; column += strip)
    kernels.subtract_and_solve(l.data() + column, x.data(), column, l.data() + column * n + column,
                               inverse.data() + column, x.data() + column * n);
  std::vector<T> y(c.begin(), c.begin() + n), z = y;
  kernels.forward(l.data(), 0, inverse.data(), y.data());
  kernels.backward(l.data(), 0, inverse.data(), z.data());
  for (int64_t i = 0; i < n; ++i) {
    long double down = 0, up = 0;
    for (int64_t k = 0; k < n; ++k) {
      down += static_cast<long double>(l[k * n + i]) * y[k];
      up += static_cast<long double>(l[i * n + k]) * z[k];
    }
    Near(c[i], down, 8, 32, level.name);
    Near(c[i], up, 8, 32, level.name);
    for (int64_t row = 0; row < n; ++row) {
      long double product = 0;
      for (int64_t k = 0; k < n; ++k) product += static_cast<long double>(l[k * n + i]) * x[k * n + row];
      Near(c[i * n + row], product, 8, 32, level.name);
    }
  }
  for (T bad : {T(0), T(-1), std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    std::vector<T> broken = a;
    broken[0] = bad;
    CHECK(!kernels.factorize(broken.data(), 0, 0, 0, least.data(), inverse.data()), "%s: a pivot of %g", level.name,
          static_cast<double>(bad));
  }
}

template <typename T>
void TestLevels() {
  for (const CompiledLevel<T>& level : Levels<T>()) {
    for (int64_t depth : {0, 1, 7, 256, 257, 600}) TestProducts<T>(level, depth);
    TestTriangles<T>(level);
  }
}

using call_frame::Buffer;
using call_frame::Call;
using xla::ffi::DataType;

template <typename T>
Buffer Filled(std::vector<int64_t> dims) {
  Buffer buffer(sizeof(T) == 4 ? DataType::F32 : DataType::F64, std::move(dims));
  const std::vector<T> values = Normal<T>(buffer.size());
  std::copy(values.begin(), values.end(), buffer.as<T>());
  return buffer;
}

template <typename T>
void TestSystem(int64_t n, int64_t count, int64_t threads) {
  const DataType dtype = sizeof(T) == 4 ? DataType::F32 : DataType::F64;
  const Buffer matrix = Filled<T>({1, n, n}), rhs = Filled<T>({count, n});
  Buffer damping(dtype, {1});
  *damping.as<T>() = static_cast<T>(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) matrix.as<T>()[j * n + i] = matrix.as<T>()[i * n + j];
  const Buffer value(dtype, {count, n}), result(DataType::S32, {count}), iterations(DataType::S32, {count}),
      residual(dtype, {count});
  const auto error =
      Call(BatchedCholeskySolveHandler, {matrix, rhs, damping}, {value, result, iterations, residual}, threads, 3);
  CHECK(!error, "%s", error->c_str());
  for (int64_t system = 0; system < count; ++system) {
    CHECK(result.as<int32_t>()[system] == 0 && residual.as<T>()[system] < 1e-5, "system %d of %d unknowns",
          static_cast<int>(system), static_cast<int>(n));
    const T* x = value.as<T>() + system * n;
    for (int64_t i = 0; i < n; ++i) {
      long double product = static_cast<long double>(*damping.as<T>()) * x[i], magnitude = std::abs(product);
      for (int64_t j = 0; j < n; ++j) {
        const long double term = static_cast<long double>(matrix.as<T>()[i * n + j]) * x[j];
        product += term;
        magnitude += std::abs(term);
      }
      Near(rhs.as<T>()[system * n + i], product, magnitude, 64, "a large system");
    }
  }
}

template <typename T>
void TestGram(int64_t examples, int64_t per, int64_t into, int64_t out, int64_t positions, bool against,
              int64_t threads) {
  const int64_t others = against ? 3 : examples, rows = examples * per, columns = others * per;
  const Buffer a = Filled<T>({examples, 2, positions, into}), d = Filled<T>({examples, 2, per, positions, out});
  const Buffer b = Filled<T>({others, 2, positions, into}), e = Filled<T>({others, 2, per, positions, out});
  const Buffer start = Filled<T>({rows, columns}), result = start.Copy();
  std::vector<Buffer> operands = {start, a, d};
  if (against) operands.insert(operands.end(), {b, e});
  const auto error = Call(GramAccumulateHandler, operands, {result},
                          {{"scaled", {1}, call_frame::Attribute::kIntegers},
                           {"start", {1}},
                           {"against", {against}},
                           {"mirror", {0}},
                           {"threads", {threads}}},
                          3);
  CHECK(!error, "%s", error->c_str());
  const Buffer &ra = against ? b : a, &rd = against ? e : d;
  const auto entry = [&](const Buffer& f, const Buffer& g, int64_t row, int64_t block, int64_t i, int64_t o,
                         bool size) {
    long double sum = 0;
    for (int64_t t = 0; t < positions; ++t) {
      const long double term =
          static_cast<long double>(f.as<T>()[((row / per * 2 + block) * positions + t) * into + i]) *
          g.as<T>()[(((row / per * 2 + block) * per + row % per) * positions + t) * out + o];
      sum += size ? std::abs(term) : term;
    }
    return sum;
  };
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < (against ? columns : r + 1); ++c) {
      long double exact = start.as<T>()[r * columns + c], magnitude = std::abs(exact);
      for (int64_t block = 0; block < 2; ++block)
        for (int64_t i = 0; i < into; ++i)
          for (int64_t o = 0; o < out; ++o) {
            exact += entry(a, d, r, block, i, o, false) * entry(ra, rd, c, block, i, o, false);
            magnitude += entry(a, d, r, block, i, o, true) * entry(ra, rd, c, block, i, o, true);
          }
      Near(result.as<T>()[r * columns + c], exact, magnitude, 64, "a Gram matrix");
    }
}

void TestHandlers() {
  for (int64_t threads : {1, 3}) {
    TestSystem<float>(257, 1, threads);
    TestSystem<float>(300, 4, threads);
    TestSystem<double>(270, 1, threads);
    TestGram<float>(67, 1, 2, 3, 1, false, threads);
    TestGram<float>(9, 11, 3, 2, 2, false, threads);
    TestGram<double>(13, 7, 2, 2, 1, true, threads);
  }
  TestGram<float>(1, 1, 0, 1, 1, false, 1);
  TestGram<float>(2, 1, 1, 0, 1, true, 1);
}

}  // namespace
}  // namespace curvax

int main() {
  curvax::TestLevels<float>();
  curvax::TestLevels<double>();
  curvax::TestHandlers();
  std::puts("ok");
}
