// AVX-512 with VBMI2 (expand of 16-bit lanes) and BF16 (pairwise dot product): Ice Lake with BF16, Sapphire Rapids, Zen 4.
#include <immintrin.h>

#include "generic.h"
#define ES_LANES 16
#include "training.h"

namespace es {
namespace {

bool usable() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("bmi");
}

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

// R rows at a time hide the latency of each row's chain: count bits, advance, load, expand.
template <int R, int T>
void bf16_rows(const Product& p, int64_t row) {
  const int64_t words = p.weight.words;
  const auto* x = static_cast<const uint16_t*>(p.x);
  const uint64_t* mask = p.weight.mask + row * words;
  const Ahead ahead = ahead_of(p.weight, row, R, 2);
  const uint16_t* values[R];
  __m512 sums[R][T];
  for (int r = 0; r < R; ++r) {
    values[r] = static_cast<const uint16_t*>(p.weight.values) + p.weight.starts[row + r];
    for (int t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w) {
    __m512i low[R], high[R];
    for (int r = 0; r < R; ++r) {
      const uint64_t word = mask[r * words + w];
      const uint16_t* second = values[r] + count_bits(uint32_t(word));
      low[r] = _mm512_maskz_expand_epi16(__mmask32(word), load(values[r]));
      high[r] = _mm512_maskz_expand_epi16(__mmask32(word >> 32), load(second));
      prefetch(values[r], ahead.values);
      prefetch(second, ahead.values);
      if (w % 8 == 0) prefetch(mask + r * words + w, 8 * ahead.words);
      values[r] += count_bits(word);
    }
    for (int t = 0; t < T; ++t) {
      const uint16_t* at = x + t * p.x_stride + w * kWordBits;
      const __m512i x_low = load(at), x_high = load(at + 32);
      for (int r = 0; r < R; ++r) {
        sums[r][t] = _mm512_dpbf16_ps(sums[r][t], __m512bh(low[r]), __m512bh(x_low));
        sums[r][t] = _mm512_dpbf16_ps(sums[r][t], __m512bh(high[r]), __m512bh(x_high));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float found[T];
    for (int t = 0; t < T; ++t) found[t] = _mm512_reduce_add_ps(sums[r][t]);
    finish_row<uint16_t>(p, row + r, found);
  }
}

template <int R, int T>
void f32_rows(const Product& p, int64_t row) {
  const int64_t words = p.weight.words;
  const auto* x = static_cast<const float*>(p.x);
  const uint64_t* mask = p.weight.mask + row * words;
  const Ahead ahead = ahead_of(p.weight, row, R, 4);
  const float* values[R];
  __m512 sums[R][T];
  for (int r = 0; r < R; ++r) {
    values[r] = static_cast<const float*>(p.weight.values) + p.weight.starts[row + r];
    for (int t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w) {
    for (int part = 0; part < 4; ++part) {
      __m512 expanded[R];
      for (int r = 0; r < R; ++r) {
        const auto bits = __mmask16(mask[r * words + w] >> (16 * part));
        expanded[r] = _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(values[r]));
        prefetch(values[r], ahead.values);
        values[r] += count_bits(uint16_t(bits));
      }
      if (part == 0 && w % 8 == 0)
        for (int r = 0; r < R; ++r) prefetch(mask + r * words + w, 8 * ahead.words);
      for (int t = 0; t < T; ++t) {
        const __m512 at = _mm512_loadu_ps(x + t * p.x_stride + w * kWordBits + 16 * part);
        for (int r = 0; r < R; ++r) sums[r][t] = _mm512_fmadd_ps(expanded[r], at, sums[r][t]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float found[T];
    for (int t = 0; t < T; ++t) found[t] = _mm512_reduce_add_ps(sums[r][t]);
    finish_row<float>(p, row + r, found);
  }
}

// One row at a time is one stream, best where bytes are the limit (half of the weights kept); two share the loads of x,
// best where instructions are. Measured on Zen 5, as was that four rows only lose.
template <int T, class One, class Two>
void all_rows(const Product& p, int64_t begin, int64_t end, One one, Two two) {
  const bool is_dense = p.weight.starts[p.weight.rows] * 20 >= p.weight.rows * p.weight.width * 9;
  int64_t row = begin;
  if (T > 1 || !is_dense)
    for (; row + 2 <= end; row += 2) two(p, row);
  for (; row < end; ++row) one(p, row);
}

template <int T>
struct Bf16 {
  static void run(const Product& p, int64_t begin, int64_t end) {
    all_rows<T>(p, begin, end, bf16_rows<1, T>, bf16_rows<2, T>);
  }
};

template <int T>
struct F32 {
  static void run(const Product& p, int64_t begin, int64_t end) {
    all_rows<T>(p, begin, end, f32_rows<1, T>, f32_rows<2, T>);
  }
};

const uint16_t* expand16(const uint64_t* bits, int64_t n, const uint16_t* values, const uint16_t* end, uint16_t* out) {
  int64_t at = 0;
  for (; at + kWordBits <= n && end - values >= kWordBits; at += kWordBits) {
    const uint64_t word = bits[at / kWordBits];
    _mm512_storeu_si512(out + at, _mm512_maskz_expand_epi16(__mmask32(word), load(values)));
    values += count_bits(uint32_t(word));
    _mm512_storeu_si512(out + at + 32, _mm512_maskz_expand_epi16(__mmask32(word >> 32), load(values)));
    values += count_bits(word >> 32);
  }
  return expand_generic(bits + at / kWordBits, n - at, values, end, out + at);
}

const uint32_t* expand32(const uint64_t* bits, int64_t n, const uint32_t* values, const uint32_t* end, uint32_t* out) {
  int64_t at = 0;
  for (; at + kWordBits <= n && end - values >= kWordBits; at += kWordBits) {
    for (int part = 0; part < 4; ++part) {
      const auto here = __mmask16(bits[at / kWordBits] >> (16 * part));
      _mm512_storeu_si512(out + at + 16 * part, _mm512_maskz_expand_epi32(here, load(values)));
      values += count_bits(uint16_t(here));
    }
  }
  return expand_generic(bits + at / kWordBits, n - at, values, end, out + at);
}

inline void store_widened(__m512i halves, float* out) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
  _mm512_storeu_si512(out, _mm512_slli_epi32(low, 16));
  _mm512_storeu_si512(out + 16, _mm512_slli_epi32(high, 16));
}

const uint16_t* widen(const uint64_t* bits, int64_t n, const uint16_t* values, const uint16_t* end, float* out) {
  int64_t at = 0;
  for (; at + kWordBits <= n && end - values >= kWordBits; at += kWordBits) {
    const uint64_t word = bits[at / kWordBits];
    store_widened(_mm512_maskz_expand_epi16(__mmask32(word), load(values)), out + at);
    values += count_bits(uint32_t(word));
    store_widened(_mm512_maskz_expand_epi16(__mmask32(word >> 32), load(values)), out + at + 32);
    values += count_bits(word >> 32);
  }
  return expand_generic(bits + at / kWordBits, n - at, values, end, out + at);
}

// In integers: the conversion instruction would flush subnormal numbers to zero.
bool round_bf16(const uint64_t* bits, int64_t n, const float* in, uint16_t* out) {
  const __m512i one = _mm512_set1_epi32(1), bias = _mm512_set1_epi32(0x7fff);
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  __mmask16 infinite = 0;
  int64_t at = 0;
  for (; at + kWordBits <= n; at += kWordBits) {
    for (int part = 0; part < 4; ++part) {
      const auto here = __mmask16(bits[at / kWordBits] >> (16 * part));
      const __m512i value = load(in + at + 16 * part);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(value, 16), one);
      const __m512i rounded = _mm512_add_epi32(value, _mm512_add_epi32(odd, bias));
      infinite |= _mm512_mask_cmpeq_epi32_mask(here, _mm512_and_si512(rounded, exponent), exponent);
      // A NaN's rounding may overflow into the sign: seen on the value itself.
      infinite |= _mm512_mask_cmpeq_epi32_mask(here, _mm512_and_si512(value, exponent), exponent);
      const __m256i half = _mm512_cvtepi32_epi16(_mm512_maskz_srli_epi32(here, rounded, 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at + 16 * part), half);
    }
  }
  return round_generic(bits + at / kWordBits, n - at, in + at, out + at) && !infinite;
}

}  // namespace

extern const Path kAvx512;
const Path kAvx512 = {
    "avx512", usable,     true, by_tokens<Bf16>, by_tokens<F32>, expand16, expand32, widen,
    round_bf16, lanes::kTraining,
};

}  // namespace es
