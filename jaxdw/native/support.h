// The mode in which the kernels round, and arrays, for the instruction set that the translation unit is compiled for.
#ifndef JAXDW_NATIVE_SUPPORT_H_
#define JAXDW_NATIVE_SUPPORT_H_

#include <memory>

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

// Subnormal numbers count, and results are rounded to nearest, whatever the thread's mode is; it is restored after.
class Rounding {
 public:
#if defined(__x86_64__)
  Rounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~Rounding() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  Rounding() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~Rounding() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  Rounding() {}
#endif
};

// Numbers, zero at first. Not a std::vector: its functions for float would be shared with other instruction sets.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t size) : data_(new T[size]()) {}
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

}  // namespace
}  // namespace JAXDW_ISA
}  // namespace jaxdw

#endif  // JAXDW_NATIVE_SUPPORT_H_
