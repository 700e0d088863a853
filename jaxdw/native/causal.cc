// The causal convolution of streams and of packed sequences, compiled once for each instruction set.
//
// Each sum is that of the convolution: one chain from the bias, in the order of time. A tap that reads another sequence
// is skipped, as padding is.
#include <algorithm>
#include <vector>

#include "epilogue.h"
#include "support.h"

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

// Products from which other threads take part; SiLU counts as `silu_products`.
constexpr int64_t least_shared = 1 << 20, silu_products = 16;

template <class V, class T, class Sum>
class CausalParts : public Parts {
  static constexpr int64_t at_once = 4;  // vectors of channels whose sums are in registers

 public:
  CausalParts(const Causal& of, int64_t threads) : of_(of) {
    outputs_ = of.rows * of.length;
    int64_t work = outputs_ * of.channels * (of.taps + (of.activation == Activation::silu ? silu_products : 0));
    parts_ = work < least_shared ? 1 : std::min(outputs_, 8 * threads);
  }

  int64_t count() const { return parts_; }

  void run(int64_t part) override {
    Rounding rounding;
    int64_t begin = outputs_ * part / parts_, end = outputs_ * (part + 1) / parts_;
    std::vector<Tap> taps;
    taps.reserve(of_.taps);
    for (int64_t output = begin; output < end; ++output) {
      int64_t row = output / of_.length, time = output % of_.length;
      T* y = static_cast<T*>(of_.y) + output * of_.channels;
      if (!taps_of(row, time, taps))
        std::fill(y, y + of_.channels, T{});
      else
        sums_of(taps, y);
      if (time == of_.length - 1) keep(row);
    }
  }

 private:
  struct Tap {
    const T* x;
    int64_t w;
  };

  const T* input(int64_t row, int64_t position) const {
    int64_t before = of_.taps - 1;
    return position < before ? static_cast<const T*>(of_.state) + (row * before + position) * of_.channels
                             : static_cast<const T*>(of_.x) + (row * of_.length + position - before) * of_.channels;
  }

  // The taps of an output that read its own sequence; false if it is padding.
  bool taps_of(int64_t row, int64_t time, std::vector<Tap>& taps) const {
    const int32_t* ids = of_.ids ? of_.ids + row * (of_.taps - 1 + of_.length) + time : nullptr;
    if (ids && ids[of_.taps - 1] < 0) return false;
    taps.clear();
    for (int64_t k = 0; k < of_.taps; ++k)
      if (!ids || ids[k] == ids[of_.taps - 1]) taps.push_back({input(row, time + k), k * of_.channels});
    return true;
  }

  void sums_of(const std::vector<Tap>& taps, T* y) const {
    int64_t c = 0;
    for (; c + at_once * V::lanes <= of_.channels; c += at_once * V::lanes) tile<at_once, false>(taps, c, 0, y);
    for (; c + V::lanes <= of_.channels; c += V::lanes) tile<1, false>(taps, c, 0, y);
    if (c < of_.channels) tile<1, true>(taps, c, int(of_.channels - c), y);
  }

  template <int CV, bool part>
  JAXDW_INLINE void tile(const std::vector<Tap>& taps, int64_t c, int lanes, T* y) const {
    V sums[CV];
#pragma GCC unroll 16
    for (int v = 0; v < CV; ++v)  // a bias of -0 becomes +0, as if zeros had been added to it
      sums[v] = of_.bias ? add(load_last<V, part>(bias() + c, v, CV, lanes), V::zero()) : V::zero();
    for (const Tap& tap : taps) {
#pragma GCC unroll 16
      for (int v = 0; v < CV; ++v)
        sums[v] = fma(load_last<V, part>(tap.x + c, v, CV, lanes), load_last<V, part>(weights() + tap.w + c, v, CV, lanes),
                      sums[v]);
    }
    if (of_.activation == Activation::none) {
#pragma GCC unroll 16
      for (int v = 0; v < CV; ++v) {
        if (part)
          store_first(sums[v], y + c, lanes);
        else
          sums[v].store(y + c + v * V::lanes);
      }
      return;
    }
    constexpr int64_t width = CV * V::lanes;
    alignas(64) Sum stored[width];
#pragma GCC unroll 16
    for (int v = 0; v < CV; ++v) sums[v].store(stored + v * V::lanes);
    Epilogue<T, Sum> epilogue = {nullptr, nullptr, y, nullptr, of_.activation};
    finish<V>(epilogue, stored, width, 1, c, part ? lanes : width, y, 0);
  }

  const T* weights() const { return static_cast<const T*>(of_.kernel); }
  const T* bias() const { return static_cast<const T*>(of_.bias); }

  // Writes the last inputs of a row.
  void keep(int64_t row) const {
    int64_t before = of_.taps - 1;
    T* to = static_cast<T*>(of_.next_state) + row * before * of_.channels;
    for (int64_t position = 0; position < before; ++position)
      memcpy(to + position * of_.channels, input(row, of_.length + position), of_.channels * sizeof(T));
  }

  const Causal of_;
  int64_t outputs_, parts_;
};

template <class V, class T, class Sum>
void causal_of(const Causal& of, Threads& threads) {
  CausalParts<V, T, Sum> parts(of, threads.count());
  threads.run(parts.count(), parts);
}

}  // namespace

void causal(const Causal&, Threads&);
void causal(const Causal& of, Threads& threads) {
  switch (of.type) {
    case Type::f32: return causal_of<Floats, float, float>(of, threads);
    case Type::f64: return causal_of<Doubles, double, double>(of, threads);
    case Type::bf16: return causal_of<Floats, bf16, float>(of, threads);
    case Type::f16: return causal_of<Floats, f16, float>(of, threads);
  }
}

}  // namespace JAXDW_ISA
}  // namespace jaxdw
