// The handlers of diagonal_update as XLA calls them, on the CPU (with copies, and looking first) and emulated on the
// GPU: random calls, some of whose outcomes are not finite, must come to the same parameters, means and verdicts. (What
// is right is tested from Python on the CPU.) Calls that do not fit are refused with a sentence that names the op, and
// none touches memory that is not its own.

#include "check.h"
#include "cuda_emulator.h"
//
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "call_frame.h"
#include "cpu/diagonal.h"
#include "cuda/diagonal.cu"

namespace curvax {
namespace {

using call_frame::Attribute;
using call_frame::Buffer;
using call_frame::Call;
using ffi::DataType;

std::mt19937 randomness(7);

int64_t Below(int64_t bound) { return static_cast<int64_t>(randomness() % bound); }

double Get(const Buffer& buffer, int64_t i) {
  float value = 0;
  switch (buffer.dtype) {
    case DataType::F64:
      return buffer.as<double>()[i];
    case DataType::F32:
      return buffer.as<float>()[i];
    case DataType::BF16:
      Widen(buffer.as<BFloat16>()[i], value);
      return value;
    case DataType::F16:
      Widen(buffer.as<Float16>()[i], value);
      return value;
    default:
      return buffer.as<uint8_t>()[i];
  }
}

void Set(const Buffer& buffer, int64_t i, double value) {
  switch (buffer.dtype) {
    case DataType::F64:
      buffer.as<double>()[i] = value;
      break;
    case DataType::F32:
      buffer.as<float>()[i] = static_cast<float>(value);
      break;
    case DataType::BF16:
      Narrow(static_cast<float>(value), buffer.as<BFloat16>()[i]);
      break;
    case DataType::F16:
      Narrow(static_cast<float>(value), buffer.as<Float16>()[i]);
      break;
    default:
      buffer.as<uint8_t>()[i] = value != 0;
  }
}

double Epsilon(DataType dtype) {
  if (dtype == DataType::F64) return std::numeric_limits<double>::epsilon();
  if (dtype == DataType::F32) return std::numeric_limits<float>::epsilon();
  return dtype == DataType::F16 ? 0x1p-10 : 0x1p-7;
}

using Dims_ = std::vector<int64_t>;

Dims_ Join(Dims_ a, const Dims_& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Buffer Filled(DataType dtype, const Dims_& dims, bool positive = false) {
  Buffer buffer(dtype, dims, Below(2) * ffi::ByteWidth(dtype));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < buffer.size(); ++i) {
    const double value = normal(randomness);
    Set(buffer, i, positive ? std::abs(value) : value);
  }
  return buffer;
}

// A call with leaves of random shapes and dtypes.
struct Problem {
  Dims_ batch;
  std::vector<Dims_> shapes;
  std::vector<DataType> dtypes;
  std::vector<Buffer> operands;
  int64_t members = 1, blocks = 0;
  DataType scalars = DataType::F32;

  explicit Problem(bool wide) {
    for (int64_t axes = Below(2); axes > 0; --axes) batch.push_back(1 + Below(3));
    for (int64_t d : batch) members *= d;
    for (int64_t leaves = 1 + Below(5); leaves > 0; --leaves) {
      Dims_ shape;
      for (int64_t axes = Below(3); axes >= 0; --axes) shape.push_back(Below(axes ? 9 : 90));
      if (Below(4) == 0) shape = {4096 + Below(3) - 1, Below(2) + 1};
      const DataType all[] = {DataType::F32, DataType::F64, DataType::BF16, DataType::F16};
      dtypes.push_back(all[Below(wide ? 2 : 4)]);
      shapes.push_back(shape);
      if (dtypes.back() == DataType::F64) scalars = DataType::F64;
      int64_t size = 1;
      for (int64_t d : shape) size *= d;
      blocks += (size + kBlock - 1) / kBlock;
    }
  }

  Buffer Leaf(size_t leaf, bool wide, bool positive = false) const {
    return Filled(wide ? WideDtype(dtypes[leaf]) : dtypes[leaf], Join(batch, shapes[leaf]), positive);
  }

