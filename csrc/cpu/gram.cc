// XLA FFI handler of gram_accumulate: inner products of rows that are not formed, tile by tile on XLA's threads.
//
// Row r of example b is a_b d_br^T, so rows (b, r) and (c, s) meet in (a_b . a_c) (d_br . d_cs). For 2 rows per
// example:
//
//   1. PackedFactors: activations and cotangents, once, in panels (cpu/simd/panel_kernels.h)
//   2. for each tile of the result, layer after layer while the tile is in cache:
//
//      Tile::MakeScales                 Tile::AddProducts, strip by strip           the tile
//
//           c0  c1    repeated:           d_c0,0  d_c0,1  d_c1,0  d_c1,1
//      b0 [ p   q ] -> p p q q   times  [ .       .       .       .      ] d_b0,0   added to what stands there
//      b1 [ r   s ]    p p q q          [ .       .       .       .      ] d_b0,1
//                      r r s s          [ .       .       .       .      ] d_b1,0
//                      r r s s          [ .       .       .       .      ] d_b1,1
//
//   3. Tile::Mirror, where the upper triangle is wanted: a symmetric result is made below the diagonal alone
//
// The products of a strip are made and scaled in registers, and the scales of a tile are all that is stored. The
// contract is in kernels/gram_accumulate/native.py.

#include "cpu/gram.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/gram_operands.h"
#include "common/half.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"

namespace curvax {
namespace {

// Below this many multiply-adds in a call one thread is faster than waking another.
constexpr int64_t kThreadingWork = 1 << 19;
// Tiles have about so many rows: a tile and the factors of its rows then fit the second-level cache. Fewer if there
// were not this many tiles for each thread, to balance them.
constexpr int64_t kTileRows = 256;
constexpr int64_t kLeastTileRows = 64;
constexpr int64_t kTilesPerThread = 6;
// Entries packed at a time: a cache line of each row.
constexpr int64_t kPackedRun = 16;

// Rows [0, valid) of a panel, `depth` entries each, and zeros for the others.
template <typename T, typename S>
void PackPanel(const S* const* rows, int64_t valid, int64_t depth, int64_t panel, T* to) {
  for (int64_t begin = 0; begin < depth; begin += kPackedRun) {
    const int64_t end = std::min(depth, begin + kPackedRun);
    for (int64_t r = 0; r < valid; ++r)
      for (int64_t k = begin; k < end; ++k) {
        if constexpr (std::is_arithmetic_v<S>) {
          to[k * panel + r] = static_cast<T>(rows[r][k]);
        } else {
          float wide;
          Widen(rows[r][k], wide);
          to[k * panel + r] = static_cast<T>(wide);
        }
      }
    for (int64_t k = begin; k < end; ++k) std::fill(to + k * panel + valid, to + (k + 1) * panel, T(0));
  }
}

// The same for any dtype; entry 0 of row r stands at element offset(r) of the operand.
template <typename T, typename Offset>
void PackPanel(const Operand& from, const Offset& offset, int64_t valid, int64_t depth, int64_t panel, T* to) {
  const auto pack = [&](const auto* data) {
    decltype(data) rows[kLargestPanel];
    for (int64_t r = 0; r < valid; ++r) rows[r] = data + offset(r);
    PackPanel(rows, valid, depth, panel, to);
  };
  switch (from.dtype) {
    case ffi::DataType::F64:
      return pack(Data<double>(from));
    case ffi::DataType::BF16:
      return pack(Data<BFloat16>(from));
    case ffi::DataType::F16:
      return pack(Data<Float16>(from));
    default:
      return pack(Data<float>(from));
  }
}

// How a side of the result is cut: tiles of `tile` rows, whole panels, and the examples that the rows of each touch.
struct Cut {
  int64_t rows, per_example, panel, tile;

