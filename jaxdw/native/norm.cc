// Batch normalization in training and its gradient, compiled once for each instruction set.
//
// Lanes of a vector are channels, never terms of one sum. docs/arithmetic.md has the sequence of roundings.
#include <math.h>

#include <algorithm>
#include <type_traits>

#include "support.h"

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

// Rows whose sums are one chain.
constexpr int64_t block_rows = 128;
// Rows of a block that are read before the next ones: all their channels, as they lie in memory.
constexpr int64_t rows_at_once = 16;
// Elements that are fetched ahead where rows are read one after the other.
constexpr int64_t ahead = 1024;
// Vectors of channels whose sums are in registers together.
constexpr int most_vectors = registers == 32 ? 4 : 2;
// Elements that are worth a thread.
constexpr int64_t least_elements = 32768;

template <class V>
constexpr int doubles_in = V::lanes / Doubles::lanes;

int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

// Equal runs of `count` things for parts, of which each thread takes some.
int64_t things_at_once(int64_t count, int64_t elements, int64_t threads) {
  int64_t parts = threads == 1 ? 1 : std::min(4 * threads, divided(elements, least_elements));
  return std::max<int64_t>(1, divided(count, parts));
}

// Calls `of(vector, vectors, is_part, lanes)` for all channels, some vectors at a time: the first two are constants of
// their types, and the last vector has its first `lanes` lanes alone.
template <class V, int most, class Of>
JAXDW_INLINE void for_vectors(int64_t channels, Of of) {
  int64_t c = 0;
  for (; c + most * V::lanes <= channels; c += most * V::lanes)
    of(c, std::integral_constant<int, most>(), std::false_type(), V::lanes);
  for (; c + V::lanes <= channels; c += V::lanes) of(c, std::integral_constant<int, 1>(), std::false_type(), V::lanes);
  if (c < channels) of(c, std::integral_constant<int, 1>(), std::true_type(), int(channels - c));
}

// The numbers of each channel that normalize it, in whole vectors.
template <class V, class Sum>
struct Channels {
  Channels(const void* mean, const void* var, const void* scale, const void* bias, double epsilon, int64_t channels)
      : width(divided(channels, V::lanes) * V::lanes), mean(width), factor(width), bias(width), deviation(width) {
    for (int64_t c = 0; c < channels; ++c) {
      this->mean.data()[c] = static_cast<const Sum*>(mean)[c];
      this->bias.data()[c] = static_cast<const Sum*>(bias)[c];
      deviation.data()[c] = Sum(1 / sqrt(double(static_cast<const Sum*>(var)[c]) + epsilon));
      factor.data()[c] = deviation.data()[c] * static_cast<const Sum*>(scale)[c];
    }
  }
  int64_t width;
  Array<Sum> mean, factor, bias, deviation;  // the last: of the reciprocal
};

template <class V>
struct Limits {
  // Where the activation's derivative is 0: at `low` and below, at `high` and above.
  explicit Limits(Activation activation)
      : low(V::splat(activation == Activation::none ? NAN : 0)),
        high(V::splat(activation == Activation::relu6 ? 6 : NAN)),
        least(V::splat(activation == Activation::none ? -INFINITY : 0)),
        most(V::splat(activation == Activation::relu6 ? 6 : INFINITY)) {}
  V low, high, least, most;
};

// Two sums for each block of rows and channel.
class Blocks : public Parts {
 public:
  Blocks(int64_t rows, int64_t channels, int64_t width, int64_t threads)
      : rows_(rows), channels_(channels), width_(width), blocks_(divided(rows, block_rows)),
        at_once_(things_at_once(blocks_, rows * channels, threads)), first_(blocks_ * width), second_(blocks_ * width) {}

  int64_t count() const { return divided(blocks_, at_once_); }

  void run(int64_t part) override {
    Rounding rounding;
    Array<double> scratch(width_);
    for (int64_t b = part * at_once_; b < std::min(blocks_, (part + 1) * at_once_); ++b)
      add(b * block_rows, rows_of(b), first_.data() + b * width_, second_.data() + b * width_, scratch.data());
  }

 protected:
  // Adds the rows of a block to its sums, which are 0 before.
  virtual void add(int64_t row, int64_t rows, double* first, double* second, double* scratch) = 0;
  int64_t rows_of(int64_t block) const { return std::min(block_rows, rows_ - block * block_rows); }

  int64_t rows_, channels_, width_, blocks_, at_once_;
  Array<double> first_, second_;
};

