// The kernels, compiled once for each instruction set: JAXDW_ISA says for which.
//
// Lanes of a vector are output channels (or, of a row with stride 1, neighbouring outputs), never terms of one sum. So
// all instruction sets round alike. docs/arithmetic.md has the sequence of roundings.
#include <math.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "epilogue.h"
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

// Taps that are added side by side. More weights would leave no registers for sums, and types other than float are not
// worth the time to compile more. Without vectors nothing is gained.
template <class V, class T>
constexpr int most_side_by_side = V::lanes == 1 ? 1 : std::is_same_v<T, float> ? 5 : 3;

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


// The taps (i, j) of an output row that read inputs: the input row that they read, and the number of the first of them.
template <class T>
struct Line {
  const T* x;
  int64_t tap;
};

// Taps of a line that read inputs side by side. Distances from the block's first input and from the line's first weight
// are in elements. Bit p of `columns` says that the p-th input is none of the padding.
struct Group {
  int64_t taps, x, w;
  unsigned columns;
};

// A block of outputs along the last axis, the lines of its row, and where its outputs go. The inputs of neighbouring
// taps are `x_step` apart, their weights `w_step`. The first output's inputs are where the groups say, from `x` on.
// What the next block reads is fetched meanwhile: `ahead_share` elements for each channel from `ahead` on, and likewise
// in lines that are `ahead_step` apart, `ahead_count` in all; and the outputs that are `y_ahead` further, to be written.
template <class T, class Sum>
struct Block {
  const Line<T>* lines;
  int64_t line_count;
  const Group* groups;
  int64_t group_count, x, x_step, w_step, line_step, y_step;
  int outputs;
  const Sum *kernel, *bias;
  Bias place;
  const Epilogue<T, Sum>* epilogue;
  bool streams;
  const T* ahead;
  int64_t ahead_count, ahead_step, ahead_share, y_ahead;
};

template <class T>
JAXDW_INLINE void fetch(const T* from, int64_t count) {  // inline, or compilers leave it out: it has no result
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// x + step. The compiler would rather keep all multiples of the step, for which there are not enough registers.
template <class T>
JAXDW_INLINE T* next(T* x, int64_t step) {
  x += step;
  asm("" : "+r"(x));
  return x;
}

// Adds the products of K taps to R outputs that are S inputs apart: each input is read once. The products of an output
// are added from the first tap to the last, because its inputs come in that order.
template <class V, int K, int S, bool part, int R, int CV, class T, class Sum>
JAXDW_INLINE void add_taps(V (&sums)[R][CV], const T* x, int64_t x_step, const Sum* w, int64_t w_step, unsigned columns,
                           int lanes) {
  V weights[K][CV];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    if (k) w = next(w, w_step);
#pragma GCC unroll 16
    for (int v = 0; v < CV; ++v) weights[k][v] = load_last<V, part>(w, v, CV, lanes);
  }
#pragma GCC unroll 32
  for (int p = 0; p < S * (R - 1) + K; ++p) {
    if (p) x = next(x, x_step);
    if (!(columns >> p & 1)) continue;
#pragma GCC unroll 16
    for (int v = 0; v < CV; ++v) {
      V input = in_register(load_last<V, part>(x, v, CV, lanes));
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k)
        if (p >= k && (p - k) % S == 0 && (p - k) / S < R)
          sums[(p - k) / S][v] = fma(input, weights[k][v], sums[(p - k) / S][v]);
    }
  }
}

