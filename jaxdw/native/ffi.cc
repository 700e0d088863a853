// The kernels as handlers of XLA's foreign function interface.
#include <algorithm>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "kernels.h"
#include "order.h"
#include "pages.h"
#include "work.h"
#include "xla/ffi/api/ffi.h"

namespace jaxdw {
namespace {

namespace ffi = xla::ffi;

// XLA's own pool. The calling thread takes parts as the pool's threads do, and waits only for parts that have begun:
// so it never waits for a thread that is not running, however many callers there are.
class PoolThreads : public Threads {
 public:
  explicit PoolThreads(ffi::ThreadPool& pool) : pool_(pool) {
    static const int64_t cores = std::thread::hardware_concurrency();  // reads a file
    count_ = std::max<int64_t>(1, std::min(pool_.num_threads(), cores));
  }

  int64_t count() const override { return count_; }

  void run(int64_t count, Parts& parts) override {
    auto work = std::make_shared<Work>(count, parts);
    for (int64_t i = 1; i < count_ && i < count; ++i) pool_.Schedule([work] { work->take(); });
    work->take();
    work->wait();
  }

 private:
  ffi::ThreadPool& pool_;
  int64_t count_;
};

using Dimensions = ffi::Span<const int64_t>;

std::string text(Dimensions sizes) {
  std::string all = "(";
  for (int64_t size : sizes) all += (all.size() > 1 ? ", " : "") + std::to_string(size);
  return all + ")";
}

struct Problem {
  std::string what;
};

// To make the words takes longer than to compute a small layer. So they are made only where they are needed.
#define EXPECT(holds, words) \
  if (!(holds)) throw Problem { words }

std::string quoted(const char* name) { return "`" + std::string(name) + "`"; }

void* written(ffi::AnyBuffer result) {
  ask_for_large_pages(result.untyped_data(), result.size_bytes());
  return result.untyped_data();
}

// Sizes and factors are below this, so that no position overflows.
constexpr int64_t most = int64_t{1} << 30;

// One number for each of `rank` spatial axes; missing leading axes have `one`.
void read(const char* name, Dimensions given, size_t rank, int64_t one, int64_t least, int64_t (&to)[3]) {
  EXPECT(given.size() == rank, quoted(name) + " has " + std::to_string(given.size()) +
                                   " numbers, expected one for each of " + std::to_string(rank) + " spatial axes");
  std::fill(to, to + 3, one);
  for (size_t axis = 0; axis < rank; ++axis) {
    EXPECT(given[axis] >= least && given[axis] < most,
           quoted(name) + " is " + text(given) + ", expected numbers from " + std::to_string(least) +
               " to " + std::to_string(most - 1));
    to[3 - rank + axis] = given[axis];
  }
}

Type type_of(const char* name, ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: return Type::f32;
    case ffi::DataType::F64: return Type::f64;
    case ffi::DataType::BF16: return Type::bf16;
    case ffi::DataType::F16: return Type::f16;
    default: throw Problem{quoted(name) + " has an element type that is none of f32, f64, bf16, f16"};
  }
}

// The number of axes fits, and no size is 0 or so large that a position overflows.
void check_axes(const char* name, Dimensions sizes, bool fits, const std::string& expected) {
  EXPECT(fits, quoted(name) + " has shape " + text(sizes) + ", expected " + expected + " axes");
  for (int64_t size : sizes)
    EXPECT(size > 0 && size < most * 2, quoted(name) + " has shape " + text(sizes) +
                                            ", expected sizes from 1 to " + std::to_string(most * 2 - 1));
}

// x (*batch, *in, channels), the array of the kernel's sizes (*kernel, 1, channels), and y's (*batch, *out, channels).
// There is a stride for each spatial axis.
Geometry geometry_of(ffi::AnyBuffer x, const char* kernel_name, ffi::AnyBuffer kernel, const char* y_name,
                     ffi::AnyBuffer y, Dimensions strides, Dimensions padding, Dimensions kernel_dilation,
                     Dimensions input_dilation) {
  Geometry g;
  size_t rank = strides.size();
  EXPECT(rank >= 1 && rank <= 3, "`strides` has " + std::to_string(rank) + " numbers, expected 1 to 3");
  Dimensions in = x.dimensions(), taps = kernel.dimensions(), out = y.dimensions();
  check_axes("x", in, in.size() > rank, "more than " + std::to_string(rank));
  check_axes(kernel_name, taps, taps.size() == rank + 2, std::to_string(rank + 2));
  check_axes(y_name, out, out.size() == in.size(), std::to_string(in.size()));
  auto same = [&](const char* name, int64_t value, int64_t expected, Dimensions sizes, const char* of) {
    EXPECT(value == expected, quoted(name) + " has shape " + text(sizes) + ", expected " +
                                  std::to_string(expected) + " " + of + ", as `x` " + text(in));
  };
  size_t batch = in.size() - rank - 1;
  g.images = 1;
  for (size_t axis = 0; axis < batch; ++axis) {
    same(y_name, out[axis], in[axis], out, "images");
    g.images *= in[axis];
  }
  for (size_t axis = 0; axis < 3; ++axis) {
    bool missing = axis < 3 - rank;
    size_t at = axis - (3 - rank);
    g.in[axis] = missing ? 1 : in[batch + at];
    g.out[axis] = missing ? 1 : out[batch + at];
    g.kernel[axis] = missing ? 1 : taps[at];
  }
  g.channels = in[batch + rank];
  same(kernel_name, taps[rank + 1], g.channels, taps, "channels");
  same(y_name, out[batch + rank], g.channels, out, "channels");
  EXPECT(taps[rank] == 1, quoted(kernel_name) + " has shape " + text(taps) + ", expected 1 before the last");
  read("strides", strides, rank, 1, 1, g.strides);
  read("padding", padding, rank, 0, -most + 1, g.padding);
  read("kernel_dilation", kernel_dilation, rank, 1, 1, g.kernel_dilation);
  read("input_dilation", input_dilation, rank, 1, 1, g.input_dilation);
  Type type = type_of("x", x);
  auto same_type = [type](const char* name, ffi::AnyBuffer buffer) {
    EXPECT(type_of(name, buffer) == type, quoted(name) + " has another element type than `x`");
  };
  same_type(kernel_name, kernel);
  same_type(y_name, y);
  return g;
}

template <class Of>
ffi::Error checked(Of of) {
  try {
    EXPECT(kernels_of(nullptr) != nullptr, "JAXDW_ISA names instructions that this processor or library has not");
    of();
    return ffi::Error::Success();
  } catch (const Problem& problem) {
    return ffi::Error::InvalidArgument("jaxdw: " + problem.what);
  } catch (const std::invalid_argument& problem) {
    return ffi::Error::InvalidArgument(std::string("jaxdw: ") + problem.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxdw: out of memory");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("jaxdw: ") + error.what());
  }
}

// The data of one of the operands after the first two.
const void* operand(ffi::RemainingArgs rest, size_t number, const char* name, Dimensions sizes, Type type) {
  auto given = rest.get<ffi::AnyBuffer>(number);
  EXPECT(given.has_value(), quoted(name) + " is no array");
  Dimensions is = given->dimensions();
  EXPECT(is.size() == sizes.size() && std::equal(is.begin(), is.end(), sizes.begin()),
         quoted(name) + " has shape " + text(is) + ", expected " + text(sizes));
  EXPECT(type_of(name, *given) == type, quoted(name) + " has another element type than expected beside `x`");
  return given->untyped_data();
}

// The operands after the first two: bias if there is one more than the others, scale and shift, residual.
struct Rest {
  const void *bias = nullptr, *scale = nullptr, *shift = nullptr, *residual = nullptr;
  Activation activation;

  Rest(ffi::RemainingArgs rest, int64_t channels, Dimensions y, Type type, bool scaled, bool has_residual,
       int64_t number) {
    size_t next = 0, others = 2 * scaled + has_residual;
    EXPECT(rest.size() == others || rest.size() == others + 1,
           "there are " + std::to_string(rest.size() + 2) + " operands, expected " + std::to_string(others + 2) +
               ", or one more with a bias");
    Dimensions of_channels(&channels, 1);
    if (rest.size() > others) bias = operand(rest, next++, "bias", of_channels, type);
    if (scaled) {
      Type sum = type == Type::f64 ? Type::f64 : Type::f32;
      scale = operand(rest, next++, "scale", of_channels, sum);
      shift = operand(rest, next++, "shift", of_channels, sum);
    }
    if (has_residual) residual = operand(rest, next++, "residual", y, type);
    EXPECT(number >= 0 && number <= 5, "`activation` is " + std::to_string(number) + ", expected a number from 0 to 5");
    activation = Activation(number);
  }
};

ffi::Error conv(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::RemainingArgs rest,
                ffi::Result<ffi::AnyBuffer> y, Dimensions strides, Dimensions padding, Dimensions kernel_dilation,
                Dimensions input_dilation, bool bias_last, bool flipped, bool from_last_tap, bool scaled, bool residual,
                int64_t activation) {
  return checked([&] {
    Geometry g = geometry_of(x, "kernel", kernel, "y", *y, strides, padding, kernel_dilation, input_dilation);
    g.from_last_tap = from_last_tap;
    Conv conv{g, type_of("x", x), Bias::none, x.untyped_data(), kernel.untyped_data(), nullptr, written(*y), flipped};
    Rest given(rest, g.channels, y->dimensions(), conv.type, scaled, residual, activation);
    if (given.bias) conv.bias_place = bias_last ? Bias::last : Bias::first;
    conv.bias = given.bias;
    conv.scale = given.scale, conv.shift = given.shift, conv.residual = given.residual;
    conv.activation = given.activation;
    PoolThreads threads(pool);
    kernels_of(nullptr)->conv(conv, threads);
  });
}

ffi::Error kernel_gradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                           ffi::Result<ffi::AnyBuffer> gradient, Dimensions strides, Dimensions padding,
                           Dimensions kernel_dilation, Dimensions input_dilation) {
  return checked([&] {
    Geometry g =
        geometry_of(x, "gradient", *gradient, "dy", dy, strides, padding, kernel_dilation, input_dilation);
    PoolThreads threads(pool);
    kernels_of(nullptr)->kernel_gradient(
        {g, type_of("x", x), x.untyped_data(), dy.untyped_data(), gradient->untyped_data()}, threads);
  });
}

// x (rows, terms) and w (terms, columns), or transposed; either or both with an axis of products before these two.
ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                  ffi::Result<ffi::AnyBuffer> y, Dimensions steps, bool x_transposed, bool w_transposed, bool scaled,
                  bool residual, int64_t activation, double divisor) {
  return checked([&] {
    Dimensions of_x = x.dimensions(), of_w = w.dimensions(), of_y = y->dimensions();
    check_axes("x", of_x, of_x.size() == 2 || of_x.size() == 3, "2 or 3");
    check_axes("w", of_w, of_w.size() == 2 || of_w.size() == 3, "2 or 3");
    size_t x_is_batch = of_x.size() - 2, w_is_batch = of_w.size() - 2, is_batch = std::max(x_is_batch, w_is_batch);
    check_axes("y", of_y, of_y.size() == 2 + is_batch, std::to_string(2 + is_batch));
    const int64_t *x_sizes = of_x.begin() + x_is_batch, *w_sizes = of_w.begin() + w_is_batch;
    Matmul matmul{};
    matmul.batch = x_is_batch ? of_x[0] : w_is_batch ? of_w[0] : 1;
    matmul.rows = x_sizes[x_transposed], matmul.terms = x_sizes[!x_transposed], matmul.columns = w_sizes[!w_transposed];
    matmul.x_batch = x_is_batch ? matmul.rows * matmul.terms : 0;
    matmul.w_batch = w_is_batch ? matmul.terms * matmul.columns : 0;
    matmul.x_row = x_transposed ? 1 : matmul.terms, matmul.x_term = x_transposed ? matmul.rows : 1;
    matmul.w_term = w_transposed ? 1 : matmul.columns, matmul.w_column = w_transposed ? matmul.terms : 1;
    EXPECT(w_sizes[w_transposed] == matmul.terms && (!w_is_batch || of_w[0] == matmul.batch),
           "`w` has shape " + text(of_w) + ", expected " + std::to_string(matmul.terms) + " terms, as `x` " +
               text(of_x) + ", and as many products");
    EXPECT(of_y[is_batch] == matmul.rows && of_y[is_batch + 1] == matmul.columns &&
               (!is_batch || of_y[0] == matmul.batch),
           "`y` has shape " + text(of_y) + ", expected " + (is_batch ? std::to_string(matmul.batch) + " of " : "") +
               "(" + std::to_string(matmul.rows) + ", " + std::to_string(matmul.columns) + ")");
    matmul.type = type_of("x", x);
    EXPECT(type_of("w", w) == matmul.type, "`w` has another element type than `x`");
    EXPECT(type_of("y", *y) == matmul.type, "`y` has another element type than `x`");
    matmul.x = x.untyped_data(), matmul.w = w.untyped_data(), matmul.y = written(*y);
    Rest given(rest, matmul.columns, of_y, matmul.type, scaled, residual, activation);
    matmul.bias = given.bias;
    matmul.scale = given.scale, matmul.shift = given.shift, matmul.residual = given.residual;
    matmul.activation = given.activation, matmul.divisor = divisor;
    SumOrder order(steps.begin(), int64_t(steps.size()), matmul.terms, matmul.bias != nullptr);
    order.give_to(matmul);
    PoolThreads threads(pool);
    kernels_of(nullptr)->matmul(matmul, threads);
  });
}

