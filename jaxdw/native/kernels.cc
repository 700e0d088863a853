// The kernels, compiled once for each instruction set: JAXDW_ISA says for which.
//
// Lanes of a vector are output channels (or, of a row with stride 1, neighbouring outputs), never terms of one sum. So
// all instruction sets round alike. docs/arithmetic.md has the sequence of roundings.
#include <math.h>

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "support.h"

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

template <class T>
void copy(const T* from, int64_t count, T* to) {
  memcpy(to, from, count * sizeof(T));
}

// One product of a sum: where its first input is, and its first weight (or, for the gradient, its first sum). In a
// masked segment bit r of `outputs` says that output r reads an input under the tap.
template <class T, class Sum>
struct Tap {
  const T* x;
  Sum* w;
  unsigned outputs;
};

// Outputs along the last axis: `count` of them, `step` apart, from `first` on. Their inputs are `x_step` apart. In a
// masked segment, at most `most_outputs` long, some of them read padding under some taps; in the others none does.
struct Segment {
  int64_t first, count, step, x_step;
  int64_t columns, columns_end;
  bool is_masked;
};

// A tap along the last axis, and the input that the first output of a segment reads under it, or would read there.
struct Column {
  int64_t tap, x;
  unsigned outputs;
};

struct Width {
  std::vector<Segment> segments;
  std::vector<Column> columns;
};

constexpr int64_t most_outputs = 8, at_border = 4;

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }

// The input under an output and a tap along an axis, or -1 where that is padding or a zero of the dilation.
int64_t input_at(const Geometry& g, int axis, int64_t output, int64_t tap) {
  int64_t position = output * g.strides[axis] + tap * g.kernel_dilation[axis] - g.padding[axis];
  if (position < 0 || position % g.input_dilation[axis]) return -1;
  int64_t input = position / g.input_dilation[axis];
  return input < g.in[axis] ? input : -1;
}

// Outputs that are a number of `phases` apart read inputs that are `x_step` apart. Where some of a phase read padding,
// the first ones and the last ones are in masked segments.
Width segments_of(const Geometry& g) {
  struct Reach {
    int64_t tap, x, first, end;  // the input of the phase's first output, and the outputs that read inputs
  };
  Width width;
  int64_t dilation = g.input_dilation[2], phases = dilation / std::gcd(dilation, g.strides[2]);
  int64_t x_step = g.strides[2] * phases / dilation;
  for (int64_t phase = 0; phase < std::min(phases, g.out[2]); ++phase) {
    int64_t count = ceil_div(g.out[2] - phase, phases), first = 0, end = count;
    std::vector<Reach> reaches;
    for (int64_t tap = 0; tap < g.kernel[2]; ++tap) {
      int64_t position = phase * g.strides[2] + tap * g.kernel_dilation[2] - g.padding[2];
      if (position % dilation) continue;
      int64_t x = position / dilation;
      Reach reach = {tap, x, std::max<int64_t>(0, ceil_div(-x, x_step)), std::min(count, ceil_div(g.in[2] - x, x_step))};
      if (reach.first >= reach.end) continue;
      reaches.push_back(reach);
      first = std::max(first, reach.first);
      end = std::min(end, reach.end);
    }
    auto add = [&](int64_t from, int64_t size) {
      Segment segment = {phase + from * phases, size, phases, x_step, int64_t(width.columns.size()), 0, false};
      unsigned all = (1u << std::min(size, most_outputs)) - 1;
      for (const Reach& reach : reaches) {
        unsigned outputs = all;
        if (size <= most_outputs)
          for (int64_t r = 0; r < size; ++r)
            if (from + r < reach.first || from + r >= reach.end) outputs &= ~(1u << r);
        if (!outputs) continue;
        segment.is_masked |= outputs != all;
        width.columns.push_back({reach.tap, reach.x + from * x_step, outputs});
      }
      segment.columns_end = int64_t(width.columns.size());
      width.segments.push_back(segment);
    };
    int64_t left = ceil_div(first, at_border) * at_border, right = count - ceil_div(count - end, at_border) * at_border;
    if ((first > 0 || end < count) && (left >= right || count <= 2 * most_outputs)) left = right = count;
    for (int64_t from = 0; from < left;) {
      int64_t size = ceil_div(left - from, ceil_div(left - from, most_outputs));
      add(from, size);
      from += size;
    }
    if (left < right) add(left, right - left);
    for (int64_t from = right; from < count; from += at_border) add(from, at_border);
  }
  return width;
}