// Up to R outputs of CV vectors of channels, the last of which may have fewer `lanes`: all their sums are in registers.
template <class V, int K, int S, int R, int CV, bool part, class T, class Sum>
JAXDW_INLINE void tile(const Block<T, Sum>& block, int64_t c, int lanes, T* y) {
  constexpr bool uneven = K > (most_side_by_side<V, T> + 1) / 2 && K > 1;  // some groups have one tap fewer
  constexpr int64_t width = CV * V::lanes;
  const int64_t channels = part ? width - V::lanes + lanes : width;
  int64_t y_step = block.y_step;
  int outputs = block.outputs;
  if (!block.streams) {
    const T* later = y + block.y_ahead + c;
    for (int r = 0; r < outputs; ++r, later += y_step) fetch(later, width);
  }
  V sums[R][CV];
#pragma GCC unroll 16
  for (int v = 0; v < CV; ++v) {
    V start = block.place == Bias::first ? load_last<V, part>(block.bias + c, v, CV, lanes) : V::zero();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r][v] = start;
  }
  for (const Line<T>* line = block.lines; line < block.lines + block.line_count; ++line) {
    const T* line_x = line->x + block.x + c;
    const Sum* line_w = block.kernel + line->tap * block.line_step + c;
    if (int64_t number = line - block.lines; number < block.ahead_count)
      fetch(block.ahead + number * block.ahead_step + c * block.ahead_share, channels * block.ahead_share);
    for (const Group* group = block.groups; group < block.groups + block.group_count; ++group) {
      const T* group_x = line_x + group->x;
      const Sum* group_w = line_w + group->w;
      if (!uneven || group->taps == K)
        add_taps<V, K, S, part>(sums, group_x, block.x_step, group_w, block.w_step, group->columns, lanes);
      else if constexpr (uneven)
        add_taps<V, K - 1, S, part>(sums, group_x, block.x_step, group_w, block.w_step, group->columns, lanes);
    }
  }
  if (block.place == Bias::last) {
#pragma GCC unroll 16
    for (int v = 0; v < CV; ++v) {
      V last = load_last<V, part>(block.bias + c, v, CV, lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[r][v] = add(sums[r][v], last);
    }
  }
  if (block.epilogue) {  // the sums go through memory in the first cache
    alignas(64) Sum stored[R * width];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < CV; ++v) sums[r][v].store(stored + r * width + v * V::lanes);
    finish<V>(*block.epilogue, stored, width, outputs, c, channels, y, y_step);
    return;
  }
  bool streams = block.streams;
  y += c;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r >= outputs) break;
    if (r) y = next(y, y_step);
#pragma GCC unroll 16
    for (int v = 0; v < CV; ++v) {
      if (streams)
        stream(sums[r][v], y + v * V::lanes);
      else if (part && v == CV - 1)
        store_first(sums[r][v], y + v * V::lanes, lanes);
      else
        sums[r][v].store(y + v * V::lanes);
    }
  }
}

// Channels `from` to `to` of up to R outputs.
template <class V, int K, int S, int R, class T, class Sum>
void outputs_of(const Block<T, Sum>& block, int64_t from, int64_t to, T* y) {
  constexpr int CV = std::max(1, std::min(2, (registers - 1) / (R + K + 1)));
  int64_t c = from;
  for (; c + CV * V::lanes < to; c += CV * V::lanes) tile<V, K, S, R, CV, false>(block, c, 0, y);
  int64_t vectors = (to - c - 1) / V::lanes;
  int lanes = int(to - c - vectors * V::lanes);
  if constexpr (CV == 2)
    if (vectors) return tile<V, K, S, R, 2, true>(block, c, lanes, y);
  tile<V, K, S, R, 1, true>(block, c, lanes, y);
}

// Bytes of weights that stay in the first cache while the outputs of a row go by.
constexpr int64_t cached_weights = 16384;

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

// Bytes from the outputs that are computed to those that are fetched: as many whole blocks as fit, or none.
constexpr int64_t most_ahead = 2048;

// Products that other threads must take over so that it is worth to wake them, which costs tens of microseconds.
constexpr int64_t least_shared = 1 << 20;

// Bytes of x and y from which y is stored past the caches. From so many bytes of y alone the C library takes memory
// from the system each time: its pages have just been zeroed, so they are in the cache, and stores past it are slower.
constexpr int64_t least_streamed = 16 << 20, least_fresh = 32 << 20;