// The sum of a block, and the sum of the squares of the distances from its mean.
template <class V, class T>
class Moments : public Blocks {
 public:
  Moments(const BatchNorm& of, int64_t threads)
      : Blocks(of.rows, of.channels, divided(of.channels, V::lanes) * V::lanes, threads),
        x_(static_cast<const T*>(of.x)) {}

  template <class Sum>
  void finish(Sum* mean, Sum* var) const {
    Rounding rounding;
    Array<double> center(width_), sum(width_);
    double *m = center.data(), *s = sum.data(), n = double(rows_);
    for (int64_t b = 0; b < blocks_; ++b)
      for (int64_t c = 0; c < width_; ++c) m[c] += first_.data()[b * width_ + c];
    for (int64_t c = 0; c < width_; ++c) m[c] /= n;
    for (int64_t b = 0; b < blocks_; ++b) {
      const double *first = first_.data() + b * width_, *second = second_.data() + b * width_, k = double(rows_of(b));
      for (int64_t c = 0; c < width_; ++c) {
        double distance = first[c] / k - m[c];
        s[c] = __builtin_fma(distance * k, distance, s[c] + second[c]);
      }
    }
    for (int64_t c = 0; c < channels_; ++c) mean[c] = Sum(m[c]), var[c] = Sum(s[c] / n);
  }

 private:
  static constexpr int halves = doubles_in<V>;

  void add(int64_t row, int64_t rows, double* sums, double* squares, double* mean) override {
    const T* x = x_ + row * channels_;
    add_rows(x, rows, sums, [](Doubles value, Doubles, Doubles sum) { return jaxdw::JAXDW_ISA::add(sum, value); }, mean);
    for (int64_t c = 0; c < width_; ++c) mean[c] = sums[c] / double(rows);
    auto square = [](Doubles value, Doubles center, Doubles sum) {
      Doubles distance = subtract(value, center);
      return fma(distance, distance, sum);
    };
    add_rows(x, rows, squares, square, mean);
  }

  template <class Of>
  void add_rows(const T* x, int64_t rows, double* sums, Of of, const double* mean) const {
    for (int64_t first = 0; first < rows; first += rows_at_once) {
      const int64_t end = std::min(rows, first + rows_at_once);
      for_vectors<V, most_vectors>(channels_, [&](int64_t c, auto vectors, auto is_part, int lanes) {
        constexpr int N = decltype(vectors)::value;
        constexpr bool part = decltype(is_part)::value;
        Doubles s[N][halves], center[N][halves];
        for (int v = 0; v < N; ++v)
          for (int h = 0; h < halves; ++h) {
            const int64_t at = c + v * V::lanes + h * Doubles::lanes;
            s[v][h] = Doubles::load(sums + at), center[v][h] = Doubles::load(mean + at);
          }
        for (int64_t r = first; r < end; ++r)
          for (int v = 0; v < N; ++v) {
            const int64_t at = r * channels_ + c;
            __builtin_prefetch(x + at + rows_at_once * channels_ + v * V::lanes);
            Doubles value[halves];
            widen(load_last<V, part>(x + at, v, N, lanes), value);
            for (int h = 0; h < halves; ++h) s[v][h] = of(value[h], center[v][h], s[v][h]);
          }
        for (int v = 0; v < N; ++v)
          for (int h = 0; h < halves; ++h) s[v][h].store(sums + c + v * V::lanes + h * Doubles::lanes);
      });
    }
  }

  const T* x_;
};

// y, some rows at a time.
template <class V, class T, class Sum>
class Normalized : public Parts {
 public:
  Normalized(const BatchNorm& of, int64_t threads)
      : of_(of), channels_(of.mean, of.var, of.scale, of.bias, of.epsilon, of.channels),
        at_once_(things_at_once(of.rows, of.rows * of.channels, threads)) {}

  int64_t count() const { return divided(of_.rows, at_once_); }

  void run(int64_t part) override {
    Rounding rounding;
    Limits<V> limits(of_.activation);
    part = count() - 1 - part;  // what was read last is in the caches
    const int64_t first = part * at_once_, end = std::min(of_.rows, first + at_once_), channels = of_.channels;
    const T* x = static_cast<const T*>(of_.x) + first * channels;
    T* y = static_cast<T*>(of_.y) + first * channels;
    const Sum *mean = channels_.mean.data(), *factor = channels_.factor.data(), *bias = channels_.bias.data();
    for (int64_t row = first; row < end; ++row, x += channels, y += channels)
      for_vectors<V, 1>(channels, [&](int64_t c, auto, auto is_part, int lanes) {
        constexpr bool part = decltype(is_part)::value;
        __builtin_prefetch(x + c + ahead);
        V distance = subtract(load_last<V, part>(x + c, 0, 1, lanes), V::load(mean + c));
        V value = fma(distance, V::load(factor + c), V::load(bias + c));
        value = at_most(limits.most, at_least(limits.least, value));
        if (part)
          store_first(value, y + c, lanes);
        else
          value.store(y + c);
      });
  }