// Appends the taps of one output row that read no padding, in raster order.
template <class T, class Sum>
void taps_of_row(const Geometry& g, const Width& width, const Segment& segment, const T* image, Sum* weights,
                 int64_t weight_step, int64_t depth, int64_t row, std::vector<Tap<T, Sum>>& taps) {
  taps.clear();
  for (int64_t i = 0; i < g.kernel[0]; ++i) {
    int64_t z = input_at(g, 0, depth, i);
    if (z < 0) continue;
    for (int64_t j = 0; j < g.kernel[1]; ++j) {
      int64_t y = input_at(g, 1, row, j);
      if (y < 0) continue;
      const T* x = image + (z * g.in[1] + y) * g.in[2] * g.channels;
      Sum* w = weights + (i * g.kernel[1] + j) * g.kernel[2] * weight_step;
      for (int64_t c = segment.columns; c < segment.columns_end; ++c) {
        const Column& column = width.columns[c];
        taps.push_back({x + column.x * g.channels, w + column.tap * weight_step, column.outputs});
      }
    }
  }
}

// R outputs of CV vectors of channels: all their sums are in registers. Of a masked segment there may be fewer outputs.
template <class V, int R, int CV, bool part, bool masked, class T, class Sum, class To>
JAXDW_INLINE void tile(const Tap<T, const Sum>* taps, int64_t count, int64_t outputs, int64_t x, int64_t x_step,
                       int64_t c, int lanes, const Sum* bias, Bias place, To* y, int64_t y_step) {
  auto load = [lanes](auto* p) { return part ? load_first<V>(p, lanes) : V::load(p); };
  V sums[R][CV];
#pragma GCC unroll 16
  for (int v = 0; v < CV; ++v) {
    V start = place == Bias::first ? load(bias + c + v * V::lanes) : V::zero();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r][v] = start;
  }
  for (int64_t t = 0; t < count; ++t) {
    const T* from = taps[t].x + x + c;
    const Sum* w = taps[t].w + c;
    V weights[CV];
#pragma GCC unroll 16
    for (int v = 0; v < CV; ++v) weights[v] = load(w + v * V::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (masked && !(taps[t].outputs >> r & 1)) continue;
#pragma GCC unroll 16
      for (int v = 0; v < CV; ++v)
        sums[r][v] = fma(load(from + r * x_step + v * V::lanes), weights[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < CV; ++v) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (masked && r >= outputs) break;
      V sum = sums[r][v];
      if (place == Bias::last) sum = add(sum, load(bias + c + v * V::lanes));
      To* to = y + r * y_step + c + v * V::lanes;
      if (part)
        store_first(sum, to, lanes);
      else
        sum.store(to);
    }
  }
}

// What is done to sums before they are rounded and stored. The residual of an output is as far from `residual` as the
// output from `y`.
template <class T, class Sum>
struct Epilogue {
  const Sum *scale, *shift;
  const T *y, *residual;
  Activation activation;
};

// Does it to the sums of some outputs, for channels from `c` on.
template <class V, bool is_hard_swish, class T, class Sum>
JAXDW_INLINE void finish_as(const Epilogue<T, Sum>& epilogue, const Sum* sums, int64_t sums_step, int64_t outputs,
                            int64_t c, int64_t channels, T* y, int64_t y_step) {
  Activation activation = epilogue.activation;
  V six = V::splat(6), three = V::splat(3), zero = V::zero();
  V least = activation == Activation::none ? V::splat(-INFINITY) : zero;
  V most = activation == Activation::relu6 ? six : V::splat(INFINITY);
  for (int64_t v = 0; v < channels; v += V::lanes) {
    int lanes = int(std::min<int64_t>(V::lanes, channels - v));
    auto load = [lanes](auto* p) { return lanes < V::lanes ? load_first<V>(p, lanes) : V::load(p); };
    V scale = zero, shift = zero;
    if (epilogue.scale) scale = load(epilogue.scale + c + v), shift = load(epilogue.shift + c + v);
    for (int64_t r = 0; r < outputs; ++r) {
      T* to = y + r * y_step + c + v;
      V sum = V::load(sums + r * sums_step + v);
      if (epilogue.scale) sum = fma(sum, scale, shift);
      if (epilogue.residual) sum = add(sum, load(epilogue.residual + (to - epilogue.y)));
      if (is_hard_swish)
        sum = divide(multiply(sum, at_most(six, at_least(zero, add(sum, three)))), six);
      else
        sum = at_most(most, at_least(least, sum));
      if (lanes < V::lanes)
        store_first(sum, to, lanes);
      else
        sum.store(to);
    }
  }
}

template <class V, class T, class Sum>
__attribute__((noinline)) void finish(const Epilogue<T, Sum>& epilogue, const Sum* sums, int64_t sums_step,
                                      int64_t outputs, int64_t c, int64_t channels, T* y, int64_t y_step) {
  if (epilogue.activation == Activation::hard_swish)
    finish_as<V, true>(epilogue, sums, sums_step, outputs, c, channels, y, y_step);
  else
    finish_as<V, false>(epilogue, sums, sums_step, outputs, c, channels, y, y_step);
}