// The same convolution of x and y that are reversed along their spatial axes: the last tap is the first.
Conv mirrored(Conv conv) {
  Geometry& g = conv.geometry;
  for (int axis = 0; axis < 3; ++axis) {
    int64_t read = (g.out[axis] - 1) * g.strides[axis] + (g.kernel[axis] - 1) * g.kernel_dilation[axis];
    g.padding[axis] = read - g.padding[axis] - (g.in[axis] - 1) * g.input_dilation[axis];
  }
  conv.flipped = !conv.flipped;
  return conv;
}

// A convolution as rows of outputs that are computed independently, some of them cut into parts.
template <class V, class T, class Sum>
class ConvRows : public Parts {
 public:
  ConvRows(const Conv& conv, int64_t threads) : conv_(conv.geometry.from_last_tap ? mirrored(conv) : conv) {
    const Geometry& g = conv_.geometry;
    pixel_ = g.from_last_tap ? -g.channels : g.channels;
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
    has_epilogue_ = conv.scale || conv.residual || conv.activation != Activation::none;
    epilogue_ = {static_cast<const Sum*>(conv.scale), static_cast<const Sum*>(conv.shift),
                 static_cast<const T*>(conv.y), static_cast<const T*>(conv.residual), conv.activation};
    group_epilogue_ = epilogue_;
    int64_t dilation = g.input_dilation[2], phases = dilation / std::gcd(dilation, g.strides[2]);
    for (int64_t phase = 0; phase < std::min(phases, g.out[2]); ++phase) add_phase(phase, phases);
    for (Segment& segment : segments_) {
      segment.block.groups = groups_.data() + segment.first_group;
      blocks_ += segment.blocks;
    }

    rows_ = g.images * g.out[0] * g.out[1];
    int64_t work = rows_ * g.out[2] * g.channels * taps_;
    int64_t wanted = work / threads * (threads - 1) < least_shared ? 1 : std::min<int64_t>(work / 65536, 4 * threads);
    pieces_ = rows_ >= wanted ? 1 : std::min(ceil_div(wanted, rows_), ceil_div(blocks_, 4));
    // whole images where there are many, since two parts of one read some rows twice
    int64_t of_image = g.out[0] * g.out[1];
    rows_at_once_ = g.images >= wanted ? g.images / wanted * of_image : ceil_div(of_image, ceil_div(wanted, g.images));
    int64_t in = g.images * g.in[0] * g.in[1] * g.in[2] * g.channels, out = rows_ * g.out[2] * g.channels;
    int64_t bytes = (in + out) * int64_t(sizeof(T));
    streams_ = bytes > least_streamed && can_stream && !has_epilogue_ && std::is_same_v<T, float> &&
               g.channels % V::lanes == 0 && reinterpret_cast<uintptr_t>(conv.y) % 64 == 0 &&
               out * int64_t(sizeof(T)) < least_fresh;
    for (Segment& segment : segments_) segment.block.streams = streams_;
    parts_ = ceil_div(rows_, rows_at_once_) * pieces_;
  }

  int64_t parts() const { return parts_; }

  void run(int64_t part) override {
    Rounding rounding;
    int64_t piece = part % pieces_, first = part / pieces_ * rows_at_once_;
    int64_t begin = blocks_ * piece / pieces_, end = blocks_ * (piece + 1) / pieces_;
    int64_t last = std::min(rows_, first + rows_at_once_);
    Row row;
    for (; first < last; ++first) {
      lines_of(first, row);
      int64_t before = 0;
      for (const Segment& segment : segments_) {
        blocks_of(segment, row, std::max<int64_t>(0, begin - before), std::min(segment.blocks, end - before));
        before += segment.blocks;
      }
    }
#if defined(__x86_64__)
    if (streams_) _mm_sfence();  // before another thread is told that this part is done
#endif
  }

 private:
  using Run = void (*)(const Block<T, Sum>&, int64_t from, int64_t to, T* y);

