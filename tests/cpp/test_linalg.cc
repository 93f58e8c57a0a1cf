// The dense factorizations as XLA calls them, on odd sizes of both dtypes: buffers end with their last element, so that
// the address sanitizer sees every access behind it.

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "call_frame.h"
#include "check.h"
#include "common/result.h"
#include "cpu/linalg/handlers.h"

namespace curvax {
namespace {

using call_frame::Buffer;
using call_frame::Call;
using xla::ffi::DataType;

std::mt19937 randomness(7);

template <typename T>
constexpr DataType kDtype = sizeof(T) == 4 ? DataType::F32 : DataType::F64;

template <typename T>
Buffer Normal(std::vector<int64_t> dims) {
  Buffer buffer(kDtype<T>, std::move(dims));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < buffer.size(); ++i) buffer.as<T>()[i] = static_cast<T>(normal(randomness));
  return buffer;
}

// `count` matrices H + H^T + shift I, or of low rank.
template <typename T>
Buffer Symmetric(int64_t count, int64_t n, double shift) {
  const Buffer half = Normal<T>({count, n, n});
  Buffer symmetric(kDtype<T>, {count, n, n});
  for (int64_t m = 0; m < count; ++m)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const T* const h = half.as<T>() + m * n * n;
        symmetric.as<T>()[(m * n + i) * n + j] = h[i * n + j] + h[j * n + i] + (i == j ? static_cast<T>(shift) : T(0));
      }
  return symmetric;
}

// The largest of |sum_k x(i, k) y(k, j) - z(i, j)| over i < rows, j < columns, beside `bound`.
template <typename X, typename Y, typename Z>
void Product(int64_t rows, int64_t depth, int64_t columns, double bound, const char* what, const X& x, const Y& y,
             const Z& z) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = -z(i, j);
      for (int64_t k = 0; k < depth; ++k) sum += static_cast<double>(x(i, k)) * y(k, j);
      CHECK(std::abs(sum) <= bound, "%s: (%d, %d) of %d is off by %g", what, static_cast<int>(i), static_cast<int>(j),
            static_cast<int>(rows), sum);
    }
}

template <typename T>
double Roundings(int64_t n) {
  return (30.0 + 10 * n) * std::numeric_limits<T>::epsilon();
}

double Identity(int64_t i, int64_t j) { return i == j; }

template <typename T>
void TestEigh(int64_t count, int64_t n, int64_t threads) {
  const Buffer a = Symmetric<T>(count, n, 0), values(kDtype<T>, {count, n}), vectors(kDtype<T>, {count, n, n});
  const Buffer ends(DataType::S32, {count});
  CHECK(!Call(EighHandler, {a}, {values, vectors, ends}, {{"threads", {threads}}}, 3), "eigh");
  for (int64_t m = 0; m < count; ++m) {
    CHECK(ends.as<int32_t>()[m] == kConverged, "eigh ended with %d", ends.as<int32_t>()[m]);
    const T *const A = a.as<T>() + m * n * n, *const d = values.as<T>() + m * n, *const V = vectors.as<T>() + m * n * n;
    const auto entry = [&](int64_t i, int64_t j) { return A[i * n + j]; };
    const auto vector = [&](int64_t i, int64_t j) { return V[i * n + j]; };
    const auto transposed = [&](int64_t i, int64_t j) { return V[j * n + i]; };
    const auto scaled = [&](int64_t i, int64_t j) { return static_cast<double>(V[i * n + j]) * d[j]; };
    Product(n, n, n, Roundings<T>(n) * 2 * std::sqrt(n), "A V - V D", entry, vector, scaled);
    Product(n, n, n, Roundings<T>(n), "V^T V - I", transposed, vector, Identity);
    CHECK(std::is_sorted(d, d + n), "values rise");
  }
}

template <typename T>
void TestQr(int64_t rows, int64_t columns, int64_t threads) {
  const int64_t k = std::min(rows, columns);
  const Buffer a = Normal<T>({rows, columns}), q(kDtype<T>, {rows, k}), r(kDtype<T>, {k, columns});
  const Buffer end(DataType::S32, {});
  CHECK(!Call(QrHandler, {a}, {q, r, end}, {{"threads", {threads}}}, 3), "qr");
  const T *const Q = q.as<T>(), *const R = r.as<T>(), *const A = a.as<T>();
  const auto entry = [&](int64_t i, int64_t j) { return A[i * columns + j]; };
  const auto of_q = [&](int64_t i, int64_t j) { return Q[i * k + j]; };
  const auto transposed = [&](int64_t i, int64_t j) { return Q[j * k + i]; };
  const auto of_r = [&](int64_t i, int64_t j) { return R[i * columns + j]; };
  Product(rows, k, columns, Roundings<T>(rows), "Q R - A", of_q, of_r, entry);
  Product(k, rows, k, Roundings<T>(rows), "Q^T Q - I", transposed, of_q, Identity);
}

