// How a solve ended: the numbers of python/curvax/result.py.
#pragma once

namespace curvax {

enum Result : int {
  kConverged = 0,
  kMaxIterations = 1,
  kNegativeCurvature = 2,
  kBreakdown = 3,
  kNonFinite = 4,
  kInaccurate = 8,
  kNotPositiveDefinite = 9,
};

}  // namespace curvax
