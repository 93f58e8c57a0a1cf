// Conjugate gradients on kWidth systems at once, one per lane: for systems too small to fill a vector. The steps 1 to 5
// are those of common/batched_cg.h.
//
// Entry i of all systems is one vector of the processor, and so is entry (i, j) of all matrices:
//
//     system    0     1     2    ...   15
//     x[0]   [ x00   x10   x20   ...      ]   one vector of 64 bytes, 16 floats
//     x[1]   [ x01   x11   x21   ...      ]
//     ...
//
// A sum over the unknowns adds up vectors, without a sum over lanes. Each lane has its own scalars and its own end: a
// lane that has ended stands still (its alpha is masked) while the others go on.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd/padding.h"
#include "cpu/simd/system_kernels.h"
#include "cpu/simd/vectors.h"

namespace curvax {

template <typename Isa, typename T>
struct ConjugateGradientsByLane : WideVectors<Isa, T> {
  using Base = WideVectors<Isa, T>;
  using Base::kWidth;
  using Base::Load;
  using Base::Store;
  using typename Base::V;

  struct CgLanes {
    V *a, *b, *x, *y, *r, *p, *scaled, *q, *inverse;
    int64_t n;
    T size[kWidth], unit[kWidth], rr[kWidth], rz[kWidth], pp[kWidth];
    T first[kWidth], second[kWidth];
    bool cold[kWidth], live[kWidth];
    CgState<T> state[kWidth];
  };

  // Sums over the unknowns, lane by lane.
  static CURVAX_INLINE void LaneDot(const V* u, const V* v, int64_t n, T* sums) {
    V even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      AddProduct(u[i], v[i], even);
      AddProduct(u[i + 1], v[i + 1], odd);
    }
    if (i < n) AddProduct(u[i], v[i], even);
    even += odd;
    Store(even, sums);
  }

  static CURVAX_INLINE void LaneMaxAbs(const V* u, int64_t n, T* largest) {
    V largest_yet = {};
    for (int64_t i = 0; i < n; ++i) {
      const V v = u[i] < 0 ? -u[i] : u[i];
      largest_yet = largest_yet < v ? v : largest_yet;
    }
    Store(largest_yet, largest);
  }

  static CURVAX_INLINE void LaneProduct(const CgLanes& all, const V* v, V* to) {
    for (int64_t i = 0; i < all.n; ++i) {
      const V* row = all.a + i * all.n;
      V even = {}, odd = {};
      int64_t j = 0;
      for (; j + 2 <= all.n; j += 2) {
        AddProduct(row[j], v[j], even);
        AddProduct(row[j + 1], v[j + 1], odd);
      }
      if (j < all.n) AddProduct(row[j], v[j], even);
      to[i] = even + odd;
    }
  }

