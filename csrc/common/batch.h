// Many independent systems in one call: batch axes that broadcast, read without copying anything.
#pragma once

#include <cstdint>

#include "common/operands.h"
#include "common/vector.h"

namespace curvax {

// More runs of axes that alternate between broadcast and not than any use has.
inline constexpr int kMaxAxes = 8;

// Which entry of an operand belongs to a system: mixed-radix digits of the system's number, where broadcast axes count
// nothing.
struct Broadcast {
  int rank = 0;
  int64_t size[kMaxAxes] = {};
  int64_t step[kMaxAxes] = {};

  CURVAX_INLINE int64_t At(int64_t system) const {
    int64_t entry = 0;
    for (int axis = rank - 1; axis >= 0; --axis) {
      entry += system % size[axis] * step[axis];
      system /= size[axis];
    }
    return entry;
  }
};

// `dims` has the batch axes, each of the full size or 1, and then `own`. Neighboring axes that are alike become one.
inline ffi::Error MakeBroadcast(const char* op, size_t index, const Operand& operand, const Dims& batch,
                                const Dims& own, Broadcast& broadcast) {
  const Dims& dims = operand.dims;
  bool fits = dims.size() == batch.size() + own.size();
  for (size_t axis = 0; fits && axis < batch.size(); ++axis) fits = dims[axis] == batch[axis] || dims[axis] == 1;
  for (size_t axis = 0; fits && axis < own.size(); ++axis) fits = dims[batch.size() + axis] == own[axis];
  if (!fits)
    return Refuse(op, "operand ", index, " has shape ", Shape(dims), ", expected the batch axes ", Shape(batch),
                  ", each whole or of size 1, and then ", Shape(own));
  broadcast = Broadcast{};
  bool whole = false;
  for (size_t axis = 0; axis < batch.size(); ++axis) {
    if (batch[axis] == 1) continue;
    const bool now = dims[axis] == batch[axis];
    if (broadcast.rank == 0 || now != whole) {
      if (broadcast.rank == kMaxAxes)
        return Refuse(op, "operand ", index, " of shape ", Shape(dims), " broadcasts along more than ", kMaxAxes,
                      " separate runs of axes: reshape the batch");
      broadcast.size[broadcast.rank] = 1;
      broadcast.step[broadcast.rank++] = now;
    }
    broadcast.size[broadcast.rank - 1] *= batch[axis];
    whole = now;
  }
  int64_t step = 1;
  for (int axis = broadcast.rank - 1; axis >= 0; --axis) {
    const bool counts = broadcast.step[axis] != 0;
    broadcast.step[axis] = counts ? step : 0;
    if (counts) step *= broadcast.size[axis];
  }
  return ffi::Error::Success();
}

}  // namespace curvax
