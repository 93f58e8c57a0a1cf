#include "cpu/linalg/secular.h"

#include <algorithm>
#include <cmath>

#include "cpu/simd/kernels.h"

namespace curvax {
namespace {

// Usually five are enough; each that does not halve the bracket within three is followed by one that does.
constexpr int kSteps = 200;

// The two roots of c x^2 - a x + b = 0 are q / c and b / q: no difference of almost equal numbers.
double Quadratic(double a, double b, double c, bool larger_side) {
  const double root = std::sqrt(std::max(0.0, a * a - 4 * b * c));
  const double sum = a + std::copysign(root, a);
  return (a >= 0) == larger_side ? sum / (2 * c) : 2 * b / sum;
}

// The search for one root.
class Search {
 public:
  Search(const double* poles, const double* squares, int64_t n, int64_t j, double rho)
      : poles_(poles), squares_(squares), n_(n), j_(j), rho_(rho), last_(j + 1 == n), split_(last_ ? n - 1 : j + 1) {}

  Root Find(double tolerance) {
    if (last_) {
      origin_ = poles_[j_];
      double total = 0;
      for (int64_t i = 0; i < n_; ++i) total += squares_[i];
      Bracket(0, rho_ * total);
      shift_ = rho_ * squares_[j_];  // without the other poles, which only push it further
      if (n_ == 1) return {origin_, shift_};
    } else {
      Start();
    }
    double before_last = high_ - low_;
    for (int step = 0; step < kSteps; ++step) {
      const SecularSums sums = At(shift_);
      const double value = 1 / rho_ + sums.before + sums.behind;
      const double slope = sums.before_slope + sums.behind_slope;
      const double size = 1 / rho_ + std::abs(sums.before) + std::abs(sums.behind) + std::abs(shift_) * slope;
      if (!(std::abs(value) > tolerance * size)) break;
      (value < 0 ? low_ : high_) = shift_;
      double next = shift_ + Correction(value, slope, sums);
      const bool slow = step % 3 == 2 && high_ - low_ > before_last / 2;
      if (step % 3 == 2) before_last = high_ - low_;
      if (slow || !(next > low_ && next < high_)) next = low_ + (high_ - low_) / 2;
      if (next == shift_ || next == low_ || next == high_) break;  // as close as numbers are
      shift_ = next;
    }
    return {origin_, shift_};
  }

 private:
  void Bracket(double low, double high) {
    low_ = low;
    high_ = high;
  }

  SecularSums At(double shift) const {
    return Kernels<double>().factorizations.secular(poles_, squares_, split_, n_, origin_, shift);
  }

  // From the nearer of the two poles, which the sign half-way tells; the first guess keeps both of them and takes the
  // others for constant.
  void Start() {
    const double gap = poles_[j_ + 1] - poles_[j_];
    const double own = squares_[j_], next = squares_[j_ + 1];
    origin_ = poles_[j_];
    const SecularSums sums = At(gap / 2);
    const double value = 1 / rho_ + sums.before + sums.behind;
    const double others = value + (own - next) / (gap / 2);
    const bool near = value >= 0;
    if (near) {
      Bracket(0, gap / 2);
      shift_ = Quadratic(others * gap + own + next, own * gap, others, false);
    } else {
      origin_ = poles_[j_ + 1];
      Bracket(-gap / 2, 0);
      shift_ = -Quadratic(-others * gap + own + next, next * gap, -others, false);
    }
    if (!(shift_ > low_ && shift_ < high_)) shift_ = low_ + (high_ - low_) / 2;
  }

  // The step to the root of c + q / (a - x) + r / (b - x), which has the value and the slopes of both parts here, with
  // a and b the poles beside the root: Li's "middle way" (1993).
  double Correction(double value, double slope, const SecularSums& sums) const {
    const int64_t before = last_ ? j_ - 1 : j_;
    const double to_before = (poles_[before] - origin_) - shift_, to_behind = (poles_[before + 1] - origin_) - shift_;
    const double c = value - to_before * sums.before_slope - to_behind * sums.behind_slope;
    const double a = (to_before + to_behind) * value - to_before * to_behind * slope;
    const double b = to_before * to_behind * value;
    const double step = Quadratic(a, b, c, last_);
    return step * value < 0 ? step : -value / slope;
  }

  const double* const poles_;
  const double* const squares_;
  const int64_t n_, j_;
  const double rho_;
  const bool last_;
  const int64_t split_;
  double origin_ = 0, shift_ = 0, low_ = 0, high_ = 0;
};

}  // namespace

Root SecularRoot(const double* poles, const double* squares, int64_t n, int64_t j, double rho, double tolerance) {
  return Search(poles, squares, n, j, rho).Find(tolerance);
}

}  // namespace curvax