  int64_t tiles() const { return (rows + tile - 1) / tile; }
  int64_t panels() const { return (rows + panel - 1) / panel; }
  int64_t Begin(int64_t t) const { return t * tile; }
  int64_t End(int64_t t) const { return std::min(rows, (t + 1) * tile); }
  int64_t FirstExample(int64_t t) const { return Begin(t) / per_example; }
  int64_t Examples(int64_t t) const { return (End(t) - 1) / per_example + 1 - FirstExample(t); }
  // Panels of examples that any tile needs: it begins anywhere in an example, so it may touch one more than fit.
  int64_t example_panels() const {
    const int64_t most = std::min((tile - 2 + per_example) / per_example + 1, rows / per_example);
    return (std::max<int64_t>(1, most) + panel - 1) / panel;
  }
};

// One side's factors of one layer, block by block and position by position, in panels.
template <typename T>
class PackedFactors {
 public:
  PackedFactors(const GramLayer& layer, const GramFactors& factors, const Cut& cut)
      : layer_(&layer),
        factors_(&factors),
        cut_(cut),
        of_cotangents_(cut.panels() * cut.panel * layer.out),
        of_activations_(layer.scaled ? cut.tiles() * cut.example_panels() * cut.panel * layer.in : 0),
        scratch_(layer.blocks * layer.positions * (of_cotangents_ + of_activations_)) {}

  int64_t pieces() const { return layer_->blocks * layer_->positions * cut_.tiles(); }

  // Piece k of the packing, for one member of the batch.
  void Pack(int64_t member, int64_t k) {
    const int64_t t = k % cut_.tiles(), place = k / cut_.tiles();
    const int64_t block = place / layer_->positions, position = place % layer_->positions;
    for (int64_t first = cut_.Begin(t); first < cut_.End(t); first += cut_.panel) {
      const auto offset = [&](int64_t r) {
        const int64_t example = (first + r) / cut_.per_example, row = (first + r) % cut_.per_example;
        const int64_t at = (member * factors_->examples + example) * layer_->blocks + block;
        return ((at * cut_.per_example + row) * layer_->positions + position) * layer_->out;
      };
      PackPanel(factors_->cotangents, offset, std::min(cut_.panel, cut_.rows - first), layer_->out, cut_.panel,
                Cotangents(place, first));
    }
    if (!layer_->scaled) return;
    for (int64_t p = 0; p * cut_.panel < cut_.Examples(t); ++p) {
      const int64_t first = p * cut_.panel;
      const auto offset = [&](int64_t r) {
        const int64_t example = cut_.FirstExample(t) + first + r;
        const int64_t at = (member * factors_->examples + example) * layer_->blocks + block;
        return (at * layer_->positions + position) * layer_->in;
      };
      PackPanel(factors_->activations, offset, std::min(cut_.panel, cut_.Examples(t) - first), layer_->in, cut_.panel,
                Activations(place, t, first));
    }
  }

  // Row `row` at place `place`, a block and a position; the rest of its panel follows.
  T* Cotangents(int64_t place, int64_t row) const {
    return scratch_.data() + place * of_cotangents_ + row / cut_.panel * cut_.panel * layer_->out + row % cut_.panel;
  }

  // The same for an example, counted from the first one of tile t.
  T* Activations(int64_t place, int64_t t, int64_t example) const {
    return scratch_.data() + layer_->blocks * layer_->positions * of_cotangents_ + place * of_activations_ +
           (t * cut_.example_panels() + example / cut_.panel) * cut_.panel * layer_->in + example % cut_.panel;
  }

  const GramLayer& layer() const { return *layer_; }
  const Cut& cut() const { return cut_; }

 private:
  const GramLayer* layer_;
  const GramFactors* factors_;
  Cut cut_;
  int64_t of_cotangents_, of_activations_;
  Scratch<T> scratch_;
};

// Tile (i, j) of the result. `from` is what the next layer is added to, `to` the result.
template <typename T>
class Tile {
 public:
  Tile(const Cut& down, const Cut& across, int64_t i, int64_t j, bool triangle, const T* from, T* to)
      : kernels_(Kernels<T>().panels),
        down_(down),
        across_(across),
        i_(i),
        j_(j),
        columns_(across.rows),
        diagonal_(triangle && i == j),
        from_(from),
        to_(to),
        scales_(RoundedUp(down.Examples(i), kernels_.strip) * across.tile) {}