  // Blocks of `size` outputs along the last axis that are computed alike: the first one, and what is `next` to it.
  struct Segment {
    Block<T, Sum> block;
    int64_t blocks, first_group, channels, y, x_next, y_next;
    Run run;
  };

  struct Row {
    std::vector<Line<T>> lines;
    T* y;
  };

  // The outputs that are a number of `phases` apart: they read inputs that are `x_step` apart, under the same taps.
  void add_phase(int64_t phase, int64_t phases) {
    const Geometry& g = conv_.geometry;
    int64_t dilation = g.input_dilation[2], tap_step = dilation / std::gcd(dilation, g.kernel_dilation[2]);
    Phase p = {};
    p.tap_step = tap_step;
    while (p.tap < g.kernel[2] && (phase * g.strides[2] + p.tap * g.kernel_dilation[2] - g.padding[2]) % dilation)
      ++p.tap;
    p.taps = ceil_div(std::max<int64_t>(0, g.kernel[2] - p.tap), tap_step);
    p.x = (phase * g.strides[2] + p.tap * g.kernel_dilation[2] - g.padding[2]) / dilation;
    p.x_tap = tap_step * g.kernel_dilation[2] / dilation;
    p.x_output = g.strides[2] * phases / dilation;
    p.y = phase;
    p.y_output = phases;
    int64_t count = ceil_div(g.out[2] - phase, phases), unused = -g.channels % V::lanes;
    if (unused < 0) unused += V::lanes;
    int64_t wide = V::lanes / std::gcd<int64_t>(V::lanes, g.channels);
    int64_t from = 0, to = 0;  // the outputs that are computed side by side, as if they were channels
    if (unused * 4 > g.channels && phases == 1 && p.x_output == 1) {
      from = std::max<int64_t>(0, ceil_div(-p.x, 1));
      to = std::min(count, g.in[2] - p.x - (p.taps - 1) * p.x_tap);
      from = ceil_div(from, at_border) * at_border, to = count - ceil_div(count - to, at_border) * at_border;
      if (to - from < wide) from = to = 0;
    }
    add_blocks(p, 0, from, 1, g.channels);
    if (from < to) {
      if (!group_kernel_.data()) {
        group_kernel_ = widened<V, Sum, Sum>(kernel_, taps_, g.channels, wide);
        if (bias_) group_bias_ = widened<V, Sum, Sum>(bias_, 1, g.channels, wide);
        if (epilogue_.scale) {
          group_scale_ = widened<V, Sum, Sum>(epilogue_.scale, 1, g.channels, wide);
          group_shift_ = widened<V, Sum, Sum>(epilogue_.shift, 1, g.channels, wide);
          group_epilogue_.scale = group_scale_.data();
          group_epilogue_.shift = group_shift_.data();
        }
      }
      int64_t whole = (to - from) / wide, rest = (to - from) % wide;
      add_blocks(p, from, whole, wide, wide * g.channels);
      if (rest) add_blocks(p, from + whole * wide, 1, wide, rest * g.channels);
    }
    add_blocks(p, to, count - to, 1, g.channels);
  }

  // Where the first tap and the first output of a phase are, how many taps there are, and how far the next ones are.
  struct Phase {
    int64_t tap, taps, tap_step, x, x_tap, x_output, y, y_output;
  };

