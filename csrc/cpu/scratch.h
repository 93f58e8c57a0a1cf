// Memory of a handler's own, for the length of a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace curvax {

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Uninitialized elements on a boundary of 64 bytes.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t elements)
      : memory_(static_cast<T*>(::operator new(std::max<int64_t>(1, elements) * sizeof(T), std::align_val_t(64)))) {}
  T* data() const { return memory_.get(); }

 private:
  std::unique_ptr<T, AlignedDelete> memory_;
};

}  // namespace curvax