// Calls `of` with a compile-time size and returns that: `size`, or the next power of two below for types other than
// float, which are not worth the time to compile more.
template <int most, class T, class Of>
JAXDW_INLINE int64_t with_size(int64_t size, Of of) {
  if constexpr (most > 1) {
    constexpr bool is_compiled = std::is_same_v<T, float> || (most & (most - 1)) == 0;
    if (!is_compiled || size < most) return with_size<most - 1, T>(size, of);
  }
  of(std::integral_constant<int, most>());
  return most;
}

// Vectors of channels that are summed at once beside R outputs.
template <int R>
constexpr int vectors_beside = std::max(1, std::min(8, registers / R));

// The vectors whose sums are in registers beside `Streamed` ones are the same.
template <class V>
struct Plain {
  using type = V;
};

// R outputs, channels `from` to `to`, with an epilogue: the sums of a tile go through memory in the first cache.
template <class V, int R, bool masked, class T, class Sum>
void finished_outputs_of(const Tap<T, const Sum>* taps, int64_t count, int64_t outputs, int64_t x, int64_t x_step,
                         int64_t from, int64_t to, const Sum* bias, Bias place, const Epilogue<T, Sum>& epilogue, T* y,
                         int64_t y_step) {
  using P = typename Plain<V>::type;
  constexpr int CV = vectors_beside<R>;
  constexpr int64_t step = CV * V::lanes;
  alignas(64) Sum sums[R * step];
  int64_t stored = masked ? outputs : R;
  auto as = [&](auto vectors, auto part, int64_t c, int64_t channels) {
    tile<P, R, decltype(vectors)::value, decltype(part)::value, masked>(taps, count, outputs, x, x_step, c,
                                                                        int(channels), bias, place, sums - c, step);
    finish<V>(epilogue, sums, step, stored, c, channels, y, y_step);
  };
  int64_t c = from;
  if constexpr (CV > 1)
    for (; c + step <= to; c += step) as(std::integral_constant<int, CV>(), std::false_type(), c, step);
  for (; c + V::lanes <= to; c += V::lanes) as(std::integral_constant<int, 1>(), std::false_type(), c, V::lanes);
  if (c < to) as(std::integral_constant<int, 1>(), std::true_type(), c, to - c);
}

// R outputs, channels `from` to `to`.
template <class V, int R, bool masked, class T, class Sum>
void outputs_of(const Tap<T, const Sum>* taps, int64_t count, int64_t outputs, int64_t x, int64_t x_step, int64_t from,
                int64_t to, const Sum* bias, Bias place, const Epilogue<T, Sum>* epilogue, T* y, int64_t y_step) {
  constexpr int CV = vectors_beside<R>;
  int64_t c = from;
  if (epilogue) {
    finished_outputs_of<V, R, masked>(taps, count, outputs, x, x_step, from, to, bias, place, *epilogue, y, y_step);
    return;
  }
  if constexpr (CV > 1)
    for (; c + CV * V::lanes <= to; c += CV * V::lanes)
      tile<V, R, CV, false, masked>(taps, count, outputs, x, x_step, c, 0, bias, place, y, y_step);
  for (; c + V::lanes <= to; c += V::lanes)
    tile<V, R, 1, false, masked>(taps, count, outputs, x, x_step, c, 0, bias, place, y, y_step);
  if (c < to)
    tile<V, R, 1, true, masked>(taps, count, outputs, x, x_step, c, int(to - c), bias, place, y, y_step);
}

// A vector that is stored past the caches. The address is a multiple of its size.
template <class V>
struct Streamed : V {
  Streamed() = default;
  JAXDW_INLINE Streamed(V vector) : V(vector) {}
  JAXDW_INLINE Streamed(decltype(V::v) v) : V{v} {}
  template <class T>
  JAXDW_INLINE void store(T* p) const {
#if JAXDW_IS == JAXDW_IS_avx512
    _mm512_stream_ps(p, this->v);
#elif JAXDW_IS == JAXDW_IS_avx2
    _mm256_stream_ps(p, this->v);
#else
    V::store(p);
#endif
  }
};

template <class V>
struct Plain<Streamed<V>> {
  using type = V;
};

constexpr bool can_stream = JAXDW_IS == JAXDW_IS_avx512 || JAXDW_IS == JAXDW_IS_avx2;

// Bytes of weights that stay in the first cache while the outputs of a row go by.
constexpr int64_t cached_weights = 16384;

// Bytes of inputs that stay there from one row of outputs to the next.
constexpr int64_t cached_inputs = 24576;

