// The parts that one source serves for every instruction set: scalar code, and tails of vector code.
#pragma once
#include <cstring>

#include "kernels.h"

namespace es {
namespace {

inline int count_bits(uint64_t word) { return __builtin_popcountll(word); }

inline float to_float(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline float to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest even, as torch does; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store(float value, uint16_t* out) { *out = to_bf16(value); }
inline void store(float value, float* out) { *out = value; }

template <class In, class Out>
inline Out convert(In bits) {
  if constexpr (sizeof(In) == sizeof(Out)) {
    Out same;
    std::memcpy(&same, &bits, sizeof(Out));
    return same;
  } else {
    return to_float(bits);
  }
}

// One word's worth of `expand`, `n` <= 64 outputs, never reading beyond `end`.
template <class In, class Out>
inline const In* expand_word(uint64_t word, int64_t n, const In* values, const In* end, Out* out) {
  if (n < kWordBits) word &= (uint64_t(1) << n) - 1;
  if (count_bits(word) > end - values) return nullptr;
  for (int64_t i = 0; i < n; ++i) {
    const bool set = word >> i & 1;
    out[i] = set ? convert<In, Out>(*values) : Out(0);
    values += set;
  }
  return values;
}

template <class In, class Out>
const In* expand_generic(const uint64_t* bits, int64_t n, const In* values, const In* end, Out* out) {
  for (int64_t at = 0; at < n && values; at += kWordBits)
    values = expand_word(bits[at / kWordBits], n - at < kWordBits ? n - at : kWordBits, values, end, out + at);
  return values;
}

inline bool round_word(uint64_t word, int64_t n, const float* in, uint16_t* out) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = word >> i & 1 ? to_bf16(in[i]) : 0;
    finite &= (out[i] & 0x7f80) != 0x7f80;
  }
  return finite;
}

inline bool round_generic(const uint64_t* bits, int64_t n, const float* in, uint16_t* out) {
  bool finite = true;
  for (int64_t at = 0; at < n; at += kWordBits)
    finite &= round_word(bits[at / kWordBits], n - at < kWordBits ? n - at : kWordBits, in + at, out + at);
  return finite;
}

// Rows are short streams, which the hardware's own prefetch loses at every end: 18 instead of 40 GB/s on a Zen 5 pair.
// So a pass over R rows fetches what lies one such pass ahead, in values and in mask.
constexpr int64_t kLeastAhead = 4096;  // bytes; short rows need several passes, of 2, 4 and 8 kB measured best

struct Ahead {
  int64_t values;  // bytes
  int64_t words;   // of mask
};

inline Ahead ahead_of(const Packed& weight, int64_t row, int rows, int64_t value_size) {
  const int64_t bytes = (weight.starts[row + rows] - weight.starts[row]) * value_size;
  const int64_t least_words = kLeastAhead / 16;
  return {rows > 1 && bytes > kLeastAhead ? bytes : kLeastAhead,
          rows * weight.words > least_words ? rows * weight.words : least_words};
}

inline void prefetch(const void* from, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + uintptr_t(bytes)), 0, 3);
}

template <class Value>
inline void finish_row(const Product& p, int64_t row, const float* sums) {
  const auto* bias = static_cast<const Value*>(p.bias);
  auto* y = static_cast<Value*>(p.y);
  for (int t = 0; t < p.tokens; ++t) {
    float sum = sums[t];
    if (bias) {
      uint16_t half;
      if constexpr (sizeof(Value) == 2) {
        std::memcpy(&half, bias + row, 2);
        sum += to_float(half);
      } else {
        sum += bias[row];
      }
    }
    store(sum, y + t * p.y_stride + row);
  }
}

// Calls `Rows<T>::run(product, begin, end)` for the product's number of tokens, 1 to kMaxTokens.
template <template <int> class Rows>
void by_tokens(const Product& p, int64_t begin, int64_t end) {
  switch (p.tokens) {
    case 1: return Rows<1>::run(p, begin, end);
    case 2: return Rows<2>::run(p, begin, end);
    case 3: return Rows<3>::run(p, begin, end);
    case 4: return Rows<4>::run(p, begin, end);
    case 5: return Rows<5>::run(p, begin, end);
    case 6: return Rows<6>::run(p, begin, end);
    case 7: return Rows<7>::run(p, begin, end);
    default: return Rows<8>::run(p, begin, end);
  }
}

// Products bit by bit, float32 x.
template <class Bits, class Value>
void product_generic(const Product& p, int64_t begin, int64_t end) {
  const auto* x = static_cast<const float*>(p.x);
  const auto* all = static_cast<const Bits*>(p.weight.values);
  for (int64_t row = begin; row < end; ++row) {
    float sums[kMaxTokens] = {};
    const Bits* values = all + p.weight.starts[row];
    for (int64_t w = 0; w < p.weight.words; ++w) {
      for (uint64_t word = p.weight.mask[row * p.weight.words + w]; word; word &= word - 1) {
        const float value = to_float(*values++);
        const float* column = x + w * kWordBits + __builtin_ctzll(word);
        for (int t = 0; t < p.tokens; ++t) sums[t] += value * column[t * p.x_stride];
      }
    }
    finish_row<Value>(p, row, sums);
  }
}

}  // namespace
}  // namespace es
