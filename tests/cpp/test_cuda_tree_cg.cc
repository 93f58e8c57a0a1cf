// The CUDA kernels of tree_cg, emulated, against long double sums.

#include "check.h"
#include "cuda_emulator.h"
//
#include <array>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "common/leaves.h"
#include "cuda/tables.h"
#include "cuda/tree_cg.cuh"

namespace curvax {
namespace {

// A vector of leaves, each in an allocation of its own that begins `shift` elements after a 16-byte boundary and ends
// with its last element: the address sanitizer sees every access outside.
template <typename T>
struct Vector {
  std::vector<std::vector<T>> memory;
  std::vector<Operand> leaves;

  Vector(const std::vector<int64_t>& sizes, int64_t batch, int shift, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t size : sizes) {
      memory.emplace_back(batch * size + shift);
      for (T& element : memory.back()) element = static_cast<T>(normal(random));
    }
    for (size_t leaf = 0; leaf < sizes.size(); ++leaf)
      leaves.push_back({sizeof(T) == 4 ? ffi::DataType::F32 : ffi::DataType::F64,
                        batch == 1 ? Dims{sizes[leaf]} : Dims{batch, sizes[leaf]}, memory[leaf].data() + shift});
  }
  T* data(size_t leaf) const { return Data<T>(leaves[leaf]); }
};

template <typename T>
Layout LayoutOf(const Vector<T>& vector, int64_t batch) {
  Layout layout;
  const auto error = MakeLayout("test", vector.leaves.empty() ? ffi::DataType::F32 : vector.leaves[0].dtype,
                                batch == 1 ? Dims{} : Dims{batch}, vector.leaves.data(), vector.leaves.size(), layout);
  CHECK(error.success(), "%s", error.message().c_str());
  return layout;
}

template <int kVectors, typename Body>
int ForEachEmulated(const Layout& layout, const std::array<const Operand*, kVectors>& vectors, const Body& body) {
  int launches = 0;
  const auto error = ForEachTable<kVectors>(layout, vectors, [&](const auto& table) {
    ++launches;
    const auto blocks = static_cast<unsigned>(table.blocks * layout.batch);
    if (blocks > 0) emulator::Launch(dim3(blocks), dim3(kThreads), 0, [&] { body(table); });
    return ffi::Error::Success();
  });
  CHECK(error.success(), "%s", error.message().c_str());
  return launches;
}

// A sum of n terms whose magnitudes add up to `magnitude`, by blocks of 16 in T and the rest in double.
template <typename T>
void CheckSum(T got, long double exact, long double magnitude, const char* what) {
  const long double bound = 24 * static_cast<long double>(std::numeric_limits<T>::epsilon()) * magnitude;
  CHECK(std::abs(static_cast<long double>(got) - exact) <= bound, "%s: got %.17g, exact %.17Lg, bound %.3Lg", what,
        static_cast<double>(got), exact, bound);
}

template <typename T>
void CheckElement(T got, long double exact, long double magnitude, const char* what) {
  const long double bound = 4 * static_cast<long double>(std::numeric_limits<T>::epsilon()) * magnitude;
  CHECK(std::abs(static_cast<long double>(got) - exact) <= bound, "%s: got %.17g, exact %.17Lg", what,
        static_cast<double>(got), exact);
}

// Runs the last stage on the terms of kResults sums; the results of each, one number per batch member.
template <typename T, int kResults>
std::array<std::vector<T>, kResults> SumUp(const std::vector<double>& partial, const Layout& layout) {
  std::array<std::vector<T>, kResults> results;
  Sums<T, kResults> sums;
  for (int k = 0; k < kResults; ++k) {
    results[k].assign(layout.batch, std::numeric_limits<T>::quiet_NaN());
    sums.result[k] = results[k].data();
  }
  const int64_t rows = kResults * layout.batch;
  if (rows > 0)
    emulator::Launch(dim3(static_cast<unsigned>(rows)), dim3(kSumThreads), 0, [&] {
      SumRows<T, kResults>(partial.data(), layout.blocks(), static_cast<int>(layout.batch), sums);
    });
  return results;
}

struct Case {
  const char* name;
  std::vector<int64_t> sizes;
  int64_t batch = 1;
  int shift = 0;
};

std::vector<Case> Cases() {
  std::vector<int64_t> many(90, 3);
  for (size_t leaf = 0; leaf < many.size(); leaf += 5) many[leaf] = leaf % 11;
  return {
      {"no leaves", {}},
      {"only empty leaves", {0, 0}},
      {"one element", {1}},
      {"odd", {13, 21, 1, 0, 5}},
      {"block edges", {4095, 4096, 4097, 8192}},
      {"pack edges", {3, 4, 5, 1023, 1024, 1025}},
      {"unaligned", {4096, 1000, 7}, 1, 1},
      {"batch of odd leaves", {7, 0, 4101}, 3},
      {"empty batch", {7}, 0},
      {"a large table", many},
  };
}

// Packs many leaves into tables: each leaf once, in order, with the blocks that the layout gives it.
void TestTables() {
  std::vector<Operand> leaves;
  for (int64_t leaf = 0; leaf < 2000; ++leaf)
    leaves.push_back({ffi::DataType::F32, {(leaf + 1) % 7 * 1500}, reinterpret_cast<void*>(256 * (leaf + 1))});
  for (const auto& [count, tables] : {std::pair{0, 0}, {1, 1}, {66, 1}, {67, 1}, {544, 1}, {634, 1}, {2000, 4}}) {
    Layout layout;
    const auto unlike = MakeLayout("test", ffi::DataType::F32, {}, leaves.data(), count, layout);
    CHECK(unlike.success(), "%s", unlike.message().c_str());
    size_t leaf = 0;
    int seen = 0;
    const auto error = ForEachTable<6>(
        layout, {leaves.data(), leaves.data(), leaves.data(), leaves.data(), leaves.data(), leaves.data()},
        [&](const auto& table) {
          ++seen;
          CHECK(sizeof(table) <= 32764 && (count > 66 || sizeof(table) <= 4096), "%zu bytes", sizeof(table));
          CHECK(table.member_blocks == layout.blocks(), "%d", static_cast<int>(table.member_blocks));
          for (int entry = 0; entry < table.leaves; ++entry, ++leaf) {
            while (layout.sizes[leaf] == 0) ++leaf;
            CHECK(table.size[entry] == layout.sizes[leaf], "leaf %zu", leaf);
            CHECK(table.slot + table.first_block[entry] == layout.first_block[leaf], "leaf %zu", leaf);
            for (int v = 0; v < 6; ++v) CHECK(table.data[v][entry] == leaves[leaf].data, "leaf %zu", leaf);
          }
          CHECK(table.slot + table.blocks == layout.first_block[leaf], "leaf %zu", leaf);
          return ffi::Error::Success();
        });
    CHECK(error.success(), "%s", error.message().c_str());
    while (leaf < static_cast<size_t>(count) && layout.sizes[leaf] == 0) ++leaf;
    CHECK(leaf == static_cast<size_t>(count) && seen == tables, "%d leaves: %d tables", count, seen);
  }
}

template <typename T>
void TestUpdate(const Case& c, T alpha_value, T lam_value) {
  const Vector<T> x(c.sizes, c.batch, c.shift, 1), p(c.sizes, c.batch, c.shift, 2), r(c.sizes, c.batch, c.shift, 3),
      q(c.sizes, c.batch, c.shift, 4);
  const Vector<T> old_x(c.sizes, c.batch, c.shift, 1), old_r(c.sizes, c.batch, c.shift, 3);
  const Layout layout = LayoutOf(x, c.batch);
  const std::vector<T> alpha(c.batch, alpha_value), lam(c.batch, lam_value);
  std::vector<double> partial(layout.blocks() * c.batch, std::numeric_limits<double>::quiet_NaN());
  // In place: the results are x and r.
  const int launches = ForEachEmulated<kUpdateVectors>(
      layout, {x.leaves.data(), p.leaves.data(), r.leaves.data(), q.leaves.data(), x.leaves.data(), r.leaves.data()},
      [&](const auto& table) { CgUpdateKernel<T>(table, alpha.data(), lam.data(), partial.data()); });
  CHECK(launches == (layout.blocks() > 0), "%s: %d launches", c.name, launches);
  const auto [rr] = SumUp<T, 1>(partial, layout);
  const long double a = alpha_value, d = lam_value;
  for (int64_t member = 0; member < c.batch; ++member) {
    long double exact = 0;
    for (size_t leaf = 0; leaf < c.sizes.size(); ++leaf)
      for (int64_t i = member * c.sizes[leaf]; i < (member + 1) * c.sizes[leaf]; ++i) {
        const long double vx = old_x.data(leaf)[i], vp = p.data(leaf)[i], vr = old_r.data(leaf)[i],
                          vq = q.data(leaf)[i], got = r.data(leaf)[i];
        CheckElement(x.data(leaf)[i], vx + a * vp, std::abs(vx) + std::abs(a * vp), c.name);
        CheckElement(r.data(leaf)[i], vr - a * (vq + d * vp),
                     std::abs(vr) + std::abs(a) * (std::abs(vq) + std::abs(d * vp)), c.name);
        exact += got * got;
      }
    CheckSum(rr[member], exact, exact, c.name);
  }
}

template <typename T>
void TestDirection(const Case& c) {
  const Vector<T> z(c.sizes, c.batch, c.shift, 5), p(c.sizes, c.batch, c.shift, 6), old(c.sizes, c.batch, c.shift, 6);
  const Layout layout = LayoutOf(z, c.batch);
  std::vector<T> beta(c.batch);
  for (int64_t member = 0; member < c.batch; ++member) beta[member] = static_cast<T>(0.3 - member);
  ForEachEmulated<kDirectionVectors>(layout, {z.leaves.data(), p.leaves.data(), p.leaves.data()},
                                     [&](const auto& table) { CgDirectionKernel<T>(table, beta.data()); });
  for (size_t leaf = 0; leaf < c.sizes.size(); ++leaf)
    for (int64_t i = 0; i < c.batch * c.sizes[leaf]; ++i) {
      const long double b = beta[i / c.sizes[leaf]], vz = z.data(leaf)[i], vp = old.data(leaf)[i];
      CheckElement(p.data(leaf)[i], vz + b * vp, std::abs(vz) + std::abs(b * vp), c.name);
    }
}

template <typename T>
std::array<std::vector<T>, 3> RunDots(const Case& c, const Vector<T>& p, const Vector<T>& q, const Vector<T>& r,
                                      const Layout& layout) {
  const int64_t stride = layout.blocks() * c.batch;
  std::vector<double> partial(3 * stride, std::numeric_limits<double>::quiet_NaN());
  ForEachEmulated<6>(
      layout, {p.leaves.data(), q.leaves.data(), p.leaves.data(), p.leaves.data(), q.leaves.data(), r.leaves.data()},
      [&](const auto& table) { DotsKernel<T, 3>(table, partial.data(), stride); });
  return SumUp<T, 3>(partial, layout);
}

template <typename T>
void TestDots(const Case& c) {
  const Vector<T> p(c.sizes, c.batch, c.shift, 7), q(c.sizes, c.batch, c.shift, 8), r(c.sizes, c.batch, c.shift, 9);
  const Layout layout = LayoutOf(p, c.batch);
  const auto dots = RunDots(c, p, q, r, layout);
  const Vector<T>* factors[3][2] = {{&p, &q}, {&p, &p}, {&q, &r}};
  for (int k = 0; k < 3; ++k)
    for (int64_t member = 0; member < c.batch; ++member) {
      long double exact = 0, magnitude = 0;
      for (size_t leaf = 0; leaf < c.sizes.size(); ++leaf)
        for (int64_t i = member * c.sizes[leaf]; i < (member + 1) * c.sizes[leaf]; ++i) {
          const long double term =
              static_cast<long double>(factors[k][0]->data(leaf)[i]) * factors[k][1]->data(leaf)[i];
          exact += term;
          magnitude += std::abs(term);
        }
      CheckSum(dots[k][member], exact, magnitude, c.name);
    }
  // One reading of two vectors gives the same bits as one pair after the other.
  const int64_t stride = layout.blocks() * c.batch;
  std::vector<double> pairs(3 * stride), gram(3 * stride);
  ForEachEmulated<6>(
      layout, {p.leaves.data(), q.leaves.data(), p.leaves.data(), p.leaves.data(), q.leaves.data(), q.leaves.data()},
      [&](const auto& table) { DotsKernel<T, 3>(table, pairs.data(), stride); });
  ForEachEmulated<2>(layout, {p.leaves.data(), q.leaves.data()},
                     [&](const auto& table) { GramKernel<T>(table, gram.data(), stride); });
  CHECK(pairs == gram, "%s: the products of one reading differ", c.name);
  // No bit depends on the order in which threads run, or on where the buffers begin.
  for (emulator::Order order : {emulator::Order::kDescending, emulator::Order::kShuffled}) {
    emulator::order = order;
    CHECK(RunDots(c, p, q, r, layout) == dots, "%s: the sums depend on the order of threads", c.name);
  }
  emulator::order = emulator::Order::kAscending;
  const auto shifted = [&](const Vector<T>& from) {
    Vector<T> to(c.sizes, c.batch, 1 - c.shift, 0);
    for (size_t leaf = 0; leaf < c.sizes.size(); ++leaf)
      std::copy_n(from.data(leaf), c.batch * c.sizes[leaf], to.data(leaf));
    return to;
  };
  const Vector<T> mp = shifted(p), mq = shifted(q), mr = shifted(r);
  CHECK(RunDots(c, mp, mq, mr, layout) == dots, "%s: the sums depend on the alignment", c.name);
}

// An infinite step length times the zeros past the end must not reach the sum, and what is not finite must.
template <typename T>
void TestNonFinite() {
  for (const T value : {std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()}) {
    const Vector<T> one({5}, 1, 0, 1), xo({5}, 1, 0, 1), ro({5}, 1, 0, 1);
    for (int i = 0; i < 5; ++i) one.data(0)[i] = 1;
    const Layout layout = LayoutOf(one, 1);
    const T alpha = std::numeric_limits<T>::infinity(), lam = 1;
    double partial = 0;
    ForEachEmulated<kUpdateVectors>(layout,
                                    {one.leaves.data(), one.leaves.data(), one.leaves.data(), one.leaves.data(),
                                     xo.leaves.data(), ro.leaves.data()},
                                    [&](const auto& table) { CgUpdateKernel<T>(table, &alpha, &lam, &partial); });
    CHECK(std::isinf(partial), "got %g", partial);
    const Vector<T> dirty({5}, 1, 0, 1);
    for (int i = 0; i < 5; ++i) dirty.data(0)[i] = 1;
    dirty.data(0)[4] = value;
    ForEachEmulated<2>(layout, {dirty.leaves.data(), one.leaves.data()},
                       [&](const auto& table) { DotsKernel<T, 1>(table, &partial, 1); });
    CHECK(std::isnan(value) ? std::isnan(partial) : std::isinf(partial), "got %g", partial);
  }
}

// The last stage alone, with terms that float could not add up, for two results of two batch members.
void TestSumRows() {
  for (int64_t count : {0, 1, 255, 1024, 4097, 9000}) {
    std::vector<double> partial(4 * count);
    for (size_t i = 0; i < partial.size(); ++i) partial[i] = i % 2 ? 1e-9 : 1e4;
    double results[2][2] = {{-1, -1}, {-1, -1}};
    const Sums<double, 2> sums = {{results[0], results[1]}};
    emulator::Launch(dim3(4), dim3(kSumThreads), 0, [&] { SumRows<double, 2>(partial.data(), count, 2, sums); });
    for (int row = 0; row < 4; ++row) {
      long double exact = 0;
      for (int64_t i = 0; i < count; ++i) exact += partial[row * count + i];
      const double got = results[row / 2][row % 2];
      CHECK(std::abs(got - exact) <= 1e-15L * exact, "%d terms: got %.17g, exact %.17Lg", static_cast<int>(count), got,
            exact);
    }
  }
}

template <typename T>
void TestAll() {
  for (const Case& c : Cases()) {
    TestUpdate<T>(c, static_cast<T>(0.37), static_cast<T>(0.7));
    TestDirection<T>(c);
    TestDots<T>(c);
  }
  TestNonFinite<T>();
}

}  // namespace
}  // namespace curvax

int main() {
  curvax::TestTables();
  curvax::TestAll<float>();
  curvax::TestAll<double>();
  curvax::TestSumRows();
  std::puts("ok");
}
