// Operands and result of gram_accumulate's foreign call, read and checked. Its contract is in
// kernels/gram_accumulate/native.py.
#pragma once

#include <cstdint>
#include <vector>

#include "common/operands.h"

namespace curvax {

// Factors of one layer's rows of all examples on one side of the products: row r of example b is, for block g of the
// layer, the sum over positions t of a[b, g, t] d[b, g, r, t]^T, or d[b, g, r, 0] without activations.
struct GramFactors {
  Operand activations;  // (batch, examples, blocks, positions, in); no data without
  Operand cotangents;   // (batch, examples, blocks, rows, positions, out)
  int64_t examples = 0;
};

struct GramLayer {
  bool scaled = false;  // with activations
  int64_t blocks = 0, positions = 0, in = 0, out = 0;
  GramFactors left, right;
};

struct GramCall {
  ffi::DataType dtype;
  int64_t members = 0;  // of the batch
  int64_t rows = 0, columns = 0;
  int64_t per_example = 0;  // rows of an example
  bool triangle = false;    // the rows meet themselves
  bool mirror = false;      // the upper triangle too
  Operand start;            // what is added to; no data for zeros
  Operand result;
  std::vector<GramLayer> layers;
};

inline ffi::Error ReadFactors(const char* op, ffi::RemainingArgs args, size_t& index, const Dims& batch, GramCall& call,
                              GramLayer& layer, GramFactors& factors) {
  const auto dtype = [&](size_t at, const Operand& operand) {
    const bool narrow = operand.dtype == ffi::DataType::BF16 || operand.dtype == ffi::DataType::F16;
    if (narrow || operand.dtype == ffi::DataType::F32 || operand.dtype == call.dtype) return ffi::Error::Success();
    return Refuse(op, "operand ", at, " has dtype ", Name(operand.dtype), ", expected ", Name(call.dtype),
                  " or narrower");
  };
  const auto fits = [&](const Operand& operand, const Dims& own) {
    Dims whole = batch;
    whole.insert(whole.end(), own.begin(), own.end());
    return operand.dims == whole;
  };
  const size_t of_activations = index, of_cotangents = index + layer.scaled, rank = batch.size();
  index = of_cotangents + 1;
  if (auto error = Argument(op, args, of_cotangents, factors.cotangents); error.failure()) return error;
  if (auto error = dtype(of_cotangents, factors.cotangents); error.failure()) return error;
  const Dims& dims = factors.cotangents.dims;
  if (dims.size() != rank + 5 || !fits(factors.cotangents, Dims(dims.begin() + rank, dims.end())))
    return Refuse(op, "operand ", of_cotangents, " has shape ", Shape(dims), ", expected the batch axes ", Shape(batch),
                  " and then (examples, blocks, rows, positions, out)");
  factors.examples = dims[rank];
  if (layer.blocks == 0) {
    layer.blocks = dims[rank + 1];
    layer.positions = dims[rank + 3];
    layer.out = dims[rank + 4];
    if (call.per_example == 0) call.per_example = dims[rank + 2];
  }
  const Dims own = {factors.examples, layer.blocks, call.per_example, layer.positions, layer.out};
  if (!fits(factors.cotangents, own) || Product({own[1], own[2], own[3]}) == 0)
    return Refuse(op, "operand ", of_cotangents, " has shape ", Shape(dims), ", expected the batch axes ", Shape(batch),
                  " and then ", Shape(own), ", no block, row or position missing");
  if (!layer.scaled) return ffi::Error::Success();
  if (auto error = Argument(op, args, of_activations, factors.activations); error.failure()) return error;
  if (auto error = dtype(of_activations, factors.activations); error.failure()) return error;
  const Dims& shape = factors.activations.dims;
  if (layer.in == 0 && !shape.empty()) layer.in = shape.back();
  const Dims expected = {factors.examples, layer.blocks, layer.positions, layer.in};
  if (!fits(factors.activations, expected))
    return Refuse(op, "operand ", of_activations, " has shape ", Shape(shape), ", expected the batch axes ",
                  Shape(batch), " and then ", Shape(expected));
  return ffi::Error::Success();
}

// `scaled` says of each layer whether it has activations; `start` whether operand 0 is what is added to; `against`
// whether the rows of each layer meet others, which follow; `mirror` whether the upper triangle is asked for.
inline ffi::Error ReadGram(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> scaled,
                           int64_t start, int64_t against, int64_t mirror, GramCall& call) {
  constexpr const char* op = "gram_accumulate";
  const size_t sides = against != 0 ? 2 : 1, layers = scaled.size();
  size_t operands = (start != 0) + sides * layers;
  for (int64_t has : scaled) operands += has != 0 ? sides : 0;
  if (args.size() != operands || rets.size() != 1 || layers == 0)
    return Refuse(op, "got ", args.size(), " operands and ", rets.size(), " results for ", layers, " layers, expected ",
                  operands, ", one and at least one");
  if (auto error = Result(op, rets, 0, call.result); error.failure()) return error;
  call.dtype = call.result.dtype;
  if (auto error = CheckDtype(op, call.dtype); error.failure()) return error;
  if (call.result.dims.size() < 2)
    return Refuse(op, "result 0 has shape ", Shape(call.result.dims), ", expected (..., rows, columns)");
  const Dims batch(call.result.dims.begin(), call.result.dims.end() - 2);
  call.members = Product(batch);
  call.rows = call.result.dims[batch.size()];
  call.columns = call.result.dims[batch.size() + 1];
  call.triangle = against == 0;
  call.mirror = call.triangle && mirror != 0;
  call.start.data = nullptr;
  if (start != 0) {
    if (auto error = Argument(op, args, 0, call.start); error.failure()) return error;
    if (auto error = CheckSame(op, "operand", 0, call.start, call.dtype, call.result.dims); error.failure())
      return error;
  }
  size_t index = start != 0;
  for (int64_t has : scaled) {
    GramLayer layer;
    layer.scaled = has != 0;
    if (auto error = ReadFactors(op, args, index, batch, call, layer, layer.left); error.failure()) return error;
    layer.right = layer.left;
    if (!call.triangle)
      if (auto error = ReadFactors(op, args, index, batch, call, layer, layer.right); error.failure()) return error;
    if (layer.left.examples * call.per_example != call.rows || layer.right.examples * call.per_example != call.columns)
      return Refuse(op, "result 0 has shape ", Shape(call.result.dims), ", expected the batch axes ", Shape(batch),
                    " and then rows by rows, ",
                    Shape({layer.left.examples * call.per_example, layer.right.examples * call.per_example}));
    call.layers.push_back(layer);
  }
  return ffi::Error::Success();
}

}  // namespace curvax