// The data of a buffer of a type and a shape.
void* data_of(const char* name, ffi::AnyBuffer buffer, Dimensions sizes, Type type) {
  Dimensions is = buffer.dimensions();
  EXPECT(is.size() == sizes.size() && std::equal(is.begin(), is.end(), sizes.begin()),
         quoted(name) + " has shape " + text(is) + ", expected " + text(sizes));
  EXPECT(type_of(name, buffer) == type, quoted(name) + " has another element type than expected beside `x`");
  return buffer.untyped_data();
}

void* result_of(const char* name, ffi::AnyBuffer buffer, Dimensions sizes, Type type) {
  data_of(name, buffer, sizes, type);
  return written(buffer);
}

Type wide(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

// x (*batch, channels) as rows, with the settings that a normalization and its gradient share.
template <class Of>
void read_batch_norm(Of& of, ffi::AnyBuffer x, double epsilon, int64_t activation) {
  Dimensions sizes = x.dimensions();
  check_axes("x", sizes, sizes.size() >= 1, "1 or more");
  of.type = type_of("x", x), of.x = x.untyped_data(), of.channels = sizes.back(), of.rows = 1;
  for (size_t axis = 0; axis + 1 < sizes.size(); ++axis) of.rows *= sizes[axis];
  EXPECT(epsilon >= 0, "`epsilon` is " + std::to_string(epsilon) + ", expected 0 or more");
  of.epsilon = epsilon;
  EXPECT(activation >= 0 && activation <= 2,
         "`activation` is " + std::to_string(activation) + ", expected a number from 0 to 2");
  of.activation = Activation(activation);
}

ffi::Error batch_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                      ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> mean,
                      ffi::Result<ffi::AnyBuffer> var, double epsilon, int64_t activation) {
  return checked([&] {
    BatchNorm of{};
    read_batch_norm(of, x, epsilon, activation);
    Dimensions channels(&of.channels, 1);
    of.scale = data_of("scale", scale, channels, wide(of.type));
    of.bias = data_of("bias", bias, channels, wide(of.type));
    of.y = result_of("y", *y, x.dimensions(), of.type);
    of.mean = result_of("mean", *mean, channels, wide(of.type));
    of.var = result_of("var", *var, channels, wide(of.type));
    PoolThreads threads(pool);
    kernels_of(nullptr)->batch_norm(of, threads);
  });
}

