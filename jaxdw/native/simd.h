// Vectors of float and of double for the instruction set that this translation unit is compiled for.
//
// The translation unit defines JAXDW_ISA to `scalar`, `avx2`, `avx512` or `neon`. All names stand in a namespace of
// that name, so that the linker never takes a function that was compiled for another instruction set.
#ifndef JAXDW_NATIVE_SIMD_H_
#define JAXDW_NATIVE_SIMD_H_

#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define JAXDW_IS_scalar 1
#define JAXDW_IS_avx2 2
#define JAXDW_IS_avx512 3
#define JAXDW_IS_neon 4
#define JAXDW_JOIN_(a, b) a##b
#define JAXDW_JOIN(a, b) JAXDW_JOIN_(a, b)
#define JAXDW_IS JAXDW_JOIN(JAXDW_IS_, JAXDW_ISA)

#if JAXDW_IS == JAXDW_IS_avx2 || JAXDW_IS == JAXDW_IS_avx512
#include <immintrin.h>
#elif JAXDW_IS == JAXDW_IS_neon
#include <arm_neon.h>
#endif

namespace jaxdw {
namespace JAXDW_ISA {

#define JAXDW_INLINE inline __attribute__((always_inline))

#if JAXDW_IS == JAXDW_IS_scalar

JAXDW_INLINE float widen(bf16 value) {
  uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

JAXDW_INLINE float widen(f16 value) {
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16, exponent = (value.bits >> 10) & 31, mantissa = value.bits & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0);
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {  // subnormal or zero: a whole number of 2^-24
    float magnitude = float(mantissa) * 0x1p-24f;
    memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

JAXDW_INLINE void narrow(float value, bf16* to) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = uint16_t((is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

JAXDW_INLINE void narrow(float value, f16* to) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff, half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x1ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to infinity
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  } else {  // subnormal: adding 0.5 leaves a whole number of 2^-24 in the last bits, rounded to nearest even
    float shifted;
    memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000;
  }
  to->bits = uint16_t(sign | half);
}

struct Floats {
  static constexpr int lanes = 1;
  float v;
  static JAXDW_INLINE Floats zero() { return {0.0f}; }
  static JAXDW_INLINE Floats splat(float value) { return {value}; }
  static JAXDW_INLINE Floats load(const float* p) { return {*p}; }
  static JAXDW_INLINE Floats load(const bf16* p) { return {widen(*p)}; }
  static JAXDW_INLINE Floats load(const f16* p) { return {widen(*p)}; }
  JAXDW_INLINE void store(float* p) const { *p = v; }
  JAXDW_INLINE void store(bf16* p) const { narrow(v, p); }
  JAXDW_INLINE void store(f16* p) const { narrow(v, p); }
};
JAXDW_INLINE Floats fma(Floats a, Floats b, Floats c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }
JAXDW_INLINE Floats add(Floats a, Floats b) { return {a.v + b.v}; }
JAXDW_INLINE Floats subtract(Floats a, Floats b) { return {a.v - b.v}; }
JAXDW_INLINE Floats multiply(Floats a, Floats b) { return {a.v * b.v}; }
JAXDW_INLINE Floats divide(Floats a, Floats b) { return {a.v / b.v}; }
JAXDW_INLINE Floats at_least(Floats least, Floats a) { return {least.v > a.v ? least.v : a.v}; }
JAXDW_INLINE Floats at_most(Floats most, Floats a) { return {most.v < a.v ? most.v : a.v}; }

struct Doubles {
  static constexpr int lanes = 1;
  double v;
  static JAXDW_INLINE Doubles zero() { return {0.0}; }
  static JAXDW_INLINE Doubles splat(double value) { return {value}; }
  static JAXDW_INLINE Doubles load(const double* p) { return {*p}; }
  JAXDW_INLINE void store(double* p) const { *p = v; }
};
JAXDW_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return {__builtin_fma(a.v, b.v, c.v)}; }
JAXDW_INLINE Doubles add(Doubles a, Doubles b) { return {a.v + b.v}; }
JAXDW_INLINE Doubles subtract(Doubles a, Doubles b) { return {a.v - b.v}; }
JAXDW_INLINE Doubles multiply(Doubles a, Doubles b) { return {a.v * b.v}; }
JAXDW_INLINE Doubles divide(Doubles a, Doubles b) { return {a.v / b.v}; }
JAXDW_INLINE Doubles at_least(Doubles least, Doubles a) { return {least.v > a.v ? least.v : a.v}; }
JAXDW_INLINE Doubles at_most(Doubles most, Doubles a) { return {most.v < a.v ? most.v : a.v}; }
JAXDW_INLINE Floats inside(Floats low, Floats v, Floats high, Floats a) {
  return {v.v <= low.v || v.v >= high.v ? 0.0f : a.v};
}
JAXDW_INLINE Doubles inside(Doubles low, Doubles v, Doubles high, Doubles a) {
  return {v.v <= low.v || v.v >= high.v ? 0.0 : a.v};
}
JAXDW_INLINE void widen(Floats v, Doubles* to) { to->v = v.v; }

constexpr int registers = 16;

#elif JAXDW_IS == JAXDW_IS_avx2

struct Floats {
  static constexpr int lanes = 8;
  __m256 v;
  static JAXDW_INLINE Floats zero() { return {_mm256_setzero_ps()}; }
  static JAXDW_INLINE Floats splat(float value) { return {_mm256_set1_ps(value)}; }
  static JAXDW_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static JAXDW_INLINE Floats load(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static JAXDW_INLINE Floats load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  JAXDW_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  JAXDW_INLINE void store(bf16* p) const {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  JAXDW_INLINE void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};
JAXDW_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
JAXDW_INLINE Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
JAXDW_INLINE Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
JAXDW_INLINE Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
JAXDW_INLINE Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
JAXDW_INLINE Floats at_least(Floats least, Floats a) { return {_mm256_max_ps(least.v, a.v)}; }
JAXDW_INLINE Floats at_most(Floats most, Floats a) { return {_mm256_min_ps(most.v, a.v)}; }

struct Doubles {
  static constexpr int lanes = 4;
  __m256d v;
  static JAXDW_INLINE Doubles zero() { return {_mm256_setzero_pd()}; }
  static JAXDW_INLINE Doubles splat(double value) { return {_mm256_set1_pd(value)}; }
  static JAXDW_INLINE Doubles load(const double* p) { return {_mm256_loadu_pd(p)}; }
  JAXDW_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
};
JAXDW_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
JAXDW_INLINE Doubles add(Doubles a, Doubles b) { return {_mm256_add_pd(a.v, b.v)}; }
JAXDW_INLINE Doubles subtract(Doubles a, Doubles b) { return {_mm256_sub_pd(a.v, b.v)}; }
JAXDW_INLINE Doubles multiply(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
JAXDW_INLINE Doubles divide(Doubles a, Doubles b) { return {_mm256_div_pd(a.v, b.v)}; }
JAXDW_INLINE Doubles at_least(Doubles least, Doubles a) { return {_mm256_max_pd(least.v, a.v)}; }
JAXDW_INLINE Doubles at_most(Doubles most, Doubles a) { return {_mm256_min_pd(most.v, a.v)}; }
JAXDW_INLINE Floats inside(Floats low, Floats v, Floats high, Floats a) {
  __m256 is_above = _mm256_cmp_ps(v.v, low.v, _CMP_NLE_UQ), is_below = _mm256_cmp_ps(v.v, high.v, _CMP_NGE_UQ);
  return {_mm256_and_ps(_mm256_and_ps(is_above, is_below), a.v)};
}
JAXDW_INLINE Doubles inside(Doubles low, Doubles v, Doubles high, Doubles a) {
  __m256d is_above = _mm256_cmp_pd(v.v, low.v, _CMP_NLE_UQ), is_below = _mm256_cmp_pd(v.v, high.v, _CMP_NGE_UQ);
  return {_mm256_and_pd(_mm256_and_pd(is_above, is_below), a.v)};
}
JAXDW_INLINE void widen(Floats v, Doubles* to) {
  to[0].v = _mm256_cvtps_pd(_mm256_castps256_ps128(v.v));
  to[1].v = _mm256_cvtps_pd(_mm256_extractf128_ps(v.v, 1));
}

constexpr int registers = 16;

#elif JAXDW_IS == JAXDW_IS_avx512

struct Floats {
  static constexpr int lanes = 16;
  __m512 v;
  static JAXDW_INLINE Floats zero() { return {_mm512_setzero_ps()}; }
  static JAXDW_INLINE Floats splat(float value) { return {_mm512_set1_ps(value)}; }
  static JAXDW_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static JAXDW_INLINE Floats load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static JAXDW_INLINE Floats load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  JAXDW_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  JAXDW_INLINE void store(bf16* p) const {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }
  JAXDW_INLINE void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};
JAXDW_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
JAXDW_INLINE Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
JAXDW_INLINE Floats subtract(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
JAXDW_INLINE Floats multiply(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
JAXDW_INLINE Floats divide(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
JAXDW_INLINE Floats at_least(Floats least, Floats a) { return {_mm512_max_ps(least.v, a.v)}; }
JAXDW_INLINE Floats at_most(Floats most, Floats a) { return {_mm512_min_ps(most.v, a.v)}; }

struct Doubles {
  static constexpr int lanes = 8;
  __m512d v;
  static JAXDW_INLINE Doubles zero() { return {_mm512_setzero_pd()}; }
  static JAXDW_INLINE Doubles splat(double value) { return {_mm512_set1_pd(value)}; }
  static JAXDW_INLINE Doubles load(const double* p) { return {_mm512_loadu_pd(p)}; }
  JAXDW_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
};
JAXDW_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
JAXDW_INLINE Doubles add(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
JAXDW_INLINE Doubles subtract(Doubles a, Doubles b) { return {_mm512_sub_pd(a.v, b.v)}; }
JAXDW_INLINE Doubles multiply(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
JAXDW_INLINE Doubles divide(Doubles a, Doubles b) { return {_mm512_div_pd(a.v, b.v)}; }
JAXDW_INLINE Doubles at_least(Doubles least, Doubles a) { return {_mm512_max_pd(least.v, a.v)}; }
JAXDW_INLINE Doubles at_most(Doubles most, Doubles a) { return {_mm512_min_pd(most.v, a.v)}; }
JAXDW_INLINE Floats inside(Floats low, Floats v, Floats high, Floats a) {
  __mmask16 is_above = _mm512_cmp_ps_mask(v.v, low.v, _CMP_NLE_UQ);
  return {_mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(is_above, v.v, high.v, _CMP_NGE_UQ), a.v)};
}
JAXDW_INLINE Doubles inside(Doubles low, Doubles v, Doubles high, Doubles a) {
  __mmask8 is_above = _mm512_cmp_pd_mask(v.v, low.v, _CMP_NLE_UQ);
  return {_mm512_maskz_mov_pd(_mm512_mask_cmp_pd_mask(is_above, v.v, high.v, _CMP_NGE_UQ), a.v)};
}
JAXDW_INLINE void widen(Floats v, Doubles* to) {
  to[0].v = _mm512_cvtps_pd(_mm512_castps512_ps256(v.v));
  to[1].v = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v.v, 1));
}

constexpr int registers = 32;

#elif JAXDW_IS == JAXDW_IS_neon

struct Floats {
  static constexpr int lanes = 4;
  float32x4_t v;
  static JAXDW_INLINE Floats zero() { return {vdupq_n_f32(0.0f)}; }
  static JAXDW_INLINE Floats splat(float value) { return {vdupq_n_f32(value)}; }
  static JAXDW_INLINE Floats load(const float* p) { return {vld1q_f32(p)}; }
  static JAXDW_INLINE Floats load(const bf16* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
  }
  static JAXDW_INLINE Floats load(const f16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
  }
  JAXDW_INLINE void store(float* p) const { vst1q_f32(p, v); }
  JAXDW_INLINE void store(bf16* p) const {
    uint32x4_t bits = vreinterpretq_u32_f32(v);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
  }
  JAXDW_INLINE void store(f16* p) const {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }
};
JAXDW_INLINE Floats fma(Floats a, Floats b, Floats c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
JAXDW_INLINE Floats add(Floats a, Floats b) { return {vaddq_f32(a.v, b.v)}; }
JAXDW_INLINE Floats subtract(Floats a, Floats b) { return {vsubq_f32(a.v, b.v)}; }
JAXDW_INLINE Floats multiply(Floats a, Floats b) { return {vmulq_f32(a.v, b.v)}; }
JAXDW_INLINE Floats divide(Floats a, Floats b) { return {vdivq_f32(a.v, b.v)}; }
JAXDW_INLINE Floats at_least(Floats least, Floats a) {
  return {vbslq_f32(vcgtq_f32(least.v, a.v), least.v, a.v)};
}
JAXDW_INLINE Floats at_most(Floats most, Floats a) { return {vbslq_f32(vcltq_f32(most.v, a.v), most.v, a.v)}; }

struct Doubles {
  static constexpr int lanes = 2;
  float64x2_t v;
  static JAXDW_INLINE Doubles zero() { return {vdupq_n_f64(0.0)}; }
  static JAXDW_INLINE Doubles splat(double value) { return {vdupq_n_f64(value)}; }
  static JAXDW_INLINE Doubles load(const double* p) { return {vld1q_f64(p)}; }
  JAXDW_INLINE void store(double* p) const { vst1q_f64(p, v); }
};
JAXDW_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
JAXDW_INLINE Doubles add(Doubles a, Doubles b) { return {vaddq_f64(a.v, b.v)}; }
JAXDW_INLINE Doubles subtract(Doubles a, Doubles b) { return {vsubq_f64(a.v, b.v)}; }
JAXDW_INLINE Doubles multiply(Doubles a, Doubles b) { return {vmulq_f64(a.v, b.v)}; }
JAXDW_INLINE Doubles divide(Doubles a, Doubles b) { return {vdivq_f64(a.v, b.v)}; }
JAXDW_INLINE Doubles at_least(Doubles least, Doubles a) {
  return {vbslq_f64(vcgtq_f64(least.v, a.v), least.v, a.v)};
}
JAXDW_INLINE Doubles at_most(Doubles most, Doubles a) { return {vbslq_f64(vcltq_f64(most.v, a.v), most.v, a.v)}; }
JAXDW_INLINE Floats inside(Floats low, Floats v, Floats high, Floats a) {
  uint32x4_t is_outside = vorrq_u32(vcleq_f32(v.v, low.v), vcgeq_f32(v.v, high.v));
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.v), is_outside))};
}
JAXDW_INLINE Doubles inside(Doubles low, Doubles v, Doubles high, Doubles a) {
  uint64x2_t is_outside = vorrq_u64(vcleq_f64(v.v, low.v), vcgeq_f64(v.v, high.v));
  return {vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(a.v), is_outside))};
}
JAXDW_INLINE void widen(Floats v, Doubles* to) {
  to[0].v = vcvt_f64_f32(vget_low_f32(v.v));
  to[1].v = vcvt_high_f64_f32(v.v);
}

constexpr int registers = 32;

#endif

// at_least and at_most return `a` where it is NaN, or a zero of the other sign than the limit.
// inside returns 0 where v <= low or v >= high, else `a`; so a NaN as a limit is none. widen returns the doubles of
// the same lanes, in as many vectors as they need.

JAXDW_INLINE void widen(Doubles v, Doubles* to) { *to = v; }

// Whether `stream` writes whole lines of 64 bytes: parts of lines past the caches take four times as long as a store.
constexpr bool can_stream = JAXDW_IS == JAXDW_IS_avx512;

// The first `count` lanes; the others are zero.
template <class V, class T>
JAXDW_INLINE V load_first(const T* p, int count) {
#if JAXDW_IS == JAXDW_IS_avx512
  if constexpr (sizeof(T) == 4) {
    return {_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p)};
  } else if constexpr (sizeof(T) == 8) {
    return {_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p)};
  } else {
#else
  {
#endif
    T all[V::lanes] = {};
    for (int i = 0; i < count; ++i) all[i] = p[i];
    return V::load(all);
  }
}

template <class V, class T>
JAXDW_INLINE void store_first(V value, T* p, int count) {
#if JAXDW_IS == JAXDW_IS_avx512
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), value.v);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), value.v);
  } else {
#else
  {
#endif
    T all[V::lanes];
    value.store(all);
    for (int i = 0; i < count; ++i) p[i] = all[i];
  }
}