template <typename T>
void TestTriangles(int64_t n, int64_t columns, int64_t threads) {
  const Buffer a = Symmetric<T>(1, n, 6 * std::sqrt(n) + 2), lower(kDtype<T>, {1, n, n}), end(DataType::S32, {1});
  CHECK(!Call(CholeskyHandler, {a}, {lower, end}, {{"threads", {threads}}}, 3), "cholesky");
  CHECK(*end.as<int32_t>() == kConverged, "cholesky ended with %d", *end.as<int32_t>());
  const T *const L = lower.as<T>(), *const A = a.as<T>();
  const auto of_l = [&](int64_t i, int64_t j) { return L[i * n + j]; };
  const auto transposed = [&](int64_t i, int64_t j) { return L[j * n + i]; };
  const double bound = Roundings<T>(n) * 8 * (std::sqrt(n) + 1);
  Product(n, n, n, bound, "L L^T - A", of_l, transposed, [&](int64_t i, int64_t j) { return A[i * n + j]; });
  const Buffer b = Normal<T>({1, n, columns}), x(kDtype<T>, {1, n, columns});
  const auto of_x = [&](int64_t i, int64_t j) { return x.as<T>()[i * columns + j]; };
  const auto of_b = [&](int64_t i, int64_t j) { return b.as<T>()[i * columns + j]; };
  for (int64_t transpose : {0, 1}) {
    CHECK(!Call(TriangularSolveHandler, {lower, b}, {x}, {{"transpose", {transpose}}, {"threads", {threads}}}, 3),
          "triangular_solve");
    if (transpose)
      Product(n, n, columns, bound, "L^T X - B", transposed, of_x, of_b);
    else
      Product(n, n, columns, bound, "L X - B", of_l, of_x, of_b);
  }
}

// What is not finite, or not positive, ends as that, and fills its results with NaN.
void TestFailures() {
  const int64_t n = 70;
  const Buffer a = Symmetric<float>(2, n, 0), values(DataType::F32, {2, n}), vectors(DataType::F32, {2, n, n});
  const Buffer ends(DataType::S32, {2}), lower(DataType::F32, {2, n, n}), r(DataType::F32, {2, n, n});
  a.as<float>()[n * n + 3 * n + 2] = a.as<float>()[n * n + 2 * n + 3] = std::numeric_limits<float>::quiet_NaN();
  CHECK(!Call(EighHandler, {a}, {values, vectors, ends}, {{"threads", {0}}}, 2), "eigh");
  CHECK(ends.as<int32_t>()[0] == kConverged && ends.as<int32_t>()[1] == kNonFinite, "eigh of NaN");
  CHECK(std::isnan(values.as<float>()[n]) && std::isnan(vectors.as<float>()[2 * n * n - 1]), "NaN");
  CHECK(!Call(CholeskyHandler, {a}, {lower, ends}, {{"threads", {0}}}, 2), "cholesky");
  CHECK(ends.as<int32_t>()[0] == kNotPositiveDefinite && ends.as<int32_t>()[1] == kNonFinite, "cholesky of NaN");
  CHECK(std::isnan(lower.as<float>()[0]), "NaN");
  CHECK(!Call(QrHandler, {a}, {vectors, r, ends}, {{"threads", {0}}}, 2), "qr");
  CHECK(ends.as<int32_t>()[0] == kConverged && ends.as<int32_t>()[1] == kNonFinite, "qr of NaN");
  CHECK(std::isnan(vectors.as<float>()[n * n]) && std::isnan(r.as<float>()[n * n]), "NaN");
}

void Refuses(XLA_FFI_Handler* handler, const std::vector<Buffer>& operands, const std::vector<Buffer>& results,
             const char* sentence, bool transpose = false) {
  std::vector<call_frame::Attribute> attributes = {{"threads", {0}}};
  if (transpose) attributes.push_back({"transpose", {0}});
  const auto error = Call(handler, operands, results, attributes);
  CHECK(error && error->find(sentence) != std::string::npos, "\"%s\" in place of \"%s\"", error ? error->c_str() : "",
        sentence);
}

void TestRefusals() {
  const Buffer square(DataType::F32, {3, 3}), wide(DataType::F32, {3, 4}), row(DataType::F32, {3});
  const Buffer integers(DataType::S32, {3, 3}), end(DataType::S32, {});
  Refuses(EighHandler, {square}, {row, square}, "eigh: got 1 operands and 2 results, expected 1 and 3");
  Refuses(EighHandler, {wide}, {row, wide, end}, "operand 0 has shape (3, 4), expected square matrices");
  Refuses(EighHandler, {row}, {row, square, end}, "operand 0 has shape (3), expected (..., rows, columns)");
  Refuses(EighHandler, {integers}, {row, square, end}, "dtype S32 is not supported; use F32 or F64");
  Refuses(QrHandler, {wide}, {square, square, end}, "result 1 has shape (3, 3), expected (3, 4)");
  Refuses(CholeskyHandler, {square}, {square, row}, "result 1 has dtype F32, expected S32");
  Refuses(TriangularSolveHandler, {square, row}, {row}, "operand 1 has shape (3), expected the axes of (3, 3)", true);
  Refuses(TriangularSolveHandler, {square, wide}, {square}, "result 0 has shape (3, 3), expected (3, 4)", true);
}

template <typename T>
void TestAll() {
  for (int64_t threads : {1, 3}) {
    for (int64_t n : {0, 1, 2, 7, 32, 33, 63, 70, 130}) TestEigh<T>(n > 60 ? 1 : 2, n, threads);
    for (int64_t rows : {0, 1, 5, 33, 70})
      for (int64_t columns : {0, 1, 17, 40, 65}) TestQr<T>(rows, columns, threads);
    for (int64_t n : {0, 1, 7, 33, 100}) TestTriangles<T>(n, n % 5 + 30 * (threads - 1), threads);
  }
}

}  // namespace
}  // namespace curvax

int main() {
  curvax::TestAll<float>();
  curvax::TestAll<double>();
  curvax::TestFailures();
  curvax::TestRefusals();
  std::puts("ok");
}
