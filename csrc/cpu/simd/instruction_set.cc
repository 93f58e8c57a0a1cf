#include "cpu/simd/instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace curvax {
namespace {

Level Widest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Level::kAvx512f;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::kAvx2;
#endif
  return Level::kBaseline;
}

std::string_view Name(Level level) {
  switch (level) {
    case Level::kAvx512f:
      return "avx512f";
    case Level::kAvx2:
      return "avx2";
    case Level::kBaseline:
      break;
  }
  return "baseline";
}

Level Choose() {
  const Level widest = Widest();
  const char* asked = std::getenv("CURVAX_SIMD");
  if (asked == nullptr || *asked == '\0') return widest;
  for (const Level level : {Level::kBaseline, Level::kAvx2, Level::kAvx512f}) {
    if (Name(level) == asked) return level < widest ? level : widest;
  }
  throw std::runtime_error("CURVAX_SIMD is \"" + std::string(asked) + "\": set it to baseline, avx2 or avx512f");
}

}  // namespace

Level ChosenLevel() {
  static const Level level = Choose();
  return level;
}

std::string_view SimdLevel() { return Name(ChosenLevel()); }

}  // namespace curvax