  // Blocks of `count` outputs from `from` on, each of them `wide` outputs beside each other with `channels` numbers.
  void add_blocks(const Phase& p, int64_t from, int64_t count, int64_t wide, int64_t channels) {
    if (count <= 0) return;
    const Geometry& g = conv_.geometry;
    int64_t x_output = p.x_output * wide, size = ceil_div(count, ceil_div(count, most_outputs));
    int64_t passes = std::max<int64_t>(1, ceil_div(p.taps, most_side_by_side<V, T>));
    int64_t together = ceil_div(p.taps, passes);
    // inputs are read once for all taps where the next output's are one or two taps further
    bool shares = p.taps > 1 && (x_output == p.x_tap || (x_output == 2 * p.x_tap && together > 2));
    if (!shares) passes = p.taps, together = 1;
    int64_t x_step = shares ? p.x_tap : x_output, apart = x_output / x_step;
    int64_t weights = g.channels * wide, beside = g.from_last_tap ? channels - g.channels : 0;
    bool was_whole = false;
    for (int64_t output = 0; output < count; output += size) {
      int64_t outputs = std::min(size, count - output), x = p.x + (from + output * wide) * p.x_output;
      bool whole = x >= 0 && x + (outputs - 1) * x_output + (p.taps - 1) * p.x_tap + (wide - 1) * p.x_output < g.in[2];
      if (whole && was_whole && outputs == segments_.back().block.outputs) {
        ++segments_.back().blocks;
        continue;
      }
      was_whole = whole;
      Segment segment = {};
      Block<T, Sum>& block = segment.block;
      segment.first_group = int64_t(groups_.size());
      for (int64_t pass = 0, tap = 0; pass < passes; ++pass) {
        Group group = {together, 0, 0, 0};
        group.taps = ceil_div(p.taps - tap, passes - pass);
        int64_t at = x + tap * p.x_tap;
        for (int64_t i = 0; i < apart * (outputs - 1) + group.taps; ++i)
          if (at + i * x_step >= 0 && at + i * x_step < g.in[2]) group.columns |= 1u << i;
        group.x = tap * p.x_tap * pixel_;
        group.w = (p.tap + tap * p.tap_step) * weights;
        if (conv_.flipped) group.w = -group.w;
        if (group.columns) groups_.push_back(group);
        tap += group.taps;
      }
      segment.blocks = 1;
      segment.channels = channels;
      segment.y = (p.y + (from + output * wide) * p.y_output) * pixel_ - beside;
      segment.x_next = outputs * x_output * pixel_;
      segment.y_next = outputs * p.y_output * wide * pixel_;
      block.group_count = int64_t(groups_.size()) - segment.first_group;
      block.x = x * pixel_ - beside;
      block.x_step = x_step * pixel_;
      block.w_step = p.tap_step * weights;
      block.y_step = p.y_output * wide * pixel_;
      block.outputs = int(outputs);
      block.kernel = wide > 1 ? std::as_const(group_kernel_).data() : kernel_;
      block.line_step = weights * g.kernel[2];
      if (conv_.flipped) {
        block.kernel += (taps_ - 1) * weights;
        block.w_step = -block.w_step;
        block.line_step = -block.line_step;
      }
      block.bias = wide > 1 ? std::as_const(group_bias_).data() : bias_;
      block.place = conv_.bias_place;
      if (has_epilogue_) block.epilogue = wide > 1 ? &group_epilogue_ : &epilogue_;
      segment.run = run_of(together, apart, outputs);
      segments_.push_back(segment);
    }
  }

  // The function for blocks of so many outputs, so many inputs `apart`, whose taps are read `together`.
  template <int K = most_side_by_side<V, T>>
  static Run run_of(int64_t together, int64_t apart, int64_t outputs) {
    if constexpr (K > 1)
      if (together < K) return run_of<K - 1>(together, apart, outputs);
    if constexpr (K > 2)
      if (apart == 2) return of_size<K, 2>(outputs);
    return of_size<K, 1>(outputs);
  }

  // Types other than float are not worth the time to compile more sizes.
  template <int K, int S>
  static Run of_size(int64_t outputs) {
    if constexpr (std::is_same_v<T, float> && V::lanes > 1) {
      if (outputs == 7) return outputs_of<V, K, S, 7, T, Sum>;
      if (outputs == 5 || outputs == 6) return outputs_of<V, K, S, 6, T, Sum>;
    }
    if (outputs > 4) return outputs_of<V, K, S, 8, T, Sum>;
    if (outputs > 1) return outputs_of<V, K, S, 4, T, Sum>;
    return outputs_of<V, K, S, 1, T, Sum>;
  }