template <class T>
JAXDW_INLINE void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// A stretch of outputs in one row: its taps, and where the outputs go.
template <class T, class Sum>
struct Row {
  std::vector<Tap<T, const Sum>> taps;
  T* y;
};

// What the next row of outputs reads and this one does not: `rows` of x that end `x` after what the last tap reads. And
// the distance to its outputs, or 0 where they are too few to be worth it, or are stored past the caches.
struct Ahead {
  int64_t rows, x, x_row, y;
  bool streams;
};

// The same outputs in several rows. A few columns of all rows are computed before the next columns, so that the inputs
// which rows share, and the weights, are still in the first cache.
template <class V, class T, class Sum>
void outputs_in_rows(const Row<T, Sum>* rows, int64_t row_count, bool is_masked, int64_t outputs, int64_t x_step,
                     int64_t channels, const Sum* bias, Bias place, const Epilogue<T, Sum>* epilogue, int64_t y_step,
                     Ahead ahead) {
  int64_t most_taps = 1, unit = 8 * V::lanes;
  for (const Row<T, Sum>* row = rows; row < rows + row_count; ++row)
    most_taps = std::max(most_taps, int64_t(row->taps.size()));
  int64_t chunk = cached_weights / int64_t(sizeof(Sum)) / most_taps;
  int64_t inputs = ceil_div(most_outputs * most_taps, 3);  // about so many for 3x3
  if (row_count > 1) chunk = std::min(chunk, cached_inputs / int64_t(sizeof(T)) / inputs);
  chunk = std::max(chunk / unit * unit, unit);
  for (int64_t from = 0; from < channels; from += chunk) {
    int64_t to = std::min(channels, from + chunk);
    for (int64_t first = 0; first < outputs;) {
      int64_t blocks = (outputs - first + most_outputs - 1) / most_outputs;
      int64_t size = is_masked ? outputs : (outputs - first + blocks - 1) / blocks, done = size;
      for (const Row<T, Sum>* row = rows; row < rows + row_count; ++row) {
        const Tap<T, const Sum>* taps = row->taps.data();
        int64_t count = int64_t(row->taps.size());
        T* y = row->y + first * y_step;
        if (is_masked) {
          auto of = outputs <= 4 ? outputs_of<V, 4, true, T, Sum> : outputs_of<V, most_outputs, true, T, Sum>;
          of(taps, count, outputs, 0, x_step, from, to, bias, place, epilogue, y, y_step);
          continue;
        }
        if (from == 0 && count) {
          for (int64_t i = 0; i < ahead.rows; ++i)
            fetch(taps[count - 1].x + first * x_step + ahead.x - i * ahead.x_row, size * x_step);
          if (ahead.y) fetch(y + ahead.y, size * y_step);
        }
        done = with_size<most_outputs, T>(size, [&](auto constant) {
          constexpr int R = decltype(constant)::value;
          auto of = outputs_of<V, R, false, T, Sum>;
          if constexpr (can_stream && std::is_same_v<T, float>)
            if (ahead.streams) of = outputs_of<Streamed<V>, R, false, T, Sum>;
          of(taps, count, 0, first * x_step, x_step, from, to, bias, place, epilogue, y, y_step);
        });
      }
      first += done;
    }
  }
}

template <class V, class T, class Sum>
Array<Sum> widened(const void* values, int64_t count, int64_t channels, int64_t copies) {
  Array<Sum> wide(count * channels * copies);
  const T* from = static_cast<const T*>(values);
  for (int64_t i = 0; i < count; ++i) {
    Sum* to = wide.data() + i * channels * copies;
    for (int64_t c = 0; c < channels; c += V::lanes) {
      int lanes = int(std::min<int64_t>(V::lanes, channels - c));
      V all = lanes == V::lanes ? V::load(from + i * channels + c) : load_first<V>(from + i * channels + c, lanes);
      store_first(all, to + c, lanes);
    }
    for (int64_t repeat = 1; repeat < copies; ++repeat) copy(to, channels, to + repeat * channels);
  }
  return wide;
}

// Bytes of x and y up to which several rows are computed together. Where there are more, each row by itself is faster,
// as it lies in memory, with the next row fetched ahead.
constexpr int64_t most_cached = 16 << 20;

// Bytes of y from which the C library takes memory from the system each time. Its pages have just been zeroed, so they
// are in the cache, and stores past it are slower.
constexpr int64_t least_fresh = 32 << 20;

