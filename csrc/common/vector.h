// The arithmetic of one element of a vector update. It stands once, for host and device code, and works on scalars and
// on vector-extension types alike.
#pragma once

#if defined(__CUDACC__)
#define CURVAX_INLINE __host__ __device__ __forceinline__
#else
#define CURVAX_INLINE inline __attribute__((always_inline))
#endif

namespace curvax {

// y <- y + a x. By reference: a 64-byte vector passed by value would make the calling convention depend on the target.
template <typename V>
CURVAX_INLINE void AddScaled(const V& a, const V& x, V& y) {
  y += a * x;
}

// acc <- acc + a b.
template <typename V>
CURVAX_INLINE void AddProduct(const V& a, const V& b, V& acc) {
  acc += a * b;
}

}  // namespace curvax