  void Add(const PackedFactors<T>& left, const PackedFactors<T>& right) {
    const GramLayer& layer = left.layer();
    for (int64_t block = 0; block < layer.blocks; ++block)
      for (int64_t t = 0; t < layer.positions; ++t)
        for (int64_t u = 0; u < layer.positions; ++u) {
          const int64_t at = block * layer.positions + t, other = block * layer.positions + u;
          if (layer.scaled) MakeScales(left, right, at, other);
          AddProducts(left, right, at, other);
          from_ = to_;
        }
  }

  // The upper triangle's share.
  void Mirror() const {
    constexpr int64_t side = 16;
    for (int64_t r0 = down_.Begin(i_); r0 < down_.End(i_); r0 += side)
      for (int64_t c0 = across_.Begin(j_); c0 < across_.End(j_); c0 += side)
        for (int64_t c = c0; c < std::min(across_.End(j_), c0 + side); ++c)
          for (int64_t r = std::max(r0, c + 1); r < std::min(down_.End(i_), r0 + side); ++r)
            to_[c * columns_ + r] = to_[r * columns_ + c];
  }

 private:
  static int64_t RoundedUp(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

  // Products of the activations of each example that a row belongs to with those of each column's example.
  void MakeScales(const PackedFactors<T>& left, const PackedFactors<T>& right, int64_t at, int64_t other) {
    T sums[kLargestStrip * kLargestPanel];
    const int64_t panel = kernels_.panel, strip = kernels_.strip, width = across_.tile, in = left.layer().in;
    const bool repeated = across_.per_example > 1;
    for (int64_t first = 0; first < across_.Examples(j_); first += panel)
      for (int64_t example = 0; example < down_.Examples(i_); example += strip) {
        kernels_.product(left.Activations(at, i_, example), right.Activations(other, j_, first), in, sums);
        for (int64_t s = 0; s < strip; ++s) {
          T* row = scales_.data() + (example + s) * width;
          if (repeated)
            Repeat(sums + s * panel, first, row);
          else
            std::copy_n(sums + s * panel, panel, row + first);
        }
      }
  }

  // The scales of a panel of examples, from the `first` of the tile on, to the columns of each.
  void Repeat(const T* scales, int64_t first, T* row) const {
    const int64_t per = across_.per_example, begin = across_.Begin(j_), end = across_.End(j_);
    const int64_t example = across_.FirstExample(j_) + first;
    const int64_t last = std::min(example + kernels_.panel, across_.FirstExample(j_) + across_.Examples(j_));
    for (int64_t e = example; e < last; ++e) {
      const int64_t from = std::max(begin, e * per), to = std::min(end, (e + 1) * per);
      std::fill(row + from - begin, row + to - begin, scales[e - example]);
    }
  }

  void AddProducts(const PackedFactors<T>& left, const PackedFactors<T>& right, int64_t at, int64_t other) const {
    const GramLayer& layer = left.layer();
    const int64_t first_example = down_.FirstExample(i_), per = down_.per_example;
    const T* scales[kLargestStrip];
    for (int64_t column = across_.Begin(j_); column < across_.End(j_); column += kernels_.panel) {
      const int64_t width = std::min(kernels_.panel, across_.rows - column);
      for (int64_t row = down_.Begin(i_); row < down_.End(i_); row += kernels_.strip) {
        if (diagonal_ && row + kernels_.strip <= column) continue;
        const int64_t rows = std::min(kernels_.strip, down_.rows - row), place = row * columns_ + column;
        for (int64_t r = 0; r < rows && layer.scaled; ++r)
          scales[r] = scales_.data() + ((row + r) / per - first_example) * across_.tile + column - across_.Begin(j_);
        kernels_.accumulate(left.Cotangents(at, row), right.Cotangents(other, column), layer.out,
                            layer.scaled ? scales : nullptr, from_ == nullptr ? nullptr : from_ + place, to_ + place,
                            columns_, rows, width);
      }
    }
  }

  const PanelKernels<T>& kernels_;
  const Cut &down_, &across_;
  const int64_t i_, j_, columns_;
  const bool diagonal_;
  const T* from_;
  T* const to_;
  Scratch<T> scales_;
};

template <typename T>
void Run(ffi::ThreadPool& pool, int64_t threads, const GramCall& call) {
  if (call.rows == 0 || call.columns == 0) return;
  const int64_t pairs = call.triangle ? call.rows * call.columns / 2 : call.rows * call.columns;
  int64_t work = 0;
  for (const GramLayer& layer : call.layers)
    work += pairs * layer.blocks * layer.positions * layer.positions *
            (layer.out + layer.in / (call.per_example * call.per_example));
  if (threads <= 0) threads = work < kThreadingWork ? 1 : std::max<int64_t>(1, pool.num_threads());
  const int64_t panel = Kernels<T>().panels.panel;
  int64_t tile = kTileRows / panel * panel;
  while (tile / 2 >= kLeastTileRows && pairs < kTilesPerThread * threads * tile * tile) tile = tile / 2 / panel * panel;
  const Cut down = {call.rows, call.per_example, panel, tile}, across = {call.columns, call.per_example, panel, tile};

  std::vector<PackedFactors<T>> left, right;
  struct Piece {
    PackedFactors<T>* factors;
    int64_t number;
  };
  left.reserve(call.layers.size());
  right.reserve(call.layers.size());
  std::vector<Piece> packing;
  const auto pack = [&](PackedFactors<T>& factors) {
    for (int64_t k = 0; k < factors.pieces(); ++k) packing.push_back({&factors, k});
  };
  for (const GramLayer& layer : call.layers) {
    pack(left.emplace_back(layer, layer.left, down));
    if (!call.triangle) pack(right.emplace_back(layer, layer.right, across));
  }
  const std::vector<PackedFactors<T>>& others = call.triangle ? left : right;
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t i = down.tiles() - 1; i >= 0; --i)
    for (int64_t j = 0; j < (call.triangle ? i + 1 : across.tiles()); ++j) tiles.emplace_back(i, j);