// A convolution as rows of outputs that are computed independently, some of them cut into parts.
template <class V, class T, class Sum>
class ConvRows : public Parts {
 public:
  ConvRows(const Conv& conv, int64_t threads) : conv_(conv), width_(segments_of(conv.geometry)) {
    const Geometry& g = conv.geometry;
    taps_ = g.kernel[0] * g.kernel[1] * g.kernel[2];
    if constexpr (std::is_same_v<T, Sum>) {
      kernel_ = static_cast<const Sum*>(conv.kernel);
      bias_ = static_cast<const Sum*>(conv.bias);
    } else {
      wide_kernel_ = widened<V, T, Sum>(conv.kernel, taps_, g.channels, 1);
      kernel_ = wide_kernel_.data();
      if (conv.bias) wide_bias_ = widened<V, T, Sum>(conv.bias, 1, g.channels, 1);
      bias_ = conv.bias ? wide_bias_.data() : nullptr;
    }
    int64_t rounded = (g.channels + V::lanes - 1) / V::lanes * V::lanes;
    if ((rounded - g.channels) * 10 > g.channels) {
      int64_t group = V::lanes / std::gcd<int64_t>(V::lanes, g.channels);
      auto fits = [&](const Segment& s) { return !s.is_masked && s.step == 1 && s.x_step == 1 && s.count >= group; };
      if (std::any_of(width_.segments.begin(), width_.segments.end(), fits)) {
        group_ = group;
        group_kernel_ = widened<V, Sum, Sum>(kernel_, taps_, g.channels, group);
        if (bias_) group_bias_ = widened<V, Sum, Sum>(bias_, 1, g.channels, group);
      }
    }
    if (conv.scale || conv.residual || conv.activation != Activation::none) {
      const Sum *scale = static_cast<const Sum*>(conv.scale), *shift = static_cast<const Sum*>(conv.shift);
      epilogue_ = {scale, shift, static_cast<const T*>(conv.y), static_cast<const T*>(conv.residual), conv.activation};
      group_epilogue_ = epilogue_;
      if (scale && group_ > 1) {
        group_scale_ = widened<V, Sum, Sum>(scale, 1, g.channels, group_);
        group_shift_ = widened<V, Sum, Sum>(shift, 1, g.channels, group_);
        group_epilogue_.scale = group_scale_.data();
        group_epilogue_.shift = group_shift_.data();
      }
      has_epilogue_ = true;
    }
    rows_ = g.images * g.out[0] * g.out[1];
    int64_t work = rows_ * g.out[2] * g.channels * taps_;
    int64_t wanted = threads == 1 ? 1 : std::min<int64_t>(std::max<int64_t>(work / 65536, 1), 8 * threads);
    pieces_ = rows_ >= wanted ? 1 : std::min((wanted + rows_ - 1) / rows_, (g.out[2] + 31) / 32);
    rows_at_once_ = (rows_ + wanted - 1) / wanted;
    int64_t in = g.images * g.in[0] * g.in[1] * g.in[2] * g.channels, out = rows_ * g.out[2] * g.channels;
    is_large_ = (in + out) * int64_t(sizeof(T)) > most_cached;
    streams_ = is_large_ && can_stream && std::is_same_v<T, float> && g.channels % V::lanes == 0 &&
               reinterpret_cast<uintptr_t>(conv.y) % 64 == 0 && out * int64_t(sizeof(T)) < least_fresh;
    rows_together_ = is_large_ || taps_ > 32 ? 1 : 8;
    parts_ = (rows_ + rows_at_once_ - 1) / rows_at_once_ * pieces_;
  }

  int64_t parts() const { return parts_; }

  void run(int64_t part) override {
    Rounding rounding;
    const Geometry& g = conv_.geometry;
    int64_t piece = part % pieces_, first = part / pieces_ * rows_at_once_;
    int64_t left = g.out[2] * piece / pieces_, right = g.out[2] * (piece + 1) / pieces_;
    int64_t end = std::min(rows_, first + rows_at_once_), at_once = std::min(end - first, rows_together_);
    std::vector<Row<T, Sum>> rows(at_once);
    for (Row<T, Sum>& row : rows) row.taps.reserve(taps_);
    for (; first < end; first += at_once)
      for (const Segment& segment : width_.segments)
        segment_of_rows(segment, first, std::min(at_once, end - first), left, right, rows);
#if defined(__x86_64__)
    if (streams_) _mm_sfence();  // before another thread is told that this part is done
#endif
  }

