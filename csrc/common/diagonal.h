// The arithmetic of one entry of the diagonal methods (Sophia, AdaHessian). It stands once, for host and device code,
// and works on scalars and on vector-extension types alike: hence references, conditional expressions in place of
// branches, and scalars that come as the vector type.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "common/vector.h"

namespace curvax {

// How the averaged diagonal h becomes a denominator.
enum class Denominator {
  kFloor,   // max(slope h, offset)
  kLinear,  // h + offset
  kRoot,    // sqrt(h) + offset
  kPower,   // h^power + offset
  kDamped,  // max(h, 0) + offset
};
inline constexpr int kDenominators = 5;

// What the factors a and b of an estimate of the diagonal say.
enum class Estimate {
  kValue,      // a
  kSquare,     // a^2
  kProduct,    // a b
  kMagnitude,  // |a b|
};
inline constexpr int kEstimates = 4;

// The scalars of an update, in the order in which a foreign call passes them.
template <typename T>
struct UpdateScalars {
  T keep, gain;        // m' = keep m + gain g
  T mean_correction;   // 1 / (1 - keep^t)
  T correction;        // from the average to h
  T slope, power;      // of the denominator
  T offset, fallback;  // added to it or its floor; what replaces a denominator of 0
  T clip;              // bound on |direction|; infinity for none
  T decay;             // weight decay
  T rate;              // minus the learning rate
};

inline constexpr int kUpdateScalars = 11;

// Of an accumulation: keep, gain, and what the sum of magnitudes is multiplied by.
inline constexpr int kAccumulateScalars = 3;

template <typename V>
CURVAX_INLINE void SquareRoot(const V& x, V& y) {
  if constexpr (std::is_arithmetic_v<V>) {
    y = std::sqrt(x);
  } else {
    // Vector types have no square root of their own; the compiler makes one instruction of the loop.
    std::decay_t<decltype(x[0])> lanes[sizeof(V) / sizeof(x[0])];
    memcpy(lanes, &x, sizeof(V));
    for (auto& lane : lanes) lane = std::sqrt(lane);
    memcpy(&y, lanes, sizeof(V));
  }
}

template <typename V>
CURVAX_INLINE void RaiseTo(const V& power, const V& x, V& y) {
  if constexpr (std::is_arithmetic_v<V>) {
    y = std::pow(x, power);
  } else {
    for (size_t lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) y[lane] = std::pow(x[lane], power[lane]);
  }
}

// Comparisons are written so that NaN goes where jnp.maximum, jnp.clip and jnp.where send it.
template <Denominator kind, typename V>
CURVAX_INLINE void Denominate(const UpdateScalars<V>& s, const V& h, V& denominator) {
  const V zero = s.slope - s.slope;
  if constexpr (kind == Denominator::kFloor) {
    const V sloped = s.slope * h;
    denominator = sloped <= s.offset ? s.offset : sloped;
  } else if constexpr (kind == Denominator::kLinear) {
    denominator = h + s.offset;
  } else if constexpr (kind == Denominator::kRoot) {
    SquareRoot(h, denominator);
    denominator += s.offset;
  } else if constexpr (kind == Denominator::kPower) {
    RaiseTo(s.power, h, denominator);
    denominator += s.offset;
  } else {
    denominator = (h <= zero ? zero : h) + s.offset;
  }
  denominator = denominator > zero ? denominator : s.fallback;
}

// One entry: m becomes the new mean (the old one where the new one is not finite), p the new parameter, and `spoiled`
// stays 0 only if that is finite: 0 p is 0 for finite p and NaN otherwise.
template <Denominator kind, bool has_mean, typename V>
CURVAX_INLINE void UpdateEntry(const UpdateScalars<V>& s, const V& g, const V& average, V& m, V& p, V& spoiled) {
  V direction = g;
  if constexpr (has_mean) {
    const V mean = s.keep * m + s.gain * g;
    const V difference = mean - mean;  // 0, or NaN where the mean is not finite
    m = difference == difference ? mean : m;
    direction = s.mean_correction * mean;
  }
  V denominator;
  Denominate<kind>(s, s.correction * average, denominator);
  direction /= denominator;
  direction = direction > s.clip ? s.clip : direction;
  direction = direction < -s.clip ? -s.clip : direction;
  p += s.rate * (direction + s.decay * p);
  spoiled += p * (s.gain - s.gain);
}

template <Estimate kind, typename V>
CURVAX_INLINE void EstimateEntry(const V& a, const V& b, V& estimate) {
  if constexpr (kind == Estimate::kValue) {
    estimate = a;
  } else if constexpr (kind == Estimate::kSquare) {
    estimate = a * a;
  } else {
    estimate = a * b;
    if constexpr (kind == Estimate::kMagnitude) estimate = estimate < estimate - estimate ? -estimate : estimate;
  }
}

// average <- keep average + gain estimate, or the root of the sum of the squares of the two terms; adds the magnitude
// of the result to `total`. The root is that of 1 + (small / large)^2, so that no square overflows or underflows.
template <bool root_mean_square, typename V>
CURVAX_INLINE void MixEntry(const V& keep, const V& gain, const V& estimate, V& average, V& total) {
  V mixed = keep * average + gain * estimate;
  if constexpr (root_mean_square) {
    const V zero = keep - keep;
    V a = keep * average, b = gain * estimate;
    a = a < zero ? -a : a;
    b = b < zero ? -b : b;
    const V large = a < b ? b : a, small = a < b ? a : b;
    const V ratio = small / (large == zero ? zero + 1 : large);
    V root;
    SquareRoot(1 + ratio * ratio, root);
    mixed = large * root;
    average = mixed;
    total += mixed;
  } else {
    average = mixed;
    total += mixed < mixed - mixed ? -mixed : mixed;
  }
}

}  // namespace curvax
