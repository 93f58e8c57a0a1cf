// Conjugate gradients on one dense system, or on two in turn. The steps 1 to 5 are those of common/batched_cg.h.
//
// A pass reads each of its vectors once:
//
//   Product                1. q = A p
//   MeasurePass               p.q and q.q
//   Measure (common)       2. alpha
//   UpdatePass             3. y, r;  4. r.r and r.z, with z = inverse r not written down
//   Proceed (common)       4. beta
//   DirectionPass          5. p, and p.p for the next step 2
#pragma once

#include <cmath>
#include <cstdint>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd/dense_vectors.h"
#include "cpu/simd/padding.h"
#include "cpu/simd/system_kernels.h"

namespace curvax {

template <typename Isa, typename T>
struct ConjugateGradients : DenseVectors<Isa, T> {
  using Base = DenseVectors<Isa, T>;
  using Base::CopyPadded;
  using Base::Dot;
  using Base::FillZero;
  using Base::kWidth;
  using Base::Load;
  using Base::MaxAbs;
  using Base::Product;
  using Base::Residual;
  using Base::Scale;
  using Base::Store;
  using Base::SumLanes;
  using Base::UnitRhs;
  using typename Base::V;

  // q = second q; returns (p.q, q.q).
  static CURVAX_INLINE void MeasurePass(T second, const T* p, T* q, int64_t padded, T& pq, T& qq) {
    V vp, vq, with_p = {}, with_q = {};
    for (int64_t i = 0; i < padded; i += kWidth) {
      Load(p + i, vp);
      Load(q + i, vq);
      vq = vq * second;
      Store(vq, q + i);
      AddProduct(vp, vq, with_p);
      AddProduct(vq, vq, with_q);
    }
    pq = SumLanes(with_p);
    qq = SumLanes(with_q);
  }

  // Sums of r.r and r.z for z = inverse r, or r itself without one.
  struct ResidualSums {
    V with_r = {}, with_z = {};

    CURVAX_INLINE void Add(const V& vr, const T* inverse, int64_t i) {
      AddProduct(vr, vr, with_r);
      if (inverse == nullptr) return;
      V vw;
      Load(inverse + i, vw);
      vw = vw * vr;
      AddProduct(vw, vr, with_z);
    }

    CURVAX_INLINE void Write(const T* inverse, T& rr, T& rz) const {
      rr = SumLanes(with_r);
      rz = inverse == nullptr ? rr : SumLanes(with_z);
    }
  };

  static CURVAX_INLINE void ResidualPass(const T* r, const T* inverse, int64_t padded, T& rr, T& rz) {
    V vr;
    ResidualSums sums;
    for (int64_t i = 0; i < padded; i += kWidth) {
      Load(r + i, vr);
      sums.Add(vr, inverse, i);
    }
    sums.Write(inverse, rr, rz);
  }

  // y = y + alpha p, r = r - alpha q, and the sums of the new r.
  static CURVAX_INLINE void UpdatePass(T alpha, const T* p, const T* q, T* y, T* r, const T* inverse, int64_t padded,
                                       T& rr, T& rz) {
    const V plus = alpha - V{}, minus = -alpha - V{};
    V vp, vq, vy, vr;
    ResidualSums sums;
    for (int64_t i = 0; i < padded; i += kWidth) {
      Load(p + i, vp);
      Load(q + i, vq);
      Load(y + i, vy);
      Load(r + i, vr);
      AddScaled(plus, vp, vy);
      AddScaled(minus, vq, vr);
      Store(vy, y + i);
      Store(vr, r + i);
      sums.Add(vr, inverse, i);
    }
    sums.Write(inverse, rr, rz);
  }

  // p = z + beta p and scaled = first p; returns p.p.
  static CURVAX_INLINE T DirectionPass(T beta, T first, const T* r, const T* inverse, T* p, T* scaled, int64_t padded) {
    const V factor = beta - V{};
    V vz, vp, vw, with_p = {};
    for (int64_t i = 0; i < padded; i += kWidth) {
      Load(r + i, vz);
      Load(p + i, vp);
      if (inverse != nullptr) {
        Load(inverse + i, vw);
        vz = vz * vw;
      }
      AddScaled(factor, vp, vz);
      Store(vz, p + i);
      AddProduct(vz, vz, with_p);
      vz = vz * first;
      Store(vz, scaled + i);
    }
    return SumLanes(with_p);
  }

  // x = start / |rhs| and r = b - A x if that is worth keeping; says whether it is not.
  static CURVAX_INLINE bool BeginCold(const CgProblem<T>& problem, T unit, const T* b, T* x, T* q, T* r) {
    const int64_t padded = Padded<T>(problem.n);
    bool cold = true;
    if (problem.start != nullptr) {
      CopyPadded(problem.start, x, problem.n, padded);
      Scale(unit, x, x, padded);
      Residual(problem.matrix, problem.stride, problem.n, T(0), b, x, q, r);
      cold = !StartIsGood<T>(Dot(x, b, padded), Dot(x, r, padded));
    }
    if (cold) {
      FillZero(x, padded);
      Scale(T(1), b, r, padded);
    }
    return cold;
  }

