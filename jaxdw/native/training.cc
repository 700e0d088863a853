// The rest of a training step: cross entropy, and a x + b y; compiled once for each instruction set.
//
// docs/arithmetic.md has the sequence of roundings.
#include <math.h>

#include <algorithm>
#include <type_traits>

#include "support.h"

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

double from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr double ln2_high = 0x1.62e42fefa39efp-1, ln2_low = 0x1.abc9e3b39803fp-56;

// e^x for x <= 0: x = k ln 2 + r, and Taylor's polynomial of degree 13 for e^r.
double exponential(double x) {
  if (!(x >= -746)) return x < 0 ? 0 : x;  // x is NaN in the second case
  constexpr double whole = 0x1.8p52;  // adding it leaves a whole number in the last bits
  double k = __builtin_fma(x, 0x1.71547652b82fep0, whole) - whole;
  double r = __builtin_fma(-k, ln2_low, __builtin_fma(-k, ln2_high, x));
  constexpr double divisors[] = {6227020800, 479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};
  double value = 0;
  for (double divisor : divisors) value = __builtin_fma(value, r, 1 / divisor);
  int64_t exponent = int64_t(k);
  if (exponent >= -1022) return value * from_bits(uint64_t(exponent + 1023) << 52);
  return value * from_bits(uint64_t(exponent + 1023 + 64) << 52) * 0x1p-64;  // subnormal: the last product rounds
}

// log x for x >= 1: x = 2^k (1 + f), and the series of 2 artanh(f / (2 + f)).
double logarithm(double x) {
  if (!(x < INFINITY)) return x;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  double k = double(int64_t(bits >> 52) - 1023);
  double f = from_bits((bits & 0xfffffffffffff) | 0x3ff0000000000000);
  if (f > 0x1.6a09e667f3bcdp0) f *= 0.5, k += 1;
  f -= 1;
  double t = f / (2 + f), square = t * t, series = 0;
  for (int n = 23; n > 1; n -= 2) series = __builtin_fma(series, square, 1.0 / n);
  double twice = 2 * t;
  double small = __builtin_fma(twice * square, series, k * ln2_low);
  return __builtin_fma(k, ln2_high, twice + small);
}

template <class V, class T>
double widened(T value) {
  if constexpr (std::is_same<T, float>::value || std::is_same<T, double>::value) {
    return double(value);
  } else {
    float all[V::lanes];
    load_first<V>(&value, 1).store(all);
    return double(all[0]);
  }
}

template <class V, class Sum, class T>
void store_one(double value, T* to) {
  store_first(V::splat(Sum(value)), to, 1);
}

template <class V, class T, class Sum>
void cross_entropy_of(const CrossEntropy& of) {
  const double rows = double(of.rows);
  const double by = of.ct ? widened<V>(*static_cast<const T*>(of.ct)) / rows : 0;
  Array<double> powers(of.classes);
  double loss = 0;
  for (int64_t row = 0; row < of.rows; ++row) {
    const T* logits = static_cast<const T*>(of.logits) + row * of.classes;
    double most = widened<V>(logits[0]), sum = 0;
    for (int64_t i = 1; i < of.classes; ++i) {
      double logit = widened<V>(logits[i]);
      if (logit > most) most = logit;
    }
    for (int64_t i = 0; i < of.classes; ++i) {
      powers.data()[i] = exponential(widened<V>(logits[i]) - most);
      sum += powers.data()[i];
    }
    const int64_t label = of.labels[row];
    const bool is_class = label >= 0 && label < of.classes;
    loss += is_class ? logarithm(sum) - (widened<V>(logits[label]) - most) : NAN;
    if (!of.ct) continue;
    T* to = static_cast<T*>(of.result) + row * of.classes;
    for (int64_t i = 0; i < of.classes; ++i) {
      double share = powers.data()[i] / sum - (i == label ? 1 : 0);
      store_one<V, Sum>(is_class ? share * by : NAN, to + i);
    }
  }
  if (!of.ct) store_one<V, Sum>(loss / rows, static_cast<T*>(of.result));
}

template <class V, class T, class Sum>
class AxpbyParts : public Parts {
  static constexpr int64_t at_once = 1 << 16;

 public:
  explicit AxpbyParts(const Axpby& of) : of_(of) {}

  int64_t count() const { return (of_.count + at_once - 1) / at_once; }

  void run(int64_t part) override {
    Rounding rounding;
    const Sum* factors = static_cast<const Sum*>(of_.factors);
    const V a = V::splat(factors[0]), b = V::splat(factors[1]);
    const T *x = static_cast<const T*>(of_.x), *y = static_cast<const T*>(of_.y);
    T* to = static_cast<T*>(of_.result);
    int64_t i = part * at_once, end = std::min(of_.count, i + at_once);
    for (; i + V::lanes <= end; i += V::lanes) fma(a, V::load(x + i), multiply(b, V::load(y + i))).store(to + i);
    int lanes = int(end - i);
    if (lanes) store_first(fma(a, load_first<V>(x + i, lanes), multiply(b, load_first<V>(y + i, lanes))), to + i, lanes);
  }

 private:
  const Axpby& of_;
};

template <class V, class T, class Sum>
void axpby_of(const Axpby& of, Threads& threads) {
  AxpbyParts<V, T, Sum> parts(of);
  threads.run(parts.count(), parts);
}

}  // namespace

void cross_entropy(const CrossEntropy&, Threads&);
void cross_entropy(const CrossEntropy& of, Threads&) {
  Rounding rounding;
  switch (of.type) {
    case Type::f32: return cross_entropy_of<Floats, float, float>(of);
    case Type::f64: return cross_entropy_of<Doubles, double, double>(of);
    case Type::bf16: return cross_entropy_of<Floats, bf16, float>(of);
    case Type::f16: return cross_entropy_of<Floats, f16, float>(of);
  }
}

void axpby(const Axpby&, Threads&);
void axpby(const Axpby& of, Threads& threads) {
  switch (of.type) {
    case Type::f32: return axpby_of<Floats, float, float>(of, threads);
    case Type::f64: return axpby_of<Doubles, double, double>(of, threads);
    case Type::bf16: return axpby_of<Floats, bf16, float>(of, threads);
    case Type::f16: return axpby_of<Floats, f16, float>(of, threads);
  }
}

}  // namespace JAXDW_ISA
}  // namespace jaxdw