ffi::Error batch_norm_gradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                               ffi::AnyBuffer mean, ffi::AnyBuffer var, ffi::AnyBuffer dy,
                               ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                               ffi::Result<ffi::AnyBuffer> dbias, double epsilon, int64_t activation) {
  return checked([&] {
    BatchNormGradient of{};
    read_batch_norm(of, x, epsilon, activation);
    Dimensions channels(&of.channels, 1);
    of.scale = data_of("scale", scale, channels, wide(of.type));
    of.bias = data_of("bias", bias, channels, wide(of.type));
    of.mean = data_of("mean", mean, channels, wide(of.type));
    of.var = data_of("var", var, channels, wide(of.type));
    of.dy = data_of("dy", dy, x.dimensions(), of.type);
    of.dx = result_of("dx", *dx, x.dimensions(), of.type);
    of.dscale = result_of("dscale", *dscale, channels, wide(of.type));
    of.dbias = result_of("dbias", *dbias, channels, wide(of.type));
    PoolThreads threads(pool);
    kernels_of(nullptr)->batch_norm_gradient(of, threads);
  });
}

// The loss of logits and labels; with a third operand, its gradient.
ffi::Error cross_entropy(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::AnyBuffer labels, ffi::RemainingArgs rest,
                         ffi::Result<ffi::AnyBuffer> result) {
  return checked([&] {
    CrossEntropy of{};
    Dimensions sizes = logits.dimensions(), of_labels = labels.dimensions();
    check_axes("logits", sizes, sizes.size() == 2, "2");
    of.rows = sizes[0], of.classes = sizes[1];
    of.type = type_of("logits", logits), of.logits = logits.untyped_data();
    EXPECT(of_labels.size() == 1 && of_labels[0] == of.rows,
           "`labels` has shape " + text(of_labels) + ", expected (" + std::to_string(of.rows) + ",)");
    EXPECT(labels.element_type() == ffi::DataType::S32, "`labels` has an element type that is not s32");
    of.labels = static_cast<const int32_t*>(labels.untyped_data());
    EXPECT(rest.size() < 2, "there are " + std::to_string(rest.size() + 2) + " operands, expected at most 3");
    if (rest.size()) of.ct = operand(rest, 0, "ct", Dimensions(&of.rows, 0), of.type);
    of.result = result_of("result", *result, rest.size() ? sizes : Dimensions(&of.rows, 0), of.type);
    PoolThreads threads(pool);
    kernels_of(nullptr)->cross_entropy(of, threads);
  });
}

