#include "cpu/linalg/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/batched_cg.h"
#include "cpu/simd/kernels.h"

namespace curvax {
namespace {

// Roots of one piece of work.
constexpr int64_t kRoots = 32;

}  // namespace

template <typename T>
Merge<T>::Merge(const Workers& workers, const Part<T>& part, double cut)
    : workers_(workers), part_(part), cut_(cut), rho_(2 * std::abs(cut)) {}

template <typename T>
void Merge<T>::Run() {
  Gather();
  Deflate();
  FindRoots();
  RestoreZ();
  MakeVectors();
  Finish();
}

// z is V u / sqrt(2) for u with a one at the end of the first half and, with the sign of the cut, one at the beginning
// of the second.
template <typename T>
void Merge<T>::Gather() {
  const double first = std::sqrt(0.5), second = std::copysign(first, cut_);
  const auto pair = [&](int64_t row) {
    const bool in_first = row < part_.middle;
    const T entry = Row(row)[in_first ? part_.middle - 1 : part_.middle];
    return Pair{part_.diagonal[row], (in_first ? first : second) * entry, row, in_first ? kFirst : kSecond};
  };
  pairs_.reserve(part_.end - part_.begin);
  int64_t i = part_.begin, j = part_.middle;
  while (i < part_.middle || j < part_.end) {
    const bool take_first =
        j == part_.end || (i < part_.middle && part_.diagonal[part_.order[i]] <= part_.diagonal[part_.order[j]]);
    pairs_.push_back(pair(part_.order[take_first ? i++ : j++]));
  }
}

template <typename T>
void Merge<T>::Deflate() {
  double largest = rho_;
  for (const Pair& pair : pairs_) largest = std::max(largest, std::abs(pair.pole));
  const double tolerance = 8 * Precision<T>::eps * largest;
  active_.reserve(pairs_.size());
  for (Pair& pair : pairs_) {
    if (rho_ * std::abs(pair.z) <= tolerance) {
      deflated_.push_back(pair);
    } else if (!active_.empty() && Combine(active_.back(), pair, tolerance)) {
      deflated_.push_back(active_.back());
      active_.back() = pair;
    } else {
      active_.push_back(pair);
    }
  }
}

// Rotates two neighbors so that the first has nothing of z, where the entry that this makes between them is rounding.
template <typename T>
bool Merge<T>::Combine(Pair& before, Pair& now, double tolerance) {
  const double length = std::hypot(before.z, now.z), gap = now.pole - before.pole;
  const double c = now.z / length, s = -before.z / length;
  if (std::abs(gap * c * s) > tolerance) return false;
  for (Pair* pair : {&before, &now}) {
    if (before.support == now.support) break;
    T* const row = Row(pair->row);
    if (pair->support == kFirst) std::fill(row + part_.middle, row + part_.end, T(0));
    if (pair->support == kSecond) std::fill(row + part_.begin, row + part_.middle, T(0));
    pair->support = kBoth;
  }
  // Rows need not begin on a boundary here: whole vectors of a copy would cost more than plain loops.
  T *const a = Row(before.row), *const b = Row(now.row);
  const T cosine = static_cast<T>(c), sine = static_cast<T>(s);
  for (int64_t k = part_.begin; k < part_.end; ++k) {
    const T left = a[k], right = b[k];
    a[k] = cosine * left + sine * right;
    b[k] = cosine * right - sine * left;
  }
  const double low = before.pole, high = now.pole;
  before.pole = low * c * c + high * s * s;
  now.pole = low * s * s + high * c * c;
  before.z = 0;
  now.z = length;
  return true;
}

template <typename T>
void Merge<T>::FindRoots() {
  // Rows of like support together, so that products leave out what is zero.
  const int64_t n = active_.size(), padded = Padded<double>(n);
  poles_.assign(padded, std::numeric_limits<double>::infinity());
  squares_.assign(padded, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    poles_[i] = active_[i].pole;
    squares_[i] = active_[i].z * active_[i].z;
  }
  origins_.resize(n);
  shifts_.resize(n);
  // What is below the rounding of T, in which eigenvectors are made, is of no use.
  const double tolerance = 8 * std::max<double>(Precision<double>::eps, Precision<T>::eps / 256);
  Worth(16 * n * n).For((n + kRoots - 1) / kRoots, [&](int64_t piece) {
    for (int64_t j = piece * kRoots; j < std::min(n, (piece + 1) * kRoots); ++j) {
      const Root root = SecularRoot(poles_.data(), squares_.data(), n, j, rho_, tolerance);
      origins_[j] = root.origin;
      shifts_[j] = root.shift;
    }
  });
}

// |z_i|^2 = prod_j (pole_i - root_j) / prod_(j != i) (pole_i - pole_j), up to a common factor.
template <typename T>
void Merge<T>::RestoreZ() {
  const int64_t n = active_.size(), padded = Padded<double>(n);
  Worth(8 * n * n).For((padded + kRoots - 1) / kRoots, [&](int64_t piece) {
    const int64_t begin = piece * kRoots, end = std::min(padded, begin + kRoots);
    Kernels<T>().factorizations.root_products(poles_.data(), origins_.data(), shifts_.data(), n, begin, end,
                                              squares_.data());
  });
  for (int64_t i = 0; i < n; ++i) active_[i].z = std::copysign(std::sqrt(std::abs(squares_[i])), active_[i].z);
}

template <typename T>
void Merge<T>::MakeVectors() {
  const int64_t n = active_.size(), total = part_.end - part_.begin;
  if (n == 0) return;
  // Rows in order of their support.
  std::vector<int64_t> rows;
  std::vector<double> poles, z;
  int64_t counts[3] = {};
  for (Support support : {kFirst, kBoth, kSecond})
    for (const Pair& pair : active_)
      if (pair.support == support) {
        rows.push_back(pair.row);
        poles.push_back(pair.pole);
        z.push_back(pair.z);
        ++counts[support];
      }
  Packed<T> vectors(n, n);
  Packed<T> first(part_.middle - part_.begin, n), second(part_.end - part_.middle, n);
  const int64_t width = vectors.width(), of_vectors = vectors.panels(), of_first = first.panels();
  const int64_t in_first = counts[kFirst] + counts[kBoth], in_second = counts[kBoth] + counts[kSecond];
  const auto gather = [&](Packed<T>& packed, int64_t panel, int64_t column, int64_t begin, int64_t end) {
    const int64_t valid = std::min(width, packed.rows() - panel * width);
    for (int64_t k = begin; k < end; ++k) {
      T* const to = packed.At(panel * width, k);
      std::copy_n(Row(rows[k]) + column + panel * width, valid, to);
      std::fill(to + valid, to + width, T(0));
    }
  };
  Worth(8 * n * n).For(of_vectors + of_first + second.panels(), [&](int64_t piece) {
    if (piece < of_vectors) {
      const int64_t j = piece * width;
      Kernels<T>().factorizations.secular_vectors(poles.data(), z.data(), n, origins_.data() + j, shifts_.data() + j,
                                                  std::min(width, n - j), width, vectors.At(j, 0));
    } else if (piece < of_vectors + of_first) {
      gather(first, piece - of_vectors, part_.begin, 0, in_first);
    } else {
      gather(second, piece - of_vectors - of_first, part_.middle, n - in_second, n);
    }
  });
  T* const to = part_.to + part_.begin * part_.stride;
  const Workers workers = Worth(n * n * total);
  Multiply<T>(workers, vectors, first, 0, in_first, {to + part_.begin, part_.stride});
  Multiply<T>(workers, vectors, second, n - in_second, in_second, {to + part_.middle, part_.stride});
}

// The new vectors come first, then those that are as they were; then all are ordered.
template <typename T>
void Merge<T>::Finish() {
  const int64_t n = active_.size();
  for (int64_t j = 0; j < n; ++j) part_.diagonal[part_.begin + j] = origins_[j] + shifts_[j];
  for (size_t k = 0; k < deflated_.size(); ++k) {
    const Pair& pair = deflated_[k];
    const int64_t row = part_.begin + n + static_cast<int64_t>(k);
    part_.diagonal[row] = pair.pole;
    T* const to = part_.to + row * part_.stride;
    const T* const from = Row(pair.row);
    std::copy(from + part_.begin, from + part_.end, to + part_.begin);
    if (pair.support == kFirst) std::fill(to + part_.middle, to + part_.end, T(0));
    if (pair.support == kSecond) std::fill(to + part_.begin, to + part_.middle, T(0));
  }
  int64_t* const order = part_.order;
  for (int64_t i = part_.begin; i < part_.end; ++i) order[i] = i;
  const auto rises = [&](int64_t a, int64_t b) { return part_.diagonal[a] < part_.diagonal[b]; };
  std::sort(order + part_.begin + n, order + part_.end, rises);
  std::inplace_merge(order + part_.begin, order + part_.begin + n, order + part_.end, rises);
}

template class Merge<float>;
template class Merge<double>;

}  // namespace curvax