  // Entry i of every lane's `from`, or of none where it is null; lanes beyond `count` are zero.
  static CURVAX_INLINE void Gather(const T* const* from, int count, int64_t entries, int64_t stride, int64_t rows,
                                   V* to) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < entries; ++j) {
        V v = {};
        for (int l = 0; l < count; ++l) v[l] = from[l][i * stride + j];
        to[i * entries + j] = v;
      }
  }

  // r = b - A x.
  static CURVAX_INLINE void LaneResidual(CgLanes& all, const V* x) {
    LaneProduct(all, x, all.q);
    for (int64_t i = 0; i < all.n; ++i) all.r[i] = all.b[i] - all.q[i];
  }

  static CURVAX_INLINE void StartLanes(const CgProblem<T>* problems, int count, CgLanes& all) {
    const int64_t n = all.n = problems[0].n;
    V* next = reinterpret_cast<V*>(problems[0].scratch);
    all.a = next;
    next += n * n;
    for (V** vector : {&all.b, &all.x, &all.y, &all.r, &all.p, &all.scaled, &all.q, &all.inverse}) {
      *vector = next;
      next += n;
    }
    const T *matrices[kWidth], *rhs[kWidth], *starts[kWidth], *inverses[kWidth];
    for (int l = 0; l < count; ++l) {
      matrices[l] = problems[l].matrix;
      rhs[l] = problems[l].rhs;
      starts[l] = problems[l].start;
      inverses[l] = problems[l].inverse;
    }
    Gather(matrices, count, n, problems[0].stride, n, all.a);
    Gather(rhs, count, n, n, 1, all.b);
    T largest[kWidth], squares[kWidth], safe[kWidth];
    LaneMaxAbs(all.b, n, largest);
    for (int64_t l = 0; l < kWidth; ++l) safe[l] = largest[l] > 0 && IsFinite(largest[l]) ? largest[l] : T(1);
    V v;
    Load(safe, v);
    for (int64_t i = 0; i < n; ++i) all.x[i] = all.b[i] / v;
    LaneDot(all.x, all.x, n, squares);
    for (int64_t l = 0; l < kWidth; ++l) UnitScale<T>(largest[l], squares[l], all.size[l], all.unit[l]);
    V unit;
    Load(all.unit, unit);
    for (int64_t i = 0; i < n; ++i) all.r[i] = all.b[i] = all.b[i] * unit;
    for (int64_t l = 0; l < kWidth; ++l) all.cold[l] = true;
    if (problems[0].start != nullptr) {
      Gather(starts, count, n, n, 1, all.x);
      for (int64_t i = 0; i < n; ++i) all.x[i] = all.x[i] * unit;
      LaneResidual(all, all.x);
      T xb[kWidth], xr[kWidth];
      LaneDot(all.x, all.b, n, xb);
      LaneDot(all.x, all.r, n, xr);
      for (int64_t l = 0; l < kWidth; ++l) all.cold[l] = !StartIsGood<T>(xb[l], xr[l]);
    }
    for (int64_t l = 0; l < kWidth; ++l)
      if (all.cold[l])
        for (int64_t i = 0; i < n; ++i) {
          all.x[i][l] = 0;
          all.r[i][l] = all.b[i][l];
        }
    if (problems[0].inverse != nullptr)
      Gather(inverses, count, n, n, 1, all.inverse);
    else
      all.inverse = nullptr;
    for (int64_t i = 0; i < n; ++i) {
      all.y[i] = V{};
      all.scaled[i] = all.p[i] = all.inverse != nullptr ? all.r[i] * all.inverse[i] : all.r[i];
    }
    LaneDot(all.r, all.r, n, all.rr);
    LaneDot(all.r, all.p, n, all.rz);
    LaneDot(all.p, all.p, n, all.pp);
    for (int64_t l = 0; l < kWidth; ++l) {
      all.first[l] = all.second[l] = 1;
      all.live[l] = false;
      if (l >= count) continue;
      Begin<T>(all.rr[l], all.rz[l], problems[l].rtol, all.state[l]);
      all.live[l] = all.state[l].result == kRunning && problems[l].maxiter > 0;
    }
  }

  // One iteration of the live lanes; the others stand still.
  static CURVAX_INLINE bool AdvanceLanes(const CgProblem<T>* problems, int count, bool begins, CgLanes& all) {
    const int64_t n = all.n;
    // 1. q = A p, divided by the power of two that the first product tells.
    LaneProduct(all, all.scaled, all.q);
    V second;
    if (begins) {
      T of_q[kWidth], of_p[kWidth];
      LaneMaxAbs(all.q, n, of_q);
      LaneMaxAbs(all.p, n, of_p);
      for (int l = 0; l < count; ++l) {
        const PowersOfTwo<T> powers = DivideBy<T>(of_q[l], of_p[l]);
        all.first[l] = powers.first;
        all.second[l] = powers.second;
      }
      Load(all.first, second);
      for (int64_t i = 0; i < n; ++i) all.q[i] = all.q[i] * second;
    }
    Load(all.second, second);
    for (int64_t i = 0; i < n; ++i) all.q[i] = all.q[i] * second;
    // 2. alpha = r.z / p.q.
    T pq[kWidth], qq[kWidth], alpha[kWidth] = {}, moves[kWidth] = {}, beta[kWidth] = {}, on[kWidth] = {};
    LaneDot(all.p, all.q, n, pq);
    LaneDot(all.q, all.q, n, qq);
    CgStep<T> steps[kWidth];
    for (int l = 0; l < count; ++l) {
      if (!all.live[l]) continue;
      steps[l] = Measure<T>(pq[l], all.pp[l], qq[l], all.cold[l], all.state[l]);
      alpha[l] = steps[l].alpha;
      moves[l] = steps[l].moves;
    }
    // 3. y = y + alpha p, r = r - alpha q.  4. z = inverse r.
    V va, vm;
    Load(alpha, va);
    Load(moves, vm);
    for (int64_t i = 0; i < n; ++i) {
      V y = all.y[i], r = all.r[i];
      AddScaled(va, all.p[i], y);
      AddScaled(V(-va), all.q[i], r);
      all.y[i] = vm != 0 ? y : all.y[i];
      all.r[i] = vm != 0 ? r : all.r[i];
      // z, in the place of q.
      all.q[i] = all.inverse != nullptr ? all.r[i] * all.inverse[i] : all.r[i];
    }
    LaneDot(all.r, all.r, n, all.rr);
    LaneDot(all.r, all.q, n, all.rz);
    // 4. beta = r.z / (the old r.z).
    bool any = false;
    for (int l = 0; l < count; ++l) {
      if (!all.live[l]) continue;
      beta[l] = Proceed<T>(steps[l], all.rr[l], all.rz[l], problems[l].rtol, all.state[l]);
      all.live[l] = all.state[l].result == kRunning && all.state[l].count < problems[l].maxiter;
      on[l] = all.live[l];
      any = any || all.live[l];
    }
    // 5. p = z + beta p.
    V vb, vo, first;
    Load(beta, vb);
    Load(on, vo);
    Load(all.first, first);
    for (int64_t i = 0; i < n; ++i) {
      V p = all.q[i];
      AddScaled(vb, all.p[i], p);
      all.p[i] = vo != 0 ? p : all.p[i];
      all.scaled[i] = all.p[i] * first;
    }
    LaneDot(all.p, all.p, n, all.pp);
    return any;
  }

  static CURVAX_INLINE void FinishLanes(const CgProblem<T>* problems, int count, CgLanes& all, CgEnd<T>* ends) {
    const int64_t n = all.n;
    V first, second;
    Load(all.first, first);
    Load(all.second, second);
    for (int64_t i = 0; i < n; ++i) {
      const V added = all.y[i] * first * second;
      all.x[i] = all.x[i] + added;
    }
    T xb[kWidth], rr[kWidth];
    LaneDot(all.x, all.b, n, xb);
    for (int l = 0; l < count; ++l)
      if (xb[l] < 0) {
        // On an indefinite system what is added to a start may point uphill: then a short step along b instead.
        const T largest = all.state[l].largest;
        for (int64_t i = 0; i < n; ++i)
          all.x[i][l] = all.first[l] / (largest > 0 ? largest : T(1)) * all.b[i][l] * all.second[l];
      }
    LaneResidual(all, all.x);
    LaneDot(all.r, all.r, n, rr);
    for (int l = 0; l < count; ++l) {
      const T residual = all.size[l] == 0 ? T(0) : std::sqrt(rr[l]);
      for (int64_t i = 0; i < n; ++i) problems[l].value[i] = all.x[i][l] * all.size[l];
      ends[l] = {Outcome<T>(all.size[l], residual, problems[l].rtol, all.state[l]), all.state[l].count, residual};
    }
  }

  static void Solve(const CgProblem<T>* problems, int count, CgEnd<T>* ends) {
    CgLanes all;
    StartLanes(problems, count, all);
    bool any = false;
    for (int l = 0; l < count; ++l) any = any || all.live[l];
    for (bool begins = true; any; begins = false) any = AdvanceLanes(problems, count, begins, all);
    FinishLanes(problems, count, all, ends);
  }
};

}  // namespace curvax