ffi::Error axpby(ffi::ThreadPool pool, ffi::AnyBuffer factors, ffi::AnyBuffer x, ffi::AnyBuffer y,
                 ffi::Result<ffi::AnyBuffer> result) {
  return checked([&] {
    Axpby of{};
    Dimensions sizes = x.dimensions();
    check_axes("x", sizes, true, "any");
    of.count = int64_t(x.element_count());
    of.type = type_of("x", x), of.x = x.untyped_data();
    const int64_t two = 2;
    of.factors = data_of("factors", factors, Dimensions(&two, 1), wide(of.type));
    of.y = data_of("y", y, sizes, of.type);
    of.result = result_of("result", *result, sizes, of.type);
    PoolThreads threads(pool);
    kernels_of(nullptr)->axpby(of, threads);
  });
}

// x (rows, length, channels), state and next_state (rows, taps - 1, channels), kernel (taps, 1, channels); then a bias
// (channels) if `biased`, and ids (rows, taps - 1 + length) if there is one operand more.
ffi::Error causal(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer state, ffi::AnyBuffer kernel,
                  ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> next_state,
                  bool biased, int64_t activation) {
  return checked([&] {
    Causal of{};
    Dimensions in = x.dimensions(), taps = kernel.dimensions();
    check_axes("x", in, in.size() == 3, "3");
    check_axes("kernel", taps, taps.size() == 3, "3");
    of.rows = in[0], of.length = in[1], of.channels = in[2], of.taps = taps[0], of.type = type_of("x", x);
    int64_t of_state[] = {of.rows, of.taps - 1, of.channels}, of_kernel[] = {of.taps, 1, of.channels};
    int64_t of_ids[] = {of.rows, of.taps - 1 + of.length};
    of.x = x.untyped_data();
    of.state = data_of("state", state, Dimensions(of_state, 3), of.type);
    of.kernel = data_of("kernel", kernel, Dimensions(of_kernel, 3), of.type);
    of.y = result_of("y", *y, in, of.type);
    of.next_state = result_of("next_state", *next_state, Dimensions(of_state, 3), of.type);
    EXPECT(of.taps > 1, "`kernel` has 1 tap, expected 2 or more");
    EXPECT(rest.size() == size_t(biased) || rest.size() == size_t(biased) + 1,
           "there are " + std::to_string(rest.size() + 3) + " operands, expected " + std::to_string(3 + biased) +
               ", or one more with ids");
    if (biased) of.bias = operand(rest, 0, "bias", Dimensions(&of.channels, 1), of.type);
    if (rest.size() > size_t(biased)) {
      auto ids = rest.get<ffi::AnyBuffer>(biased);
      EXPECT(ids.has_value() && ids->element_type() == ffi::DataType::S32, "`ids` is no array of int32");
      Dimensions sizes = ids->dimensions();
      EXPECT(sizes.size() == 2 && std::equal(sizes.begin(), sizes.end(), of_ids),
             "`ids` has shape " + text(sizes) + ", expected " + text(Dimensions(of_ids, 2)));
      of.ids = static_cast<const int32_t*>(ids->untyped_data());
    }
    of.activation = Activation(activation);
    EXPECT(of.activation == Activation::none || of.activation == Activation::silu,
           "`activation` is " + std::to_string(activation) + ", expected 0 or 5");
    PoolThreads threads(pool);
    kernels_of(nullptr)->causal(of, threads);
  });
}

}  // namespace
}  // namespace jaxdw

