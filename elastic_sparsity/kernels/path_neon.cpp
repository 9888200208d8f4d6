// NEON: every 64-bit Arm. Expands by a table of shuffles; multiplies in float32.
#include <arm_neon.h>

#include "expand_table.h"
#include "generic.h"
#define ES_LANES 4
#include "training.h"

namespace es {
namespace {

bool usable() { return true; }

inline uint16x8_t eight(const uint16_t* values, unsigned byte) {
  const uint8x16_t packed = vreinterpretq_u8_u16(vld1q_u16(values));
  return vreinterpretq_u16_u8(vqtbl1q_u8(packed, vld1q_u8(kExpand.bytes[byte])));
}

inline float32x4_t first(uint16x8_t halves) {
  return vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16));
}

inline float32x4_t second(uint16x8_t halves) { return vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16)); }

// Four float32 of four mask bits: the table's 16-bit lane numbers, each byte pair made a quadruple.
inline float32x4_t four(const float* values, unsigned bits) {
  const uint8x16_t packed = vreinterpretq_u8_f32(vld1q_f32(values));
  const uint16x4_t lanes = vreinterpret_u16_u8(vld1_u8(kExpand.bytes[bits]));  // low byte: 2 * lane, or 0x80
  const uint32x4_t low = vandq_u32(vmovl_u16(lanes), vdupq_n_u32(0xff));
  const uint32x4_t dropped = vcgeq_u32(low, vdupq_n_u32(0x80));
  const uint32x4_t index = vmlaq_n_u32(vdupq_n_u32(0x03020100), vshlq_n_u32(low, 1), 0x01010101);
  return vreinterpretq_f32_u8(vqtbl1q_u8(packed, vreinterpretq_u8_u32(vorrq_u32(index, dropped))));
}

template <class Value, class Out, int T>
void one_row(const Product& p, int64_t row) {
  const int64_t words = p.weight.words;
  const auto* x = static_cast<const float*>(p.x);
  const Ahead ahead = ahead_of(p.weight, row, 1, sizeof(Value));
  const Value* values = static_cast<const Value*>(p.weight.values) + p.weight.starts[row];
  float32x4_t sums[T][2];
  for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = vdupq_n_f32(0);
  for (int64_t w = 0; w < words; ++w) {
    const uint64_t word = p.weight.mask[row * words + w];
    for (int part = 0; part < 8; ++part) {
      const auto byte = uint8_t(word >> (8 * part));
      float32x4_t a, b;
      if constexpr (sizeof(Value) == 2) {
        const uint16x8_t halves = eight(values, byte);
        a = first(halves), b = second(halves);
      } else {
        a = four(values, byte & 15);
        b = four(values + count_bits(byte & 15u), byte >> 4);
      }
      values += count_bits(byte);
      for (int t = 0; t < T; ++t) {
        const float* at = x + t * p.x_stride + w * kWordBits + 8 * part;
        sums[t][0] = vfmaq_f32(sums[t][0], a, vld1q_f32(at));
        sums[t][1] = vfmaq_f32(sums[t][1], b, vld1q_f32(at + 4));
      }
    }
  }
  float found[T];
  for (int t = 0; t < T; ++t) found[t] = vaddvq_f32(vaddq_f32(sums[t][0], sums[t][1]));
  finish_row<Out>(p, row, found);
}

template <int T>
struct Bf16 {
  static void run(const Product& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) one_row<uint16_t, uint16_t, T>(p, row);
  }
};

template <int T>
struct F32 {
  static void run(const Product& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) one_row<float, float, T>(p, row);
  }
};

const uint16_t* expand16(const uint64_t* bits, int64_t n, const uint16_t* values, const uint16_t* end, uint16_t* out) {
  int64_t at = 0;
  for (; at + kWordBits <= n && end - values >= kWordBits; at += kWordBits) {
    for (int part = 0; part < 8; ++part) {
      const auto byte = uint8_t(bits[at / kWordBits] >> (8 * part));
      vst1q_u16(out + at + 8 * part, eight(values, byte));
      values += count_bits(byte);
    }
  }
  return expand_generic(bits + at / kWordBits, n - at, values, end, out + at);
}

const uint16_t* widen(const uint64_t* bits, int64_t n, const uint16_t* values, const uint16_t* end, float* out) {
  int64_t at = 0;
  for (; at + kWordBits <= n && end - values >= kWordBits; at += kWordBits) {
    for (int part = 0; part < 8; ++part) {
      const auto byte = uint8_t(bits[at / kWordBits] >> (8 * part));
      const uint16x8_t halves = eight(values, byte);
      vst1q_f32(out + at + 8 * part, first(halves));
      vst1q_f32(out + at + 8 * part + 4, second(halves));
      values += count_bits(byte);
    }
  }
  return expand_generic(bits + at / kWordBits, n - at, values, end, out + at);
}

}  // namespace

extern const Path kNeon;
const Path kNeon = {
    "neon",        usable, false, by_tokens<Bf16>, by_tokens<F32>, expand16,
    expand_generic<uint32_t, uint32_t>, widen, round_generic,
    lanes::kTraining,
};

}  // namespace es
