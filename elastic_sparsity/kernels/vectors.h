// Vectors of ES_LANES float32 by the compiler's own vector types: one source for every instruction set,
// which a path compiles with its flags and its number of lanes. Everything is forced inline, so that no vector crosses a call.
#pragma once
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "generic.h"

#define ES_INLINE inline __attribute__((always_inline))

namespace es {
namespace {
namespace lanes {

constexpr int kLanes = ES_LANES;
typedef float F __attribute__((vector_size(4 * ES_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * ES_LANES)));
typedef uint16_t H __attribute__((vector_size(2 * ES_LANES)));

// Between lanes of 32 and of fewer bits. The compilers know the instructions, but make detours of several around them.
#if defined(__AVX512F__) && ES_LANES == 16
ES_INLINE U widen(H v) { return (U)_mm512_cvtepu16_epi32((__m256i)v); }
ES_INLINE H narrow(U v) { return (H)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__) && ES_LANES == 8
ES_INLINE U widen(H v) { return (U)_mm256_cvtepu16_epi32((__m128i)v); }
ES_INLINE H narrow(U v) {  // each below 2^16
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (H)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
ES_INLINE U widen(H v) { return __builtin_convertvector(v, U); }
ES_INLINE H narrow(U v) { return __builtin_convertvector(v, H); }
#endif

ES_INLINE F all(float value) { return value - F{}; }

ES_INLINE F load(const float* from) {
  F v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
ES_INLINE F load(const uint16_t* from) {
  H v;
  std::memcpy(&v, from, sizeof v);
  return (F)(widen(v) << 16);
}
ES_INLINE void store(F v, float* to) { std::memcpy(to, &v, sizeof v); }
// Rounded to nearest even; any NaN gives the one that torch gives.
ES_INLINE void store(F v, uint16_t* to) {
  const U bits = U(v);
  const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const H halves = narrow(v != v ? U{} + 0x7fc0 : rounded);
  std::memcpy(to, &halves, sizeof halves);
}
ES_INLINE float widened(float value) { return value; }
ES_INLINE float widened(uint16_t bits) { return to_float(bits); }

// `n` < kLanes elements, the others `rest`.
template <class T>
ES_INLINE F load_part(const T* from, int64_t n, float rest) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? widened(from[i]) : rest;
  return load(lanes);
}
template <class T>
ES_INLINE void store_part(F v, T* to, int64_t n) {
  T lanes[kLanes];
  store(v, lanes);
  std::memcpy(to, lanes, size_t(n) * sizeof(T));
}

ES_INLINE F larger(F a, F b) { return a > b ? a : b; }
ES_INLINE float sum(F v) {
  float lanes[kLanes], total = 0;
  store(v, lanes);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}
ES_INLINE float largest(F v) {
  float lanes[kLanes];
  store(v, lanes);
  float found = lanes[0];
  for (int i = 1; i < kLanes; ++i) found = lanes[i] > found ? lanes[i] : found;
  return found;
}

// exp(x), relative error below 2e-7, for x of at most 88; 0 where it would be subnormal, NaN for NaN.
// x = n log 2 + r with |r| <= log(2) / 2; adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits.
ES_INLINE F exp(F x) {
  const F shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const F r = x - n * 0.693359375f - n * -2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const F power = F((U(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? F{} : p * power;
}

}  // namespace lanes
}  // namespace
}  // namespace es
