// The decisions of conjugate gradients on one system (Hestenes and Stiefel 1952): what the inner products of an
// iteration mean. They stand once, for host and device code, whose comments use the same numbers; who calls them owns
// the vectors. kernels/batched_cg/reference.py says the same in JAX.
//
// A x = b is solved for b of norm 1, with a diagonal preconditioner, `inverse`. From y = 0, r = b - A x at the start x,
// and p = z = inverse r:
//   1. q = A p
//   2. alpha = r.z / p.q               Measure: or the end, where p.q shows that A is not positive definite
//   3. y = y + alpha p,  r = r - alpha q
//   4. z = inverse r,  beta = r.z / (r.z before the step)     Proceed: or the end, where r is small
//   5. p = z + beta p, and again from 1
// The solution is x + y.
//
// A = ((4, 1), (1, 3)), b = (1, 2), not scaled, without start and preconditioner:
//   p = r = (1, 2)     q = (6, 7)       alpha = 5 / 20             y = (1, 2) / 4    r = (-1/2, 1/4)    beta = 1/16
//   p = (-7, 6) / 16   q = (-22, 11)/16 alpha = (5/16) / (55/64)   y = (1, 7) / 11   r = 0
#pragma once

#include <cfloat>
#include <cmath>
#include <limits>

#include "common/result.h"
#include "common/vector.h"

namespace curvax {

// A residual of at most so many times the tolerance is the tolerance met: the recurrence of the residual, which decides
// when to stop, and the residual itself differ by rounding.
inline constexpr int kSlack = 2;

inline constexpr int kRunning = -1;

template <typename T>
struct Precision;
template <>
struct Precision<float> {
  static constexpr float eps = FLT_EPSILON;
  static constexpr float least = FLT_MIN;
};
template <>
struct Precision<double> {
  static constexpr double eps = DBL_EPSILON;
  static constexpr double least = DBL_MIN;
};

// An infinity or NaN less itself is NaN.
template <typename T>
CURVAX_INLINE bool IsFinite(T v) {
  return v - v == T(0);
}

// The operator is divided by 2^exponent, the size of its first product: squares of products then neither overflow nor
// vanish, and since powers of two are exact, nothing else changes. In two factors, each far from the ends of the range.
template <typename T>
struct PowersOfTwo {
  int exponent = 0;
  T first = 1, second = 1;  // their product is 2^-exponent
};

template <typename T>
CURVAX_INLINE PowersOfTwo<T> DivideBy(T largest_q, T largest_p) {
  PowersOfTwo<T> powers;
  if (!(largest_q > 0) || !(largest_p > 0) || !IsFinite(largest_q) || !IsFinite(largest_p)) return powers;
  int of_q, of_p;
  (void)std::frexp(largest_q, &of_q);
  (void)std::frexp(largest_p, &of_p);
  powers.exponent = of_q - of_p;
  const int half = powers.exponent >> 1;
  powers.first = static_cast<T>(std::ldexp(T(1), -half));
  powers.second = static_cast<T>(std::ldexp(T(1), half - powers.exponent));
  return powers;
}

// |b| for b whose largest magnitude is `largest` and whose sum of squares, divided by that, is `squares`; and 1 / |b|,
// 0 where there is none. A norm whose inverse is not a normal number, which processors may take for zero, counts as
// infinite.
template <typename T>
CURVAX_INLINE void UnitScale(T largest, T squares, T& size, T& unit) {
  const T safe = largest > 0 && IsFinite(largest) ? largest : T(1);
  size = safe * static_cast<T>(std::sqrt(squares));
  if (size > T(1) / Precision<T>::least) size = std::numeric_limits<T>::infinity();
  unit = size > 0 && IsFinite(size) ? T(1) / size : T(0);
}

// What scalars one system carries from iteration to iteration.
template <typename T>
struct CgState {
  T rz = 0;
  T largest = 0;  // largest |A p| / |p| met so far
  int count = 0;
  int result = kRunning;
};

// A start is worth keeping if it points downhill and lowers the quadratic x.A x / 2 - b.x = -x.(b + r) / 2.
template <typename T>
CURVAX_INLINE bool StartIsGood(T xb, T xr) {
  return xb > 0 && xb + xr > 0;
}

template <typename T>
CURVAX_INLINE void Begin(T rr, T rz, T rtol, CgState<T>& state) {
  state = CgState<T>{};
  state.rz = rz;
  if (!IsFinite(rr))
    state.result = kNonFinite;
  else if (rr <= rtol * rtol)
    state.result = kConverged;
}

template <typename T>
struct CgStep {
  T alpha = 0;  // 0 where the vectors stay as they are
  bool moves = false;
  int outcome = kRunning;
};

// From p.Ap, p.p and |Ap|^2: how far to go along p, and whether that ends the iteration. `cold`: without a start.
template <typename T>
CURVAX_INLINE CgStep<T> Measure(T pq, T pp, T qq, bool cold, CgState<T>& state) {
  CgStep<T> step;
  const bool first = state.count == 0;
  ++state.count;
  if (!IsFinite(pq) || !IsFinite(qq)) {
    step.outcome = kNonFinite;
    return step;
  }
  const T curvature = pq / pp;
  const T magnitude = static_cast<T>(std::sqrt(qq / pp));
  if (magnitude > state.largest) state.largest = magnitude;
  const T floor = Precision<T>::eps * state.largest;
  if (curvature > floor) {
    step.alpha = state.rz / pq;
    step.moves = true;
  } else if (curvature < -floor) {
    step.outcome = kNegativeCurvature;
    // Along a first direction of negative curvature: the step that |A p| / |p| as curvature would give.
    step.moves = first && cold;
    if (step.moves) step.alpha = state.rz / static_cast<T>(std::sqrt(pp * qq));
  } else {
    // A direction of length zero: the residual is exactly zero.
    step.outcome = pp > 0 ? kBreakdown : kConverged;
  }
  return step;
}

// After the step: the factor of the old direction in the new one, and the outcome.
template <typename T>
CURVAX_INLINE T Proceed(const CgStep<T>& step, T rr, T rz, T rtol, CgState<T>& state) {
  const T beta = rz / (state.rz > 0 ? state.rz : T(1));
  state.rz = rz;
  if (!IsFinite(rr))
    state.result = kNonFinite;
  else if (step.outcome != kRunning)
    state.result = step.outcome;
  else if (rr <= rtol * rtol)
    state.result = kConverged;
  return beta;
}

// The outcome once nothing runs any more, from the true residual.
template <typename T>
CURVAX_INLINE int Outcome(T size, T residual, T rtol, const CgState<T>& state) {
  if (!IsFinite(size)) return kNonFinite;
  if (state.result == kRunning) return kMaxIterations;
  if (state.result == kConverged && !(residual <= kSlack * rtol)) return kInaccurate;
  return state.result;
}

}  // namespace curvax