 private:
  const BatchNorm& of_;
  Channels<V, Sum> channels_;
  int64_t at_once_;
};

// dy behind the activation's derivative.
template <class V>
JAXDW_INLINE V behind_activation(V distance, V factor, V bias, V dy, const Limits<V>& limits) {
  return inside(limits.low, fma(distance, factor, bias), limits.high, dy);
}

// The sum of a block's dy, and of its products with the distance of x from the mean.
template <class V, class T, class Sum>
class Products : public Blocks {
 public:
  Products(const BatchNormGradient& of, const Channels<V, Sum>& channels, int64_t threads)
      : Blocks(of.rows, of.channels, channels.width, threads), of_(of), numbers_(channels) {}

  // Adds the blocks in order.
  void finish(double* first, double* second) const {
    Rounding rounding;
    for (int64_t b = 0; b < blocks_; ++b)
      for (int64_t c = 0; c < width_; ++c) {
        first[c] += first_.data()[b * width_ + c];
        second[c] += second_.data()[b * width_ + c];
      }
  }

 private:
  static constexpr int halves = doubles_in<V>;

  void add(int64_t row, int64_t rows, double* first, double* second, double*) override {
    for (int64_t done = 0; done < rows; done += rows_at_once)
      add_rows(row + done, std::min(rows_at_once, rows - done), first, second);
  }

  void add_rows(int64_t row, int64_t rows, double* first, double* second) const {
    const T *x = static_cast<const T*>(of_.x) + row * channels_, *dy = static_cast<const T*>(of_.dy) + row * channels_;
    const Limits<V> limits(of_.activation);
    for_vectors<V, most_vectors / 2>(channels_, [&](int64_t c, auto vectors, auto is_part, int lanes) {
      constexpr int N = decltype(vectors)::value;
      constexpr bool part = decltype(is_part)::value;
      Doubles s[N][halves], p[N][halves];
      V mean[N], factor[N], bias[N];
      for (int v = 0; v < N; ++v) {
        const int64_t at = c + v * V::lanes;
        for (int h = 0; h < halves; ++h) {
          s[v][h] = Doubles::load(first + at + h * Doubles::lanes);
          p[v][h] = Doubles::load(second + at + h * Doubles::lanes);
        }
        mean[v] = V::load(numbers_.mean.data() + at);
        factor[v] = V::load(numbers_.factor.data() + at);
        bias[v] = V::load(numbers_.bias.data() + at);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < N; ++v) {
          const int64_t at = r * channels_ + c, next = at + rows_at_once * channels_ + v * V::lanes;
          __builtin_prefetch(x + next);
          __builtin_prefetch(dy + next);
          V distance = subtract(load_last<V, part>(x + at, v, N, lanes), mean[v]);
          V slope = load_last<V, part>(dy + at, v, N, lanes);
          slope = behind_activation(distance, factor[v], bias[v], slope, limits);
          Doubles d[halves], g[halves];
          widen(distance, d);
          widen(slope, g);
          for (int h = 0; h < halves; ++h) {
            s[v][h] = jaxdw::JAXDW_ISA::add(s[v][h], g[h]);
            p[v][h] = fma(g[h], d[h], p[v][h]);
          }
        }
      for (int v = 0; v < N; ++v)
        for (int h = 0; h < halves; ++h) {
          s[v][h].store(first + c + v * V::lanes + h * Doubles::lanes);
          p[v][h].store(second + c + v * V::lanes + h * Doubles::lanes);
        }
    });
  }

  const BatchNormGradient& of_;
  const Channels<V, Sum>& numbers_;
};

// dx, some rows at a time: fma(dy, factor, fma(x - mean, slope, shift)).
template <class V, class T, class Sum>
class InputGradient : public Parts {
 public:
  InputGradient(const BatchNormGradient& of, const Channels<V, Sum>& channels, const Sum* slope, const Sum* shift,
                int64_t threads)
      : of_(of), numbers_(channels), slope_(slope), shift_(shift),
        at_once_(things_at_once(of.rows, of.rows * of.channels, threads)) {}

