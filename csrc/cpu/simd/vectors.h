// Vectors of a fixed size for one instruction set: what every kernel is written in.
#pragma once

#include <cstdint>

#include "common/vector.h"
#include "cpu/simd/padding.h"

namespace curvax {

// The base of the classes of kernels, which gives them short names. Vectors are passed by reference: by value, how they
// are passed depends on the instruction set.
template <typename Isa, typename T, int kBytes>
struct Vectors {
  typedef T V __attribute__((vector_size(kBytes)));

  static constexpr int64_t kWidth = kBytes / static_cast<int64_t>(sizeof(T));

  static CURVAX_INLINE void Load(const T* from, V& to) { __builtin_memcpy(&to, from, sizeof(to)); }

  static CURVAX_INLINE void Store(const V& from, T* to) { __builtin_memcpy(to, &from, sizeof(from)); }

  // The sum of the lanes, each half by itself: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
  static CURVAX_INLINE T SumByHalves(const V& vector) {
    T lanes[kWidth];
    Store(vector, lanes);
    return SumOf<kWidth>(lanes);
  }

 private:
  template <int64_t kCount>
  static CURVAX_INLINE T SumOf(const T* lanes) {
    if constexpr (kCount == 1) {
      return lanes[0];
    } else {
      return SumOf<kCount / 2>(lanes) + SumOf<kCount / 2>(lanes + kCount / 2);
    }
  }
};

// 64 bytes: one register of AVX-512, two of AVX2, four of SSE or NEON; the compiler splits it.
template <typename Isa, typename T>
using WideVectors = Vectors<Isa, T, 64>;

template <typename Isa, typename T>
using RegisterVectors = Vectors<Isa, T, Isa::kRegisterBytes>;

}  // namespace curvax