 private:
  void segment_of_rows(const Segment& segment, int64_t first, int64_t row_count, int64_t left, int64_t right,
                       std::vector<Row<T, Sum>>& rows) {
    const Geometry& g = conv_.geometry;
    int64_t c = g.channels;
    int64_t begin = std::max<int64_t>(0, ceil_div(left - segment.first, segment.step));
    int64_t end = std::min(segment.count, ceil_div(right - segment.first, segment.step));
    if (right <= segment.first || begin >= end) return;
    if (segment.is_masked) {
      if (begin) return;  // it is in the part with its first output
      end = segment.count;
    }
    int64_t outputs = end - begin, wide = group_ * c;
    bool in_groups = group_ > 1 && !segment.is_masked && segment.step == 1 && segment.x_step == 1 && outputs >= group_;
    const Sum* kernel = in_groups ? std::as_const(group_kernel_).data() : kernel_;
    int64_t weight_step = in_groups ? wide : c;
    if (conv_.flipped) kernel += (taps_ - 1) * weight_step;
    for (int64_t i = 0; i < row_count; ++i) {
      int64_t number = first + i;
      int64_t row = number % g.out[1], depth = number / g.out[1] % g.out[0], image = number / g.out[1] / g.out[0];
      const T* x = static_cast<const T*>(conv_.x) + image * g.in[0] * g.in[1] * g.in[2] * c;
      rows[i].y = static_cast<T*>(conv_.y) + (number * g.out[2] + segment.first + begin * segment.step) * c;
      taps_of_row(g, width_, segment, x + begin * segment.x_step * c, kernel,
                  conv_.flipped ? -weight_step : weight_step, depth, row, rows[i].taps);
    }
    if (in_groups) {
      int64_t groups = outputs / group_, rest = outputs % group_ * c;
      const Sum* bias = group_bias_.data();
      const Epilogue<T, Sum>* epilogue = has_epilogue_ ? &group_epilogue_ : nullptr;
      outputs_in_rows<V>(rows.data(), row_count, false, groups, wide, wide, bias, conv_.bias_place, epilogue, wide, {});
      for (int64_t i = 0; i < row_count; ++i) {
        for (auto& tap : rows[i].taps) tap.x += groups * wide;
        rows[i].y += groups * wide;
      }
      if (rest)
        outputs_in_rows<V>(rows.data(), row_count, false, 1, wide, rest, bias, conv_.bias_place, epilogue, wide, {});
      return;
    }
    Ahead ahead = {};
    if (is_large_) {
      int64_t stride = g.strides[1], y_row = g.out[2] * c;
      ahead = {std::min(stride, g.kernel[1]), stride * g.in[2] * c, g.in[2] * c, stride == 1 && !streams_ ? y_row : 0, streams_};
    }
    outputs_in_rows<V>(rows.data(), row_count, segment.is_masked, outputs, segment.x_step * c, c, bias_,
                       conv_.bias_place, has_epilogue_ ? &epilogue_ : nullptr, segment.step * c, ahead);
  }

  const Conv& conv_;
  Width width_;
  int64_t taps_, rows_, rows_at_once_, rows_together_, pieces_, parts_, group_ = 1;
  bool is_large_, streams_, has_epilogue_ = false;
  const Sum *kernel_, *bias_;
  Epilogue<T, Sum> epilogue_, group_epilogue_;
  Array<Sum> wide_kernel_, wide_bias_, group_kernel_, group_bias_, group_scale_, group_shift_;
};

template <class V, class T, class Sum>
void conv_of(const Conv& conv, Threads& threads) {
  ConvRows<V, T, Sum> rows(conv, threads.count());
  threads.run(rows.parts(), rows);
}

void conv(const Conv& conv, Threads& threads) {
  Rounding rounding;
  switch (conv.type) {
    case Type::f32: return conv_of<Floats, float, float>(conv, threads);
    case Type::f64: return conv_of<Doubles, double, double>(conv, threads);
    case Type::bf16: return conv_of<Floats, bf16, float>(conv, threads);
    case Type::f16: return conv_of<Floats, f16, float>(conv, threads);
  }
}

// Output rows whose products are added in one chain.
constexpr int64_t rows_in_chain = 16;

// Adds the products of `outputs` outputs to the sums of N taps, in the order of the outputs.
template <class V, int N, bool part, class T, class Sum>
JAXDW_INLINE void chains(const Tap<T, Sum>* taps, int64_t c, int lanes, int64_t outputs, int64_t x_step, const T* dy,
                         int64_t dy_step) {
  auto load = [lanes](auto* p) { return part ? load_first<V>(p, lanes) : V::load(p); };
  V sums[N];
  const T* x[N];
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) sums[t] = load(taps[t].w + c), x[t] = taps[t].x + c;
  dy += c;
  for (int64_t o = 0; o < outputs; ++o) {
    V d = load(dy + o * dy_step);
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) sums[t] = fma(load(x[t] + o * x_step), d, sums[t]);
  }
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) {
    if (part)
      store_first(sums[t], taps[t].w + c, lanes);
    else
      sums[t].store(taps[t].w + c);
  }
}

