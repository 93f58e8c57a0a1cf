// Lengths of vectors and of rows of packed matrices: whole vectors of 64 bytes, with zeros behind the last entry, so
// that no loop over them has a remainder.
#pragma once

#include <cstdint>

namespace curvax {

// Entries of 64 bytes.
template <typename T>
inline constexpr int64_t kWideEntries = 64 / static_cast<int64_t>(sizeof(T));

template <typename T>
constexpr int64_t Padded(int64_t n) {
  return (n + kWideEntries<T> - 1) / kWideEntries<T> * kWideEntries<T>;
}

}  // namespace curvax