  void AddVector(std::vector<Buffer>& to, bool wide, bool positive = false) const {
    for (size_t leaf = 0; leaf < shapes.size(); ++leaf) to.push_back(Leaf(leaf, wide, positive));
  }
};

// `least`: the rounding error that even a wide result has, since it adds up narrower ones.
void Near(const std::vector<Buffer>& got, const std::vector<Buffer>& want, size_t begin, size_t end, const char* what,
          double least = 0) {
  for (size_t r = begin; r < end; ++r)
    for (int64_t i = 0; i < got[r].size(); ++i) {
      const double a = Get(got[r], i), b = Get(want[r], i);
      const bool near = std::abs(a - b) <= 64 * std::max(least, Epsilon(got[r].dtype)) * (1 + std::abs(b));
      CHECK(near || (std::isnan(a) && std::isnan(b)) || a == b,
            "%s: element %d of result %zu is %.17g, on the CPU %.17g", what, static_cast<int>(i), r, a, b);
    }
}

std::vector<Buffer> Copies(const std::vector<Buffer>& from) {
  std::vector<Buffer> copies;
  for (const Buffer& buffer : from) copies.push_back(buffer.Copy());
  return copies;
}

// Results in place of operands from `from` on, as XLA aliases them.
void Alias(const std::vector<Buffer>& operands, size_t from, size_t count, std::vector<Buffer>& results) {
  for (size_t i = 0; i < count; ++i) results.push_back(operands[from + i]);
}

// Makes a call not to fit. (With one leaf a call that lacks an operand or a result can be another that fits.)
void Spoil(std::vector<Buffer>& operands, std::vector<Buffer>& results, size_t leaves) {
  std::vector<Buffer>& list = Below(2) ? operands : results;
  const size_t which = Below(list.size());
  switch (Below(leaves > 1 ? 3 : 2)) {
    case 0:
      list[which] = Buffer(DataType::S32, list[which].dims);
      break;
    case 1:
      list[which] = Buffer(list[which].dtype, Join(list[which].dims, {2}));
      break;
    default:
      list.erase(list.begin() + which);
  }
}

void CheckRefused(const std::optional<std::string>& error, const char* op) {
  CHECK(error && error->find(op) != std::string::npos, "expected %s to refuse, got %s", op,
        error ? error->c_str() : "success");
}

void TestUpdate() {
  Problem p(false);
  const size_t n = p.shapes.size();
  const int64_t denominator = Below(kDenominators);
  const bool has_mean = Below(3) != 0;
  Buffer sound(DataType::PRED, p.batch), scalars(p.scalars, Join(p.batch, {kUpdateScalars}));
  for (int64_t member = 0; member < p.members; ++member) {
    Set(sound, member, Below(6) != 0);
    const double row[] = {0.9, 0.1, 1.3, 1.2, 0.3, 0.7, 0.05, 0.5, 2.0 + member, 0.1, -0.01};
    for (int i = 0; i < kUpdateScalars; ++i) Set(scalars, member * kUpdateScalars + i, row[i]);
  }
  p.operands = {sound, scalars};
  p.AddVector(p.operands, false);
  p.AddVector(p.operands, true, true);
  p.AddVector(p.operands, true);
  if (has_mean) p.AddVector(p.operands, true);
  const Buffer& gradient = p.operands[2 + 2 * n + Below(n)];
  if (Below(2) && gradient.size() > 0)
    Set(gradient, Below(gradient.size()), Below(2) ? NAN : std::numeric_limits<double>::infinity());
  Attribute decays{"decays", {}, Attribute::kIntegers};
  for (size_t leaf = 0; leaf < n; ++leaf) decays.values.push_back(Below(2));

  const auto run = [&](bool cuda, bool copies, bool spoil) {
    std::vector<Buffer> operands = Copies(p.operands), results = {Buffer(DataType::PRED, p.batch)};
    Alias(operands, 2, n, results);
    if (has_mean) Alias(operands, 2 + 3 * n, n, results);
    if (copies) p.AddVector(results, false);
    if (cuda) results.emplace_back(DataType::U8, Join(p.batch, {p.blocks}));
    std::vector<Attribute> attributes = {{"denominator", {denominator}}, decays};
    if (!cuda) attributes.push_back({"threads", {Below(4)}});
    if (spoil) Spoil(operands, results, n);
    const auto error =
        Call(cuda ? DiagonalUpdateCudaHandler : DiagonalUpdateHandler, operands, results, attributes, 1 + Below(3));
    if (spoil)
      CheckRefused(error, "diagonal_update");
    else
      CHECK(!error, "%s", error->c_str());
    return results;
  };
  const size_t shared = 1 + (has_mean ? 2 : 1) * n;
  const auto want = run(false, true, false);
  Near(run(false, false, false), want, 0, shared, "looking first");
  Near(run(true, true, false), want, 0, shared, "CUDA");
  // Members that are not finite keep their parameters to the bit.
  const auto cuda = run(true, true, false);
  for (int64_t member = 0; member < p.members; ++member) {
    if (Get(want[0], member) != 0) continue;
    for (size_t leaf = 0; leaf < n; ++leaf) {
      const int64_t size = cuda[1 + leaf].size() / p.members;
      for (int64_t i = member * size; i < (member + 1) * size; ++i)
        for (const auto* results : {&want, &cuda})
          CHECK(Get((*results)[1 + leaf], i) == Get(p.operands[2 + leaf], i), "a parameter changed");
    }
  }
  if (Below(2)) run(Below(2), true, true);
}

void TestAccumulate() {
  Problem p(true);
  const size_t n = p.shapes.size();
  const int64_t estimate = Below(kEstimates);
  const bool two = estimate >= 2, root_mean_square = Below(2);
  Buffer scalars(p.scalars, Join(p.batch, {kAccumulateScalars}));
  for (int64_t member = 0; member < p.members; ++member) {
    const double row[] = {0.9, 0.1, 0.01};
    for (int i = 0; i < kAccumulateScalars; ++i) Set(scalars, member * kAccumulateScalars + i, row[i]);
  }
  p.operands = {scalars};
  p.AddVector(p.operands, true, root_mean_square);
  p.AddVector(p.operands, true);
  if (two) p.AddVector(p.operands, true);
  const Buffer& factor = p.operands[1 + n + Below(n)];
  if (Below(2) && factor.size() > 0) Set(factor, Below(factor.size()), NAN);

  const auto run = [&](bool cuda, bool copies, bool spoil) {
    std::vector<Buffer> operands = Copies(p.operands);
    std::vector<Buffer> results = {Buffer(DataType::PRED, p.batch), Buffer(p.scalars, p.batch)};
    Alias(operands, 1, n, results);
    if (copies) p.AddVector(results, true);
    if (cuda) results.emplace_back(DataType::U8, Join(p.batch, {8 * p.blocks}));
    std::vector<Attribute> attributes = {{"estimate", {estimate}},
                                         {"root_mean_square", {root_mean_square}, Attribute::kBoolean}};
    if (!cuda) attributes.push_back({"threads", {Below(4)}});
    if (spoil) Spoil(operands, results, n);
    const auto error = Call(cuda ? DiagonalAccumulateCudaHandler : DiagonalAccumulateHandler, operands, results,
                            attributes, 1 + Below(3));
    if (spoil)
      CheckRefused(error, "diagonal_accumulate");
    else
      CHECK(!error, "%s", error->c_str());
    return results;
  };
  const auto want = run(false, true, false);
  const auto looked = run(false, false, false);
  Near(looked, want, 0, 2, "looking first", Epsilon(DataType::F32));
  Near(looked, want, 2, 2 + n, "looking first");
  const auto cuda = run(true, true, false);
  Near(cuda, want, 0, 2, "CUDA", Epsilon(DataType::F32));
  Near(cuda, want, 2, 2 + n, "CUDA");
  if (Below(2)) run(Below(2), true, true);
}

// float16 and bfloat16 by their definition: the nearest representable number, ties to the even one.
void TestHalves() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    float wide, again;
    const Float16 half{static_cast<uint16_t>(bits)};
    Widen(half, wide);
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    if (exponent < 31)
      CHECK(std::abs(wide) == magnitude && std::signbit(wide) == (bits >> 15), "float16 %x is %g", bits, wide);
    else
      CHECK(mantissa ? std::isnan(wide) : std::isinf(wide), "float16 %x is %g", bits, wide);
    Float16 back;
    Narrow(wide, back);
    Widen(back, again);
    CHECK(std::isnan(wide) ? std::isnan(again) : back.bits == half.bits, "float16 %x came back as %x", bits, back.bits);
    // Halfway to the next one, a little below and a little above.
    if (exponent >= 31 || bits >= 0x7bff) continue;
    float next;
    Widen(Float16{static_cast<uint16_t>(bits + 1)}, next);
    const float middle = wide + (next - wide) / 2;
    for (const auto& [value, expected] : {std::pair{std::nextafterf(middle, 0.0f), bits},
                                          {std::nextafterf(middle, 1e9f), bits + 1},
                                          {middle, bits + (bits & 1)}}) {
      Narrow(value, back);
      CHECK(back.bits == expected, "%.9g became float16 %x, expected %x", value, back.bits, expected);
    }
  }
  BFloat16 brief;
  Narrow(std::numeric_limits<float>::max(), brief);
  CHECK(brief.bits == 0x7f80, "%x", brief.bits);
  Narrow(1.00390625f, brief);  // 1 + 2^-8, halfway between 1 and the next
  CHECK(brief.bits == 0x3f80, "%x", brief.bits);
  Narrow(FromBits(0x7f800001), brief);
  CHECK((brief.bits & 0x7fff) > 0x7f80, "NaN became %x", brief.bits);
}

}  // namespace
}  // namespace curvax

int main() {
  curvax::TestHalves();
  for (int round = 0; round < 25; ++round) {
    curvax::TestUpdate();
    curvax::TestAccumulate();
  }
  std::puts("ok");
}
