// What is done to sums before they are rounded and stored, for the instruction set of the translation unit.
#ifndef JAXDW_NATIVE_EPILOGUE_H_
#define JAXDW_NATIVE_EPILOGUE_H_

#include <math.h>
#include <string.h>

#include <algorithm>

#include "simd.h"

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// The constants of exp(z) = 2^n * exp(r), r = z - n * ln 2: `magic` rounds to a whole number, which its last bits then
// are. Where |z| > most, the result is 0 or infinity.
template <class Sum>
struct Exponential;
template <>
struct Exponential<float> {
  using Bits = uint32_t;  // their sums wrap
  static constexpr float magic = 0x1.8p23f, per_ln2 = 0x1.715476p0f, ln2 = 0x1.62e4p-1f, ln2_rest = 0x1.7f7d1cp-20f;
  static constexpr float most = 120.0f;
  static constexpr int fraction = 23, bias = 127, degree = 7;
};
template <>
struct Exponential<double> {
  using Bits = uint64_t;
  static constexpr double magic = 0x1.8p52, per_ln2 = 0x1.71547652b82fep0;
  static constexpr double ln2 = 0x1.62e42fefap-1, ln2_rest = 0x1.cf79abc9e3b3ap-40, most = 760.0;
  static constexpr int fraction = 52, bias = 1023, degree = 13;
};

template <class Sum>
JAXDW_INLINE typename Exponential<Sum>::Bits bits_of(Sum value) {
  typename Exponential<Sum>::Bits bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 2^n for n that fits.
template <class Sum>
JAXDW_INLINE Sum power_of_two(typename Exponential<Sum>::Bits n) {
  using E = Exponential<Sum>;
  typename E::Bits bits = (n + E::bias) << E::fraction;
  Sum value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// 1 / k!, rounded once: k! is exact in Sum.
template <class Sum>
struct Factorials {
  Sum of[Exponential<Sum>::degree + 1];
  constexpr Factorials() : of() {
    Sum factorial = 1;
    for (int k = 0; k <= Exponential<Sum>::degree; ++k) {
      if (k) factorial *= Sum(k);
      of[k] = Sum(1) / factorial;
    }
  }
};

// s / (1 + exp(-s)). docs/arithmetic.md states each operation.
template <class Sum>
JAXDW_INLINE Sum silu(Sum s) {
  using E = Exponential<Sum>;
  Sum z = -s;
  z = z > E::most ? E::most : z;
  z = z < -E::most ? -E::most : z;
  Sum shifted = fused(z, E::per_ln2, E::magic), n = shifted - E::magic;
  Sum r = fused(n, -E::ln2_rest, fused(n, -E::ln2, z));
  constexpr Factorials<Sum> inverse;
  Sum sum = inverse.of[E::degree];
#pragma GCC unroll 16
  for (int k = E::degree - 1; k >= 0; --k) sum = fused(sum, r, inverse.of[k]);
  Sum half_shifted = fused(n, Sum(0.5), E::magic);
  auto half = bits_of(half_shifted) - bits_of(E::magic), rest = bits_of(shifted) - bits_of(E::magic) - half;
  return s / (1 + sum * power_of_two<Sum>(half) * power_of_two<Sum>(rest));
}

// The residual of an output is as far from `residual` as the output from `y`.
template <class T, class Sum>
struct Epilogue {
  const Sum *scale, *shift;
  const T *y, *residual;
  Activation activation;
  Sum divisor = 1;
};

// What takes an operation of its own for each number; the rest is a choice of the limits.
enum class Kind { clamps, divides, silu };

// Does it to the sums of some outputs, for channels from `c` on.
template <class V, Kind kind, class T, class Sum>
JAXDW_INLINE void finish_as(const Epilogue<T, Sum>& epilogue, const Sum* sums, int64_t sums_step, int64_t outputs,
                            int64_t c, int64_t channels, T* y, int64_t y_step) {
  Activation activation = epilogue.activation;
  V six = V::splat(6), three = V::splat(3), zero = V::zero(), divisor = V::splat(epilogue.divisor);
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
      if (kind != Kind::clamps) sum = divide(sum, divisor);
      if (epilogue.scale) sum = fma(sum, scale, shift);
      if (epilogue.residual) sum = add(sum, load(epilogue.residual + (to - epilogue.y)));
      if (kind == Kind::divides && (activation == Activation::hard_swish || activation == Activation::hard_sigmoid)) {
        V gate = at_most(six, at_least(zero, add(sum, three)));
        sum = divide(activation == Activation::hard_swish ? multiply(sum, gate) : gate, six);
      } else if (kind == Kind::silu) {
        alignas(64) Sum all[V::lanes];
        sum.store(all);
        for (int i = 0; i < V::lanes; ++i) all[i] = silu(all[i]);
        sum = V::load(all);
      } else {
        sum = at_most(most, at_least(least, sum));
      }
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
  Activation activation = epilogue.activation;
  auto as = finish_as<V, Kind::clamps, T, Sum>;
  if (epilogue.divisor != 1 || activation == Activation::hard_swish || activation == Activation::hard_sigmoid)
    as = finish_as<V, Kind::divides, T, Sum>;
  if (activation == Activation::silu) as = finish_as<V, Kind::silu, T, Sum>;
  as(epilogue, sums, sums_step, outputs, c, channels, y, y_step);
}

}  // namespace
}  // namespace JAXDW_ISA
}  // namespace jaxdw

#endif  // JAXDW_NATIVE_EPILOGUE_H_