  void lines_of(int64_t number, Row& to) {
    const Geometry& g = conv_.geometry;
    int64_t row = number % g.out[1], depth = number / g.out[1] % g.out[0], image = number / g.out[1] / g.out[0];
    int64_t in = g.in[0] * g.in[1] * g.in[2], out = g.out[0] * g.out[1] * g.out[2], last = g.from_last_tap;
    const T* x = static_cast<const T*>(conv_.x) + (image * in + last * (in - 1)) * g.channels;
    T* y_of_image = static_cast<T*>(conv_.y) + (image * out + last * (out - 1)) * g.channels;
    to.y = y_of_image + (depth * g.out[1] + row) * g.out[2] * pixel_;
    to.lines.clear();
    for (int64_t i = 0; i < g.kernel[0]; ++i) {
      int64_t z = input_at(g, 0, depth, i);
      if (z < 0) continue;
      for (int64_t j = 0; j < g.kernel[1]; ++j) {
        int64_t y = input_at(g, 1, row, j);
        if (y >= 0) to.lines.push_back({x + (z * g.in[1] + y) * g.in[2] * pixel_, i * g.kernel[1] + j});
      }
    }
  }

  // The same blocks in a row, as they lie in memory. What the next block is the first to read, here or in the next row,
  // is fetched meanwhile: processors do not foresee it where rows are left out, or where a row is short. Of many
  // channels a few are computed in all blocks before the next, so that the weights are still in the first cache.
  void blocks_of(const Segment& segment, const Row& row, int64_t begin, int64_t end) {
    const Geometry& g = conv_.geometry;
    int64_t unit = 8 * V::lanes, chunk = cached_weights / int64_t(sizeof(Sum)) / taps_;
    chunk = std::max(chunk / unit * unit, unit);
    int64_t x_row = g.in[2] * pixel_, reach = (g.kernel[2] - 1) * g.kernel_dilation[2] + 1 - g.strides[2];
    int64_t beyond = segment.x_next + reach * pixel_;
    Block<T, Sum> block = segment.block;
    block.lines = row.lines.data();
    block.line_count = int64_t(row.lines.size());
    block.ahead_count = std::min({g.strides[1], g.kernel[1], block.line_count});
    block.ahead_step = -x_row;
    block.ahead_share = std::abs(segment.x_next) / segment.channels;
    block.y_ahead = most_ahead / int64_t(sizeof(T)) / std::abs(segment.y_next) * segment.y_next;
    for (int64_t from = 0; from < segment.channels; from += chunk) {
      int64_t to = std::min(segment.channels, from + chunk);
      for (int64_t b = begin; b < end; ++b) {
        block.x = segment.block.x + b * segment.x_next;
        T* y = row.y + segment.y + b * segment.y_next;
        if (block.line_count) {
          int64_t x = block.x + beyond;
          if (x / pixel_ >= g.in[2]) x += (g.strides[1] - 1) * x_row;
          if (pixel_ < 0) x += segment.x_next - pixel_;
          block.ahead = block.lines[block.line_count - 1].x + x;
        }
        segment.run(block, from, to, y);
      }
    }
  }

  const Conv conv_;
  std::vector<Segment> segments_;
  std::vector<Group> groups_;
  int64_t pixel_, taps_, blocks_ = 0, rows_, rows_at_once_, pieces_, parts_;
  bool streams_, has_epilogue_;
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

constexpr int most_chains = registers == 16 ? 10 : 14;

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
void batch_norm(const BatchNorm&, Threads&);
void batch_norm_gradient(const BatchNormGradient&, Threads&);
void cross_entropy(const CrossEntropy&, Threads&);
void axpby(const Axpby&, Threads&);
void causal(const Causal&, Threads&);

extern const Kernels kernels;
const Kernels kernels = {conv, kernel_gradient, matmul, batch_norm, batch_norm_gradient, cross_entropy, axpby, causal};

}  // namespace JAXDW_ISA
}  // namespace jaxdw