  int64_t count() const { return divided(of_.rows, at_once_); }

  void run(int64_t part) override {
    Rounding rounding;
    const Limits<V> limits(of_.activation);
    part = count() - 1 - part;  // what was read last is in the caches
    const int64_t first = part * at_once_, end = std::min(of_.rows, first + at_once_), channels = of_.channels;
    const T *x = static_cast<const T*>(of_.x) + first * channels, *dy = static_cast<const T*>(of_.dy) + first * channels;
    T* dx = static_cast<T*>(of_.dx) + first * channels;
    const Sum *mean = numbers_.mean.data(), *factor = numbers_.factor.data(), *bias = numbers_.bias.data();
    for (int64_t row = first; row < end; ++row, x += channels, dy += channels, dx += channels)
      for_vectors<V, 1>(channels, [&](int64_t c, auto, auto is_part, int lanes) {
        constexpr bool part = decltype(is_part)::value;
        __builtin_prefetch(x + c + ahead);
        __builtin_prefetch(dy + c + ahead);
        V distance = subtract(load_last<V, part>(x + c, 0, 1, lanes), V::load(mean + c)), by = V::load(factor + c);
        V slope = behind_activation(distance, by, V::load(bias + c), load_last<V, part>(dy + c, 0, 1, lanes), limits);
        V value = fma(slope, by, fma(distance, V::load(slope_ + c), V::load(shift_ + c)));
        if (part)
          store_first(value, dx + c, lanes);
        else
          value.store(dx + c);
      });
  }

 private:
  const BatchNormGradient& of_;
  const Channels<V, Sum>& numbers_;
  const Sum *slope_, *shift_;
  int64_t at_once_;
};

template <class V, class T, class Sum>
void batch_norm_of(const BatchNorm& of, Threads& threads) {
  {
    Moments<V, T> moments(of, threads.count());
    threads.run(moments.count(), moments);
    moments.finish(static_cast<Sum*>(of.mean), static_cast<Sum*>(of.var));
  }
  Normalized<V, T, Sum> normalized(of, threads.count());
  threads.run(normalized.count(), normalized);
}

template <class V, class T, class Sum>
void batch_norm_gradient_of(const BatchNormGradient& of, Threads& threads) {
  const Channels<V, Sum> channels(of.mean, of.var, of.scale, of.bias, of.epsilon, of.channels);
  Array<double> first(channels.width), second(channels.width);
  {
    Products<V, T, Sum> products(of, channels, threads.count());
    threads.run(products.count(), products);
    products.finish(first.data(), second.data());
  }
  Array<Sum> slope(channels.width), shift(channels.width);
  const double n = double(of.rows);
  for (int64_t c = 0; c < of.channels; ++c) {
    double deviation = double(channels.deviation.data()[c]), factor = double(channels.factor.data()[c]);
    static_cast<Sum*>(of.dbias)[c] = Sum(first.data()[c]);
    static_cast<Sum*>(of.dscale)[c] = Sum(second.data()[c] * deviation);
    slope.data()[c] = Sum(-(factor * deviation * deviation * second.data()[c] / n));
    shift.data()[c] = Sum(-(factor * first.data()[c] / n));
  }
  InputGradient<V, T, Sum> gradient(of, channels, slope.data(), shift.data(), threads.count());
  threads.run(gradient.count(), gradient);
}

}  // namespace

void batch_norm(const BatchNorm&, Threads&);
void batch_norm(const BatchNorm& of, Threads& threads) {
  Rounding rounding;
  switch (of.type) {
    case Type::f32: return batch_norm_of<Floats, float, float>(of, threads);
    case Type::f64: return batch_norm_of<Doubles, double, double>(of, threads);
    case Type::bf16: return batch_norm_of<Floats, bf16, float>(of, threads);
    case Type::f16: return batch_norm_of<Floats, f16, float>(of, threads);
  }
}

void batch_norm_gradient(const BatchNormGradient&, Threads&);
void batch_norm_gradient(const BatchNormGradient& of, Threads& threads) {
  Rounding rounding;
  switch (of.type) {
    case Type::f32: return batch_norm_gradient_of<Floats, float, float>(of, threads);
    case Type::f64: return batch_norm_gradient_of<Doubles, double, double>(of, threads);
    case Type::bf16: return batch_norm_gradient_of<Floats, bf16, float>(of, threads);
    case Type::f16: return batch_norm_gradient_of<Floats, f16, float>(of, threads);
  }
}

}  // namespace JAXDW_ISA
}  // namespace jaxdw