// Of `vectors` that lie side by side number v. With `part` the last one has its first `count` lanes, others are whole.
template <class V, bool part, class T>
JAXDW_INLINE V load_last(const T* p, int v, int vectors, int count) {
  return part && v == vectors - 1 ? load_first<V>(p + v * V::lanes, count) : V::load(p + v * V::lanes);
}

// The same vector, loaded once: compilers would rather load it for each operation.
template <class V>
JAXDW_INLINE V in_register(V value) {
#if JAXDW_IS == JAXDW_IS_avx512 || JAXDW_IS == JAXDW_IS_avx2
  asm("" : "+v"(value.v));
#elif JAXDW_IS == JAXDW_IS_neon
  asm("" : "+w"(value.v));
#endif
  return value;
}

// Stores a vector past the caches where there are instructions for it. The address is a multiple of its size.
template <class V, class T>
JAXDW_INLINE void stream(V value, T* p) {
#if JAXDW_IS == JAXDW_IS_avx512
  if constexpr (sizeof(T) == 4) return _mm512_stream_ps(p, value.v);
#endif
  value.store(p);
}

#if JAXDW_IS == JAXDW_IS_avx2
JAXDW_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
JAXDW_INLINE Floats load_first<Floats, float>(const float* p, int count) {
  return {_mm256_maskload_ps(p, first_lanes(count))};
}
template <>
JAXDW_INLINE void store_first<Floats, float>(Floats value, float* p, int count) {
  _mm256_maskstore_ps(p, first_lanes(count), value.v);
}
#endif

}  // namespace JAXDW_ISA
}  // namespace jaxdw

#endif  // JAXDW_NATIVE_SIMD_H_