#define JAXDW_EXPORT extern "C" __attribute__((visibility("default")))

XLA_FFI_DEFINE_HANDLER(conv_handler, jaxdw::conv,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .RemainingArgs()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Attr<jaxdw::Dimensions>("strides")
                           .Attr<jaxdw::Dimensions>("padding")
                           .Attr<jaxdw::Dimensions>("kernel_dilation")
                           .Attr<jaxdw::Dimensions>("input_dilation")
                           .Attr<bool>("bias_last")
                           .Attr<bool>("flipped")
                           .Attr<bool>("from_last_tap")
                           .Attr<bool>("scaled")
                           .Attr<bool>("residual")
                           .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER(kernel_gradient_handler, jaxdw::kernel_gradient,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Attr<jaxdw::Dimensions>("strides")
                           .Attr<jaxdw::Dimensions>("padding")
                           .Attr<jaxdw::Dimensions>("kernel_dilation")
                           .Attr<jaxdw::Dimensions>("input_dilation"));

XLA_FFI_DEFINE_HANDLER(matmul_handler, jaxdw::matmul,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .RemainingArgs()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Attr<jaxdw::Dimensions>("steps")
                           .Attr<bool>("x_transposed")
                           .Attr<bool>("w_transposed")
                           .Attr<bool>("scaled")
                           .Attr<bool>("residual")
                           .Attr<int64_t>("activation")
                           .Attr<double>("divisor"));

JAXDW_EXPORT XLA_FFI_Error* jaxdw_conv_ffi(XLA_FFI_CallFrame* frame) { return conv_handler(frame); }

JAXDW_EXPORT XLA_FFI_Error* jaxdw_kernel_gradient_ffi(XLA_FFI_CallFrame* frame) {
  return kernel_gradient_handler(frame);
}

JAXDW_EXPORT XLA_FFI_Error* jaxdw_matmul_ffi(XLA_FFI_CallFrame* frame) { return matmul_handler(frame); }

XLA_FFI_DEFINE_HANDLER(batch_norm_handler, jaxdw::batch_norm,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER(batch_norm_gradient_handler, jaxdw::batch_norm_gradient,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER(cross_entropy_handler, jaxdw::cross_entropy,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .RemainingArgs()
                           .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER(axpby_handler, jaxdw::axpby,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER(causal_handler, jaxdw::causal,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .RemainingArgs()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Ret<xla::ffi::AnyBuffer>()
                           .Attr<bool>("biased")
                           .Attr<int64_t>("activation"));

JAXDW_EXPORT XLA_FFI_Error* jaxdw_batch_norm_ffi(XLA_FFI_CallFrame* frame) { return batch_norm_handler(frame); }

JAXDW_EXPORT XLA_FFI_Error* jaxdw_batch_norm_gradient_ffi(XLA_FFI_CallFrame* frame) {
  return batch_norm_gradient_handler(frame);
}

JAXDW_EXPORT XLA_FFI_Error* jaxdw_cross_entropy_ffi(XLA_FFI_CallFrame* frame) { return cross_entropy_handler(frame); }

JAXDW_EXPORT XLA_FFI_Error* jaxdw_axpby_ffi(XLA_FFI_CallFrame* frame) { return axpby_handler(frame); }

JAXDW_EXPORT XLA_FFI_Error* jaxdw_causal_ffi(XLA_FFI_CallFrame* frame) { return causal_handler(frame); }
