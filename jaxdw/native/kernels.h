// The depthwise convolution, the gradient by its kernel, and matrix products: what is computed, and the table of one
// instruction set.
//
// docs/arithmetic.md states each sequence of roundings. Nothing here depends on XLA or on PyTorch.
#ifndef JAXDW_NATIVE_KERNELS_H_
#define JAXDW_NATIVE_KERNELS_H_

#include <cstdint>

namespace jaxdw {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Type { f32, f64, bf16, f16 };
enum class Bias { none, first, last };
enum class Activation { none, relu, relu6, hard_swish, hard_sigmoid, silu };

// Three spatial axes; a convolution of fewer has leading axes of size 1. All arrays are dense, channels last.
struct Geometry {
  int64_t images, channels;
  int64_t in[3], kernel[3], out[3];
  int64_t strides[3], padding[3], kernel_dilation[3], input_dilation[3];  // padding: before the first input
  bool from_last_tap = false;  // whether a convolution adds the taps from the last to the first
};

// Runs independent parts of a computation, in any order and on any threads.
class Parts {
 public:
  virtual ~Parts() = default;
  virtual void run(int64_t part) = 0;
};

class Threads {
 public:
  virtual ~Threads() = default;
  virtual int64_t count() const = 0;
  // Returns once `parts` has run for each number below `count`. An exception of a part is thrown here.
  virtual void run(int64_t count, Parts& parts) = 0;
};

// y (images, *out, channels) of x (images, *in, channels) and kernel (*kernel, channels), all of `type`. A flipped
// kernel is read from its last tap to its first. From `scale` on it is the epilogue of docs/arithmetic.md: scale and
// shift (channels) are float, or double for f64, and both are given or none; residual has the shape and type of y.
struct Conv {
  Geometry geometry;
  Type type;
  Bias bias_place;
  const void* x;
  const void* kernel;
  const void* bias;
  void* y;
  bool flipped = false;
  const void* scale = nullptr;
  const void* shift = nullptr;
  const void* residual = nullptr;
  Activation activation = Activation::none;
};

// gradient (*kernel, channels) of x and dy (images, *out, channels), all of `type`.
struct KernelGradient {
  Geometry geometry;
  Type type;
  const void* x;
  const void* dy;
  void* gradient;
};

// A segment of a program has at most so many terms.
constexpr int64_t most_terms = 512;

// A part of a program that adds, over a stack of sums. It takes the sum on top, or pushes another start. It adds the
// products of the terms from `first` to `end` to it, each with one rounding or with two. Then `adds` times the two sums
// on top become one.
struct Chain {
  enum class Start { top, zero, minus_zero, bias } start;
  enum class Products { none, fused, rounded } products;
  int64_t first, end;  // in the program's sequence of terms
  int64_t adds;
};

// y (batch, rows, columns), dense, of x (batch, rows, terms) and w (batch, terms, columns) with any strides, all of
// `type`. Each element is the sum that the chains make. bias, and from `scale` on the epilogue, are as for `Conv`.
struct Matmul {
  int64_t batch, rows, terms, columns;
  int64_t x_batch, x_row, x_term, w_batch, w_term, w_column;  // strides, in elements
  Type type;
  const void* x;
  const void* w;
  const void* bias;
  void* y;
  const Chain* chains = nullptr;
  const int64_t* segment_ends = nullptr;  // chains before the end of each segment
  int64_t segments = 0;
  const int64_t* order = nullptr;  // the term at each place of the sequence; nullptr: the same number
  int64_t depth = 0;               // most sums on the stack
  const void* scale = nullptr;
  const void* shift = nullptr;
  const void* residual = nullptr;
  Activation activation = Activation::none;
  double divisor = 1;  // of each sum, before the scale
};

// x (rows, channels), of `type`, normalized by its own mean and variance: y, of `type`. All else (channels) is float, or
// double for f64. The activation is none of the hard ones.
struct BatchNorm {
  int64_t rows, channels;
  Type type;
  double epsilon;
  Activation activation;
  const void *x, *scale, *bias;
  void *y, *mean, *var;
};

// dx (rows, channels), dscale and dbias (channels), of dy and what the normalization read and wrote. dx may be dy.
struct BatchNormGradient {
  int64_t rows, channels;
  Type type;
  double epsilon;
  Activation activation;
  const void *x, *scale, *bias, *mean, *var, *dy;
  void *dx, *dscale, *dbias;
};

// The mean over `rows` of the cross entropy of logits (rows, classes) and the label of each row, 0 to classes - 1: one
// number `loss`; or, with `ct`, one number that it is multiplied by, `gradient` (rows, classes). All of `type`.
struct CrossEntropy {
  int64_t rows, classes;
  Type type;
  const void* logits;
  const int32_t* labels;
  const void* ct;
  void* result;
};

// result = a x + b y, element by element; x, y and result of `type`; a and b, `factors` (2,), float, or double for f64.
struct Axpby {
  int64_t count;
  Type type;
  const void *factors, *x, *y;
  void* result;
};

// y (rows, length, channels) of the inputs (rows, taps - 1 + length, channels), which are state (rows, taps - 1, channels)
// and then x (rows, length, channels); kernel (taps, channels), bias (channels) or null, all of `type`. next_state has
// the last taps - 1 inputs. With ids (rows, taps - 1 + length) an output reads the inputs with its own id alone, and is 0
// where that is negative. There are two taps or more. The activation is none or silu.
struct Causal {
  int64_t rows, length, channels, taps;
  Type type;
  Activation activation;
  const void *x, *state, *kernel, *bias;
  const int32_t* ids;
  void *y, *next_state;
};

// All throw std::bad_alloc.
struct Kernels {
  void (*conv)(const Conv&, Threads&);
  void (*kernel_gradient)(const KernelGradient&, Threads&);
  void (*matmul)(const Matmul&, Threads&);
  void (*batch_norm)(const BatchNorm&, Threads&);
  void (*batch_norm_gradient)(const BatchNormGradient&, Threads&);
  void (*cross_entropy)(const CrossEntropy&, Threads&);
  void (*axpby)(const Axpby&, Threads&);
  void (*causal)(const Causal&, Threads&);
};

// The kernels of an instruction set, or nullptr where this library or this processor has none. Without a name: those
// that JAXDW_ISA names, else the widest.
const Kernels* kernels_of(const char* isa);
const char* name_of(const Kernels* kernels);

}  // namespace jaxdw

#endif  // JAXDW_NATIVE_KERNELS_H_
