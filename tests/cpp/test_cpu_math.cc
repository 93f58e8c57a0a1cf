// The block kernels of every instruction set that this processor has, and what host and device share, against long
// double sums. Buffers end with their last element and begin anywhere: the address sanitizer sees every other access.

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/leaves.h"
#include "common/pairwise.h"
#include "levels.h"

namespace curvax {
namespace {
std::mt19937 randomness(3);

// n normal elements that begin `shift` elements after where the allocation does.
template <typename T>
struct Vector {
  std::vector<T> memory;
  int shift;

  Vector(int64_t n, int shift_) : memory(n + shift_), shift(shift_) {
    std::normal_distribution<double> normal;
    for (T& element : memory) element = static_cast<T>(normal(randomness));
  }
  T* data() { return memory.data() + shift; }
};

template <typename T>
void Near(T got, long double exact, long double magnitude, int roundings, const char* level, int64_t n) {
  const long double bound = roundings * static_cast<long double>(std::numeric_limits<T>::epsilon()) * magnitude;
  CHECK(std::abs(static_cast<long double>(got) - exact) <= bound, "%s, %d elements: got %.17g, expected %.17Lg", level,
        static_cast<int>(n), static_cast<double>(got), exact);
}

template <typename T>
void TestLevel(const CompiledLevel<T>& level, int64_t n, int shift) {
  const TreeCgKernels<T>& kernels = level.kernels.tree_cg;
  Vector<T> x(n, shift), p(n, 1 - shift), r(n, shift), q(n, 0);
  Vector<T> xo = x, ro = r;  // in place
  const T alpha = static_cast<T>(-0.6), lam = static_cast<T>(0.3);
  const double rr = kernels.update(alpha, lam, xo.data(), p.data(), ro.data(), q.data(), xo.data(), ro.data(), n);
  long double squares = 0, products[3] = {0, 0, 0}, magnitude = 0;
  for (int64_t i = 0; i < n; ++i) {
    const long double a = alpha, d = lam, vx = x.data()[i], vp = p.data()[i], vr = r.data()[i], vq = q.data()[i];
    Near(xo.data()[i], vx + a * vp, std::abs(vx) + std::abs(a * vp), 2, level.name, n);
    Near(ro.data()[i], vr - a * (vq + d * vp), std::abs(vr) + std::abs(a) * (std::abs(vq) + std::abs(d * vp)), 4,
         level.name, n);
    squares += static_cast<long double>(ro.data()[i]) * ro.data()[i];
    products[0] += vp * vq;
    products[1] += vp * vp;
    products[2] += vq * vq;
    magnitude += std::abs(vp * vq);
  }
  // A lane adds up at most kBlock / 64 squares of float, kBlock / 32 of double.
  Near(static_cast<T>(rr), squares, squares, 64, level.name, n);

  Near(static_cast<T>(kernels.dot(p.data(), q.data(), n)), products[0], magnitude, 64, level.name, n);
  double gram[3];
  kernels.gram(p.data(), q.data(), n, gram);
  CHECK(gram[0] == kernels.dot(p.data(), q.data(), n), "%s, %d elements", level.name, static_cast<int>(n));
  CHECK(gram[1] == kernels.dot(p.data(), p.data(), n), "%s, %d elements", level.name, static_cast<int>(n));
  CHECK(gram[2] == kernels.dot(q.data(), q.data(), n), "%s, %d elements", level.name, static_cast<int>(n));

  Vector<T> po = p;
  kernels.direction(alpha, x.data(), po.data(), po.data(), n);
  for (int64_t i = 0; i < n; ++i) {
    const long double a = alpha, vx = x.data()[i], vp = p.data()[i];
    Near(po.data()[i], vx + a * vp, std::abs(vx) + std::abs(a * vp), 2, level.name, n);
  }
}

template <typename T>
void TestLevels() {
  for (const CompiledLevel<T>& level : Levels<T>())
    for (int64_t n : {0, 1, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 4095, 4096})
      for (int shift : {0, 1}) TestLevel<T>(level, n, shift);
}

void TestPairwiseSum() {
  CHECK(PairwiseSum<double>(nullptr, 0) == 0, "no terms");
  // A running float sum of these would stop at 2^24.
  const std::vector<float> ones((1 << 24) + 100, 1.0f);
  CHECK(PairwiseSum(ones.data(), static_cast<int64_t>(ones.size())) == (1 << 24) + 100, "ones");
  for (int64_t n : {1, 8, 9, 1000, 12345}) {
    std::vector<double> terms(n);
    long double exact = 0, magnitude = 0;
    std::normal_distribution<double> normal(0, 1e3);
    for (double& term : terms) {
      term = normal(randomness);
      exact += term;
      magnitude += std::abs(term);
    }
    Near(PairwiseSum(terms.data(), n), exact, magnitude, 16, "pairwise", n);
  }
}

void TestLayout() {
  const auto leaf = [](Dims dims) { return Operand{ffi::DataType::F32, std::move(dims), nullptr}; };
  const std::vector<Operand> leaves = {leaf({2, 4096}), leaf({2, 0, 5}), leaf({2}), leaf({2, 4097})};
  Layout layout;
  CHECK(MakeLayout("op", ffi::DataType::F32, {2}, leaves.data(), leaves.size(), layout).success(), "a layout");
  CHECK(layout.batch == 2 && layout.elements == 4096 + 0 + 1 + 4097, "elements");
  CHECK((layout.sizes == Dims{4096, 0, 1, 4097}) && (layout.first_block == Dims{0, 1, 1, 2, 4}), "blocks");
  const ffi::Error error = MakeLayout("op", ffi::DataType::F32, {3}, leaves.data(), leaves.size(), layout);
  CHECK(error.failure() && error.message() ==
                               "curvax op: leaf 0 of shape (2, 4096) does not begin with the batch axes "
                               "(3) of the scalar",
        "%s", error.message().c_str());
}

void TestSentences() {
  CHECK(Shape({}) == "()" && Shape({3}) == "(3)" && Shape({2, 0, 5}) == "(2, 0, 5)", "shapes");
  CHECK(Product({}) == 1 && Product({2, 0, 5}) == 0 && Product({7, 6}) == 42, "products");
  CHECK(CheckDtype("op", ffi::DataType::F64).success(), "float64");
  const std::string dtype = CheckDtype("op", ffi::DataType::S8).message();
  CHECK(dtype == "curvax op: dtype S8 is not supported; use F32 or F64", "%s", dtype.c_str());
}

}  // namespace
}  // namespace curvax

int main() {
  curvax::TestLevels<float>();
  curvax::TestLevels<double>();
  curvax::TestPairwiseSum();
  curvax::TestLayout();
  curvax::TestSentences();
  std::puts("ok");
}
