// What is done to sums before they are rounded and stored, for the instruction set of the translation unit.
#ifndef JAXDW_NATIVE_EPILOGUE_H_
#define JAXDW_NATIVE_EPILOGUE_H_

#include <math.h>

#include <algorithm>

#include "simd.h"

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

// The residual of an output is as far from `residual` as the output from `y`.
template <class T, class Sum>
struct Epilogue {
  const Sum *scale, *shift;
  const T *y, *residual;
  Activation activation;
  Sum divisor = 1;
};

// Does it to the sums of some outputs, for channels from `c` on.
template <class V, bool divides, class T, class Sum>
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
      if (divides) sum = divide(sum, divisor);
      if (epilogue.scale) sum = fma(sum, scale, shift);
      if (epilogue.residual) sum = add(sum, load(epilogue.residual + (to - epilogue.y)));
      if (divides && (activation == Activation::hard_swish || activation == Activation::hard_sigmoid)) {
        V gate = at_most(six, at_least(zero, add(sum, three)));
        sum = divide(activation == Activation::hard_swish ? multiply(sum, gate) : gate, six);
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
  if (epilogue.divisor != 1 || activation == Activation::hard_swish || activation == Activation::hard_sigmoid)
    finish_as<V, true>(epilogue, sums, sums_step, outputs, c, channels, y, y_step);
  else
    finish_as<V, false>(epilogue, sums, sums_step, outputs, c, channels, y, y_step);
}

}  // namespace
}  // namespace JAXDW_ISA
}  // namespace jaxdw

#endif  // JAXDW_NATIVE_EPILOGUE_H_
