#include "cpu/linalg/qr.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/batched_cg.h"
#include "common/result.h"
#include "cpu/linalg/unit_factor.h"
#include "cpu/simd/kernels.h"

namespace curvax {

template <typename T>
Qr<T>::Qr(const Workers& workers, int64_t rows, int64_t columns)
    : workers_(workers),
      rows_(rows),
      columns_(columns),
      rank_(std::min(rows, columns)),
      width_(Kernels<T>().panels.panel),
      length_(Padded<T>(rows) + kWideEntries<T>),
      panels_((columns + width_ - 1) / width_ * width_ * length_),
      reflectors_(width_ * length_),
      factors_(columns) {
  for (int64_t first = 0; first < rank_; first += width_)
    blocks_.push_back(std::make_unique<ReflectorBlock<T>>(std::min(width_, rank_ - first), rows - first));
}

template <typename T>
int Qr<T>::Factorize(const T* matrix, T* q, T* r) {
  const int64_t panels = (columns_ + width_ - 1) / width_, blocks = blocks_.size();
  const Workers workers = workers_.Of(rows_ * columns_ * rank_);
  workers.For(panels, [&](int64_t panel) { Load(matrix, panel); });
  for (T factor : factors_)
    if (!IsFinite(factor)) {
      std::fill_n(q, rows_ * rank_, std::numeric_limits<T>::quiet_NaN());
      std::fill_n(r, rank_ * columns_, std::numeric_limits<T>::quiet_NaN());
      return kNonFinite;
    }
  // 1. The first block.
  if (blocks > 0) MakeBlock(0);
  for (int64_t block = 0; block < blocks; ++block) {
    // 2. and 3. Each block is applied to the panels behind it; who has the next panel makes the next block of it.
    workers.For(panels - block - 1, [&](int64_t piece) {
      const int64_t panel = block + 1 + piece;
      Scratch<T> scratch(2 * kReflectors * width_);
      blocks_[block]->Apply(Panel(panel) + block * width_ * width_, false, scratch.data());
      if (piece == 0 && panel < blocks) MakeBlock(panel);
    });
  }
  // 4. The results.
  workers.For(panels, [&](int64_t panel) {
    WriteR(r, panel);
    if (panel < blocks) WriteQ(q, panel);
  });
  return kConverged;
}

template <typename T>
void Qr<T>::Load(const T* matrix, int64_t panel) {
  const int64_t first = panel * width_, valid = std::min(width_, columns_ - first);
  T* const to = Panel(panel);
  for (int64_t i = 0; i < rows_; ++i) {
    std::copy_n(matrix + i * columns_ + first, valid, to + i * width_);
    std::fill(to + i * width_ + valid, to + (i + 1) * width_, T(0));
  }
  std::fill(to + rows_ * width_, to + length_ * width_, T(0));
  T largest[kLargestPanel] = {}, rest[kLargestPanel] = {};
  for (int64_t i = 0; i < rows_; ++i)
    for (int64_t c = 0; c < width_; ++c) {
      const T entry = std::abs(to[i * width_ + c]);
      largest[c] = std::max(largest[c], entry);
      rest[c] += entry * 0;
    }
  T factors[kLargestPanel];
  for (int64_t c = 0; c < width_; ++c) factors[c] = UnitFactor(largest[c], rest[c]);
  std::copy_n(factors, valid, factors_.begin() + first);
  for (int64_t i = 0; i < rows_; ++i)
    for (int64_t c = 0; c < width_; ++c) to[i * width_ + c] *= factors[c];
}

// The panel's columns from its own row on become reflectors, one after the other, in rows of their own.
template <typename T>
void Qr<T>::MakeBlock(int64_t panel) {
  const FactorizationKernels<T>& loops = Kernels<T>().factorizations;
  const int64_t first = panel * width_, count = std::min(width_, rank_ - first),
                valid = std::min(width_, columns_ - first);
  const int64_t length = rows_ - first, whole = Padded<T>(length), stride = length_;
  T *const rows = reflectors_.data(), *const columns = Panel(panel) + first * width_;
  for (int64_t c = 0; c < valid; ++c) {
    for (int64_t i = 0; i < length; ++i) rows[c * stride + i] = columns[i * width_ + c];
    std::fill(rows + c * stride + length, rows + c * stride + whole, T(0));
  }
  T tau[kLargestPanel], overlaps[kLargestPanel];
  for (int64_t c = 0; c < count; ++c) {
    T* const row = rows + c * stride;
    // What stands before the pivot is R.
    for (int64_t i = 0; i < c; ++i) {
      columns[i * width_ + c] = row[i];
      row[i] = 0;
    }
    const T pivot = row[c];
    row[c] = 0;
    const Reflector<T> reflector = MakeReflector(pivot, loops.squares(row, whole));
    columns[c * width_ + c] = reflector.beta;
    tau[c] = reflector.tau;
    loops.scale(reflector.inverse, row, whole, row);
    row[c] = 1;
    const int64_t rest = valid - c - 1;
    loops.dots(row + stride, stride, rest, whole, row, overlaps);
    for (int64_t k = 0; k < rest; ++k) overlaps[k] *= -reflector.tau;
    loops.add_outer(overlaps, row, rest, whole, row + stride, stride);
  }
  for (int64_t c = count; c < valid; ++c)
    for (int64_t i = 0; i < count; ++i) columns[i * width_ + c] = rows[c * stride + i];
  blocks_[panel]->Set(rows, stride, count, length, tau);
}

template <typename T>
void Qr<T>::WriteR(T* r, int64_t panel) const {
  const int64_t first = panel * width_, valid = std::min(width_, columns_ - first);
  const T* const from = Panel(panel);
  for (int64_t i = 0; i < rank_; ++i)
    for (int64_t c = 0; c < valid; ++c)
      r[i * columns_ + first + c] = i <= first + c ? from[i * width_ + c] / factors_[first + c] : T(0);
}

template <typename T>
void Qr<T>::WriteQ(T* q, int64_t panel) const {
  const int64_t first = panel * width_, valid = std::min(width_, rank_ - first);
  Scratch<T> columns(length_ * width_), scratch(2 * kReflectors * width_);
  T* const x = columns.data();
  std::fill(x, x + length_ * width_, T(0));
  for (int64_t c = 0; c < valid; ++c) x[(first + c) * width_ + c] = 1;
  // Blocks behind this one only have entries where these columns have none.
  for (int64_t block = panel; block >= 0; --block)
    blocks_[block]->Apply(x + block * width_ * width_, true, scratch.data());
  for (int64_t i = 0; i < rows_; ++i) std::copy_n(x + i * width_, valid, q + i * rank_ + first);
}

template class Qr<float>;
template class Qr<double>;

}  // namespace curvax
