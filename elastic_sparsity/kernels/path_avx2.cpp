// AVX2, FMA and POPCNT: any x86 of the last ten years. Expands by a table of shuffles; multiplies in float32.
#include <immintrin.h>

#include "expand_table.h"
#include "generic.h"
#define ES_LANES 8
#include "training.h"

namespace es {
namespace {

bool usable() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("bmi");
}

// Eight bfloat16 of a row, as float32 where the byte has bits.
inline __m256 eight(const uint16_t* values, unsigned byte) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand.bytes[byte]));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_shuffle_epi8(packed, shuffle)), 16));
}

// Eight float32; lanes come from the same table, at half the bytes' index; unset ones have the sign bit in theirs.
inline __m256i eight(const uint32_t* values, unsigned byte) {
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand.bytes[byte]));
  const __m256i wide = _mm256_cvtepi16_epi32(bytes);  // low byte: twice the lane
  const __m256i lane = _mm256_srli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0xff)), 1);
  const __m256i dropped = _mm256_srai_epi32(wide, 31);
  return _mm256_andnot_si256(dropped, _mm256_permutevar8x32_epi32(packed, lane));
}

inline __m256 eight(const float* values, unsigned byte) {
  return _mm256_castsi256_ps(eight(reinterpret_cast<const uint32_t*>(values), byte));
}

inline float total(__m256 sums) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

template <class Value, class Out, int R, int T>
void some_rows(const Product& p, int64_t row) {
  const int64_t words = p.weight.words;
  const auto* x = static_cast<const float*>(p.x);
  const uint64_t* mask = p.weight.mask + row * words;
  const Ahead ahead = ahead_of(p.weight, row, R, sizeof(Value));
  const Value* values[R];
  __m256 sums[R][T];
  for (int r = 0; r < R; ++r) {
    values[r] = static_cast<const Value*>(p.weight.values) + p.weight.starts[row + r];
    for (int t = 0; t < T; ++t) sums[r][t] = _mm256_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w) {
    for (int part = 0; part < 8; ++part) {
      __m256 expanded[R];
      for (int r = 0; r < R; ++r) {
        const auto byte = uint8_t(mask[r * words + w] >> (8 * part));
        expanded[r] = eight(values[r], byte);
        if (part % 4 == 0) prefetch(values[r], ahead.values);
        values[r] += count_bits(byte);
      }
      if (part == 0 && w % 8 == 0)
        for (int r = 0; r < R; ++r) prefetch(mask + r * words + w, 8 * ahead.words);
      for (int t = 0; t < T; ++t) {
        const __m256 at = _mm256_loadu_ps(x + t * p.x_stride + w * kWordBits + 8 * part);
        for (int r = 0; r < R; ++r) sums[r][t] = _mm256_fmadd_ps(expanded[r], at, sums[r][t]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float found[T];
    for (int t = 0; t < T; ++t) found[t] = total(sums[r][t]);
    finish_row<Out>(p, row + r, found);
  }
}

template <class Value, class Out, int T>
void all_rows(const Product& p, int64_t begin, int64_t end) {
  constexpr int R = T > 4 ? 1 : T > 2 ? 2 : 4;  // 16 registers
  int64_t row = begin;
  for (; row + R <= end; row += R) some_rows<Value, Out, R, T>(p, row);
  for (; row < end; ++row) some_rows<Value, Out, 1, T>(p, row);
}

template <int T>
struct Bf16 {
  static void run(const Product& p, int64_t begin, int64_t end) { all_rows<uint16_t, uint16_t, T>(p, begin, end); }
};

template <int T>
struct F32 {
  static void run(const Product& p, int64_t begin, int64_t end) { all_rows<float, float, T>(p, begin, end); }
};

template <class In, class Out, class Step>
const In* expand(const uint64_t* bits, int64_t n, const In* values, const In* end, Out* out, Step step) {
  int64_t at = 0;
  for (; at + kWordBits <= n && end - values >= kWordBits; at += kWordBits) {
    for (int part = 0; part < 8; ++part) {
      const auto byte = uint8_t(bits[at / kWordBits] >> (8 * part));
      step(values, byte, out + at + 8 * part);
      values += count_bits(byte);
    }
  }
  return expand_generic(bits + at / kWordBits, n - at, values, end, out + at);
}

const uint16_t* expand16(const uint64_t* bits, int64_t n, const uint16_t* values, const uint16_t* end, uint16_t* out) {
  return expand(bits, n, values, end, out, [](const uint16_t* from, unsigned byte, uint16_t* to) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand.bytes[byte]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(packed, shuffle));
  });
}

const uint32_t* expand32(const uint64_t* bits, int64_t n, const uint32_t* values, const uint32_t* end, uint32_t* out) {
  return expand(bits, n, values, end, out, [](const uint32_t* from, unsigned byte, uint32_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), eight(from, byte));
  });
}

const uint16_t* widen(const uint64_t* bits, int64_t n, const uint16_t* values, const uint16_t* end, float* out) {
  return expand(bits, n, values, end, out, [](const uint16_t* from, unsigned byte, float* to) {
    _mm256_storeu_ps(to, eight(from, byte));
  });
}

}  // namespace

extern const Path kAvx2;
const Path kAvx2 = {
    "avx2",   usable, false, by_tokens<Bf16>, by_tokens<F32>, expand16, expand32, widen,
    round_generic, lanes::kTraining,
};

}  // namespace es