template <class V, int N, class T, class Sum>
void chains_of(const Tap<T, Sum>* taps, int64_t channels, int64_t outputs, int64_t x_step, const T* dy,
               int64_t dy_step) {
  int64_t c = 0;
  for (; c + V::lanes <= channels; c += V::lanes) chains<V, N, false>(taps, c, 0, outputs, x_step, dy, dy_step);
  if (c < channels) chains<V, N, true>(taps, c, int(channels - c), outputs, x_step, dy, dy_step);
}

// The same for the few outputs of a masked segment, tap by tap.
template <class V, bool part, class T, class Sum>
JAXDW_INLINE void masked_chains(const std::vector<Tap<T, Sum>>& taps, int64_t c, int lanes, int64_t outputs,
                                int64_t x_step, const T* dy, int64_t dy_step) {
  auto load = [lanes](auto* p) { return part ? load_first<V>(p, lanes) : V::load(p); };
  V d[most_outputs];
#pragma GCC unroll 16
  for (int r = 0; r < most_outputs; ++r) d[r] = r < outputs ? load(dy + r * dy_step + c) : V::zero();
  for (const Tap<T, Sum>& tap : taps) {
    V sum = load(tap.w + c);
#pragma GCC unroll 16
    for (int r = 0; r < most_outputs; ++r)
      if (tap.outputs >> r & 1) sum = fma(load(tap.x + r * x_step + c), d[r], sum);
    if (part)
      store_first(sum, tap.w + c, lanes);
    else
      sum.store(tap.w + c);
  }
}

template <class V, class T, class Sum>
void masked_chains_in_row(const std::vector<Tap<T, Sum>>& taps, int64_t channels, int64_t outputs, int64_t x_step,
                          const T* dy, int64_t dy_step) {
  int64_t c = 0;
  for (; c + V::lanes <= channels; c += V::lanes) masked_chains<V, false>(taps, c, 0, outputs, x_step, dy, dy_step);
  if (c < channels) masked_chains<V, true>(taps, c, int(channels - c), outputs, x_step, dy, dy_step);
}

constexpr int most_chains = registers == 12 ? 10 : 14;

template <class V, class T, class Sum>
void chains_in_row(const std::vector<Tap<T, Sum>>& taps, int64_t channels, int64_t outputs, int64_t x_step,
                   const T* dy, int64_t dy_step) {
  for (int64_t first = 0, count = int64_t(taps.size()); first < count;) {
    int64_t passes = (count - first + most_chains - 1) / most_chains;
    int64_t size = (count - first + passes - 1) / passes;
    size = with_size<most_chains, T>(size, [&](auto constant) {
      chains_of<V, decltype(constant)::value, T, Sum>(taps.data() + first, channels, outputs, x_step, dy, dy_step);
    });
    first += size;
  }
}

// Adds arrays pairwise: the sum of the first and the second, of the third and the fourth, and so on, and again of these
// sums; what has no partner goes on as it is. Arrays come one after the other; few are kept.
template <class V, class Sum>
class Pairwise {
 public:
  explicit Pairwise(int64_t size) : size_(size) {}

  // The array to fill next.
  Sum* next() {
    if (depth_ == arrays_.size()) arrays_.emplace_back(size_);
    return arrays_[depth_].data();
  }

  // The array that `next` returned is filled.
  void push() {
    ++depth_;
    for (int64_t count = ++count_; count % 2 == 0; count /= 2) add_last();
  }

  // The sum of all, at least one.
  const Sum* total() {
    while (depth_ > 1) add_last();
    return arrays_[0].data();
  }

  void clear() { depth_ = count_ = 0; }

 private:
  void add_last() {
    Sum* to = arrays_[depth_ - 2].data();
    const Sum* from = arrays_[depth_ - 1].data();
    int64_t i = 0;
    for (; i + V::lanes <= size_; i += V::lanes) add(V::load(to + i), V::load(from + i)).store(to + i);
    for (; i < size_; ++i) to[i] += from[i];
    --depth_;
  }

  int64_t size_;
  size_t depth_ = 0;
  int64_t count_ = 0;
  std::vector<Array<Sum>> arrays_;
};