  for (int64_t member = 0; member < call.members; ++member) {
    // 1. Packing.
    ParallelFor(pool, threads, static_cast<int64_t>(packing.size()),
                [&](int64_t k) { packing[k].factors->Pack(member, packing[k].number); });
    const int64_t begin = member * call.rows * call.columns;
    T* to = Data<T>(call.result) + begin;
    const T* from = call.start.data == nullptr ? nullptr : Data<T>(call.start) + begin;
    // 2. and 3. Tiles.
    ParallelFor(pool, threads, static_cast<int64_t>(tiles.size()), [&](int64_t k) {
      Tile<T> one(down, across, tiles[k].first, tiles[k].second, call.triangle, from, to);
      for (size_t l = 0; l < left.size(); ++l) one.Add(left[l], others[l]);
      if (call.mirror) one.Mirror();
    });
  }
}

ffi::Error GramAccumulate(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Span<const int64_t> scaled, int64_t start, int64_t against, int64_t mirror,
                          int64_t threads) {
  GramCall call;
  if (auto error = ReadGram(args, rets, scaled, start, against, mirror, call); error.failure()) return error;
  if (call.dtype == ffi::DataType::F32)
    Run<float>(pool, threads, call);
  else
    Run<double>(pool, threads, call);
  return ffi::Error::Success();
}

}  // namespace

// `threads`: 0 lets the handler decide; a positive number counts as it is.
XLA_FFI_DEFINE_HANDLER_SYMBOL(GramAccumulateHandler, GramAccumulate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("scaled")
                                  .Attr<int64_t>("start")
                                  .Attr<int64_t>("against")
                                  .Attr<int64_t>("mirror")
                                  .Attr<int64_t>("threads"));

}  // namespace curvax
