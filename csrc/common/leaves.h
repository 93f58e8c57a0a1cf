// The leaves of a pytree as a foreign call sees them, cut into blocks: what a multi-tensor op walks over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/operands.h"

namespace curvax {

// Elements per block, the unit of work and of reduction.
inline constexpr int64_t kBlock = 4096;

// Every leaf has the batch axes of the scalars in front; what remains is one member's leaf, of `sizes[leaf]` elements.
struct Layout {
  ffi::DataType dtype;
  Dims batch_dims;
  int64_t batch = 1;
  std::vector<int64_t> sizes;
  std::vector<int64_t> first_block;  // per leaf and one past the end, within one member
  int64_t elements = 0;              // of one member

  int64_t blocks() const { return first_block.back(); }
};

inline ffi::Error MakeLayout(const char* op, ffi::DataType dtype, const Dims& batch_dims, const Operand* leaves,
                             size_t count, Layout& layout) {
  layout.dtype = dtype;
  layout.batch_dims = batch_dims;
  layout.batch = Product(batch_dims);
  layout.first_block.assign(1, 0);
  for (size_t leaf = 0; leaf < count; ++leaf) {
    const Dims& dims = leaves[leaf].dims;
    const bool fits =
        dims.size() >= batch_dims.size() && std::equal(batch_dims.begin(), batch_dims.end(), dims.begin());
    if (!fits)
      return Refuse(op, "leaf ", leaf, " of shape ", Shape(dims), " does not begin with the batch axes ",
                    Shape(batch_dims), " of the scalar");
    const int64_t size = Product(Dims(dims.begin() + batch_dims.size(), dims.end()));
    layout.sizes.push_back(size);
    layout.elements += size;
    layout.first_block.push_back(layout.first_block.back() + (size + kBlock - 1) / kBlock);
  }
  return ffi::Error::Success();
}

}  // namespace curvax