// The gradient by the kernel as parts: a power of two of images each, from a multiple of it on, and some channels.
template <class V, class T, class Sum>
class KernelGradientParts : public Parts {
 public:
  KernelGradientParts(const KernelGradient& of, int64_t threads) : of_(of), width_(segments_of(of.geometry)) {
    const Geometry& g = of.geometry;
    taps_ = g.kernel[0] * g.kernel[1] * g.kernel[2];
    int64_t work = g.images * g.out[0] * g.out[1] * g.out[2] * g.channels * taps_;
    int64_t wanted = threads == 1 ? 1 : std::min<int64_t>(std::max<int64_t>(work / 65536, 1), 4 * threads);
    int64_t unit = 64 / int64_t(sizeof(T));
    int64_t chunks = 1;
    images_at_once_ = 1;
    while (images_at_once_ < g.images && (g.images + images_at_once_ - 1) / images_at_once_ > wanted)
      images_at_once_ *= 2;
    groups_ = (g.images + images_at_once_ - 1) / images_at_once_;
    if (groups_ < wanted) chunks = std::min((wanted + groups_ - 1) / groups_, (g.channels + unit - 1) / unit);
    // so that the sums of all taps stay in the first cache
    chunks = std::max(chunks, std::min((g.channels + unit - 1) / unit, taps_ * g.channels * int64_t(sizeof(Sum)) / 24576));
    channels_at_once_ = ((g.channels + chunks - 1) / chunks + unit - 1) / unit * unit;
    chunks_ = (g.channels + channels_at_once_ - 1) / channels_at_once_;
    sums_ = Array<Sum>(groups_ * taps_ * g.channels);
  }

  int64_t parts() const { return groups_ * chunks_; }

  void run(int64_t part) override {
    Rounding rounding;
    const Geometry& g = of_.geometry;
    int64_t group = part / chunks_, from = part % chunks_ * channels_at_once_;
    int64_t channels = std::min(g.channels - from, channels_at_once_), size = taps_ * channels;
    Pairwise<V, Sum> images(size), blocks(size);
    std::vector<Tap<T, Sum>> taps;
    taps.reserve(taps_);
    int64_t first = group * images_at_once_, last = std::min(g.images, first + images_at_once_);
    for (int64_t image = first; image < last; ++image) {
      const T* x = static_cast<const T*>(of_.x) + image * g.in[0] * g.in[1] * g.in[2] * g.channels + from;
      int64_t rows = g.out[0] * g.out[1];
      const T* dy = static_cast<const T*>(of_.dy) + image * rows * g.out[2] * g.channels + from;
      blocks.clear();
      for (int64_t begin = 0; begin < rows; begin += rows_in_chain) {
        Sum* sums = blocks.next();
        for (int64_t i = 0; i < size; ++i) sums[i] = 0;
        for (int64_t row = begin; row < std::min(rows, begin + rows_in_chain); ++row) {
          for (const Segment& segment : width_.segments) {
            taps_of_row(g, width_, segment, x, sums, channels, row / g.out[1], row % g.out[1], taps);
            auto add = segment.is_masked ? masked_chains_in_row<V, T, Sum> : chains_in_row<V, T, Sum>;
            add(taps, channels, segment.count, segment.x_step * g.channels,
                dy + (row * g.out[2] + segment.first) * g.channels, segment.step * g.channels);
          }
        }
        blocks.push();
      }
      const Sum* total = blocks.total();
      copy(total, size, images.next());
      images.push();
    }
    const Sum* total = images.total();
    for (int64_t tap = 0; tap < taps_; ++tap)
      copy(total + tap * channels, channels, sums_.data() + (group * taps_ + tap) * g.channels + from);
  }

  void finish() {
    Rounding rounding;
    int64_t size = taps_ * of_.geometry.channels;
    Pairwise<V, Sum> groups(size);
    for (int64_t group = 0; group < groups_; ++group) {
      copy(sums_.data() + group * size, size, groups.next());
      groups.push();
    }
    const Sum* total = groups.total();
    T* to = static_cast<T*>(of_.gradient);
    for (int64_t i = 0; i < size; i += V::lanes) {
      int lanes = int(std::min<int64_t>(V::lanes, size - i));
      store_first(lanes == V::lanes ? V::load(total + i) : load_first<V>(total + i, lanes), to + i, lanes);
    }
  }

 private:
  const KernelGradient& of_;
  Width width_;
  int64_t taps_, images_at_once_, groups_, channels_at_once_, chunks_;
  Array<Sum> sums_;
};

template <class V, class T, class Sum>
void kernel_gradient_of(const KernelGradient& of, Threads& threads) {
  KernelGradientParts<V, T, Sum> parts(of, threads.count());
  threads.run(parts.parts(), parts);
  parts.finish();
}

void kernel_gradient(const KernelGradient& of, Threads& threads) {
  switch (of.type) {
    case Type::f32: return kernel_gradient_of<Floats, float, float>(of, threads);
    case Type::f64: return kernel_gradient_of<Doubles, double, double>(of, threads);
    case Type::bf16: return kernel_gradient_of<Floats, bf16, float>(of, threads);
    case Type::f16: return kernel_gradient_of<Floats, f16, float>(of, threads);
  }
}

}  // namespace

void matmul(const Matmul&, Threads&);

extern const Kernels kernels;
const Kernels kernels = {conv, kernel_gradient, matmul};

}  // namespace JAXDW_ISA
}  // namespace jaxdw
