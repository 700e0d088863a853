// The kernels as C functions on addresses, for other callers than XLA.
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"
#include "order.h"
#include "work.h"

namespace jaxdw {
namespace {

class OwnThreads : public Threads {
 public:
  explicit OwnThreads(int64_t count) : count_(count) {}
  int64_t count() const override { return count_; }

  void run(int64_t count, Parts& parts) override {
    Work work(count, parts);
    std::vector<std::thread> helpers;
    try {
      for (int64_t i = 1; i < count_ && i < count; ++i) helpers.emplace_back([&work] { work.take(); });
    } catch (const std::system_error&) {  // no more threads: those that there are do all
    }
    work.take();
    for (std::thread& helper : helpers) helper.join();
    work.wait();
  }

 private:
  int64_t count_;
};

// images, channels, three numbers each: in, kernel, out, strides, padding, kernel dilation, input dilation; and whether
// the taps are added from the last on
Geometry geometry_of(const int64_t* numbers) {
  Geometry g;
  g.images = *numbers++;
  g.channels = *numbers++;
  for (auto* to : {&g.in, &g.kernel, &g.out, &g.strides, &g.padding, &g.kernel_dilation, &g.input_dilation})
    for (int64_t& value : *to) value = *numbers++;
  g.from_last_tap = *numbers != 0;
  return g;
}

// 0, or 1: there are no kernels of this instruction set, 2: out of memory, 3: another failure.
template <class Of>
int checked(const char* isa, int64_t threads, Of of) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels) return 1;
  try {
    OwnThreads own(threads);
    of(*kernels, own);
    return 0;
  } catch (const std::bad_alloc&) {
    return 2;
  } catch (...) {
    return 3;
  }
}

}  // namespace
}  // namespace jaxdw

#define JAXDW_EXPORT extern "C" __attribute__((visibility("default")))

// type: 0 float32, 1 float64, 2 bfloat16, 3 float16. Without an instruction set it is that of JAXDW_ISA, or the widest.
// activation: 0 none, 1 ReLU, 2 ReLU6, 3 hard swish, 4 hard sigmoid, 5 SiLU. scale, shift and residual may be nullptr, the
// first two together.
JAXDW_EXPORT int jaxdw_conv(const char* isa, int64_t threads, int type, const int64_t* geometry, const void* x,
                            const void* kernel, const void* bias, int bias_last, const void* scale, const void* shift,
                            const void* residual, int activation, void* y) {
  using namespace jaxdw;
  Bias place = !bias ? Bias::none : bias_last ? Bias::last : Bias::first;
  Conv conv{geometry_of(geometry), Type(type), place, x, kernel, bias, y};
  conv.scale = scale;
  conv.shift = shift;
  conv.residual = residual;
  conv.activation = Activation(activation);
  return checked(isa, threads, [&](const Kernels& kernels, Threads& own) { kernels.conv(conv, own); });
}

JAXDW_EXPORT int jaxdw_kernel_gradient(const char* isa, int64_t threads, int type, const int64_t* geometry,
                                       const void* x, const void* dy, void* gradient) {
  using namespace jaxdw;
  KernelGradient of{geometry_of(geometry), Type(type), x, dy, gradient};
  return checked(isa, threads, [&](const Kernels& kernels, Threads& own) { kernels.kernel_gradient(of, own); });
}

// sizes: batch, rows, terms, columns; strides: of x by image, row and term, of w by image, term and column; steps: the
// program of `count` steps that adds, as jaxdw/sum_order.py has it. The rest is as for `jaxdw_conv`.
JAXDW_EXPORT int jaxdw_matmul(const char* isa, int64_t threads, int type, const int64_t* sizes, const int64_t* strides,
                              const int64_t* steps, int64_t count, const void* x, const void* w, const void* bias,
                              const void* scale, const void* shift, const void* residual, int activation,
                              double divisor, void* y) {
  using namespace jaxdw;
  return checked(isa, threads, [&](const Kernels& kernels, Threads& own) {
    SumOrder order(steps, count, sizes[2], bias != nullptr);
    Matmul of{sizes[0],   sizes[1],   sizes[2],   sizes[3],   strides[0], strides[1], strides[2], strides[3],
              strides[4], strides[5], Type(type), x,          w,          bias,       y};
    order.give_to(of);
    of.scale = scale;
    of.shift = shift;
    of.residual = residual;
    of.activation = Activation(activation);
    of.divisor = divisor;
    kernels.matmul(of, own);
  });
}

// rows and channels; activation: 0 none, 1 ReLU, 2 ReLU6. y, mean and var are written.
JAXDW_EXPORT int jaxdw_batch_norm(const char* isa, int64_t threads, int type, int64_t rows, int64_t channels,
                                  double epsilon, int activation, const void* x, const void* scale, const void* bias,
                                  void* y, void* mean, void* var) {
  using namespace jaxdw;
  BatchNorm of{rows, channels, Type(type), epsilon, Activation(activation), x, scale, bias, y, mean, var};
  return checked(isa, threads, [&](const Kernels& kernels, Threads& own) { kernels.batch_norm(of, own); });
}

// dx, dscale and dbias are written.
JAXDW_EXPORT int jaxdw_batch_norm_gradient(const char* isa, int64_t threads, int type, int64_t rows, int64_t channels,
                                           double epsilon, int activation, const void* x, const void* scale,
                                           const void* bias, const void* mean, const void* var, const void* dy,
                                           void* dx, void* dscale, void* dbias) {
  using namespace jaxdw;
  BatchNormGradient of{rows, channels, Type(type), epsilon, Activation(activation), x, scale, bias,
                       mean, var,      dy,         dx,      dscale,                 dbias};
  return checked(isa, threads, [&](const Kernels& kernels, Threads& own) { kernels.batch_norm_gradient(of, own); });
}

// Writes the loss, one number; with `ct`, one number, the gradient by the logits.
JAXDW_EXPORT int jaxdw_cross_entropy(const char* isa, int64_t threads, int type, int64_t rows, int64_t classes,
                                     const void* logits, const int32_t* labels, const void* ct, void* result) {
  using namespace jaxdw;
  CrossEntropy of{rows, classes, Type(type), logits, labels, ct, result};
  return checked(isa, threads, [&](const Kernels& kernels, Threads& own) { kernels.cross_entropy(of, own); });
}

JAXDW_EXPORT int jaxdw_axpby(const char* isa, int64_t threads, int type, int64_t count, const void* factors,
                             const void* x, const void* y, void* result) {
  using namespace jaxdw;
  Axpby of{count, Type(type), factors, x, y, result};
  return checked(isa, threads, [&](const Kernels& kernels, Threads& own) { kernels.axpby(of, own); });
}

// The name of an instruction set's kernels (the default one's for nullptr), or nullptr where there are none.
JAXDW_EXPORT const char* jaxdw_isa(const char* isa) {
  const jaxdw::Kernels* kernels = jaxdw::kernels_of(isa);
  return kernels ? jaxdw::name_of(kernels) : nullptr;
}