  // A system under way. The vectors stand one after the other in its scratch.
  struct CgRun {
    T *b, *x, *y, *r, *p, *q;
    T* scaled;  // p / 2^exponent, in part: what is multiplied with A
    const T* inverse;
    T size, rr, rz, pp;
    bool cold;
    CgState<T> state;
    PowersOfTwo<T> powers;
  };

  static CURVAX_INLINE void Start(const CgProblem<T>& problem, CgRun& run) {
    const int64_t n = problem.n, padded = Padded<T>(n);
    T* next = problem.scratch;
    for (T** vector : {&run.b, &run.x, &run.y, &run.r, &run.p, &run.scaled, &run.q}) {
      *vector = next;
      next += padded;
    }
    if (problem.inverse != nullptr) CopyPadded(problem.inverse, next, n, padded);
    run.inverse = problem.inverse != nullptr ? next : nullptr;
    T unit;
    UnitRhs(problem.rhs, n, run.b, run.size, unit);
    run.cold = BeginCold(problem, unit, run.b, run.x, run.q, run.r);
    FillZero(run.y, padded);
    FillZero(run.p, padded);
    ResidualPass(run.r, run.inverse, padded, run.rr, run.rz);
    Begin<T>(run.rr, run.rz, problem.rtol, run.state);
    run.powers = PowersOfTwo<T>{};
    run.pp = DirectionPass(T(0), T(1), run.r, run.inverse, run.p, run.scaled, padded);
  }

  static CURVAX_INLINE bool IsRunning(const CgProblem<T>& problem, const CgRun& run) {
    return run.state.result == kRunning && run.state.count < problem.maxiter;
  }

  // x + y / 2^exponent.
  static CURVAX_INLINE void Iterate(const CgRun& run, int64_t padded, T* to) {
    V vx, vy;
    for (int64_t i = 0; i < padded; i += kWidth) {
      Load(run.x + i, vx);
      Load(run.y + i, vy);
      vy = vy * run.powers.first * run.powers.second;
      vx = vx + vy;
      Store(vx, to + i);
    }
  }

  static CURVAX_INLINE void Advance(const CgProblem<T>& problem, CgRun& run) {
    const int64_t padded = Padded<T>(problem.n);
    // 1. q = A p, divided by the power of two that the first product tells.
    Product(problem.matrix, problem.stride, problem.n, run.scaled, run.q);
    if (run.state.count == 0) {
      run.powers = DivideBy<T>(MaxAbs(run.q, padded), MaxAbs(run.p, padded));
      Scale(run.powers.first, run.q, run.q, padded);
    }
    T pq, qq;
    MeasurePass(run.powers.second, run.p, run.q, padded, pq, qq);
    // 2. alpha = r.z / p.q.
    const CgStep<T> step = Measure<T>(pq, run.pp, qq, run.cold, run.state);
    // 3. y = y + alpha p, r = r - alpha q.
    if (step.moves) UpdatePass(step.alpha, run.p, run.q, run.y, run.r, run.inverse, padded, run.rr, run.rz);
    // 4. beta = r.z / (the old r.z).
    const T beta = Proceed<T>(step, run.rr, run.rz, problem.rtol, run.state);
    // 5. p = z + beta p.
    run.pp = DirectionPass(beta, run.powers.first, run.r, run.inverse, run.p, run.scaled, padded);
  }

  static CURVAX_INLINE CgEnd<T> Finish(const CgProblem<T>& problem, CgRun& run) {
    const int64_t n = problem.n, padded = Padded<T>(n);
    Iterate(run, padded, run.x);
    if (Dot(run.x, run.b, padded) < 0) {
      // On an indefinite system what is added to a start may point uphill: then a short step along b instead.
      Scale(run.powers.first / (run.state.largest > 0 ? run.state.largest : T(1)), run.b, run.x, padded);
      Scale(run.powers.second, run.x, run.x, padded);
    }
    Residual(problem.matrix, problem.stride, n, T(0), run.b, run.x, run.q, run.r);
    const T residual = run.size == 0 ? T(0) : std::sqrt(Dot(run.r, run.r, padded));
    for (int64_t i = 0; i < n; ++i) problem.value[i] = run.x[i] * run.size;
    return {Outcome<T>(run.size, residual, problem.rtol, run.state), run.state.count, residual};
  }

  // Two systems in turn: while one waits for its sums and quotients, the other's product keeps the processor busy.
  static void Solve(const CgProblem<T>* problems, int count, CgEnd<T>* ends) {
    CgRun runs[2];
    bool runs_on[2] = {};
    for (int k = 0; k < count; ++k) {
      Start(problems[k], runs[k]);
      runs_on[k] = IsRunning(problems[k], runs[k]);
    }
    while (runs_on[0] || runs_on[1])
      for (int k = 0; k < 2; ++k) {
        if (!runs_on[k]) continue;
        Advance(problems[k], runs[k]);
        runs_on[k] = IsRunning(problems[k], runs[k]);
      }
    for (int k = 0; k < count; ++k) ends[k] = Finish(problems[k], runs[k]);
  }
};

}  // namespace curvax
