// What the compiled library does, and the table of instruction paths. C++17, no Python, no torch.
//
// Bits are least significant first and row-major; memory is little-endian. A packed matrix keeps, a row, whole 64-bit
// words of mask (bits beyond the width are zero) and its values one after another; behind the last value lie at least
// `kSlack` readable elements, so that vectors may be loaded whole.
#pragma once
#include <cstdint>

namespace es {

constexpr int64_t kWordBits = 64;
constexpr int64_t kSlack = 64;
constexpr int kMaxTokens = 8;  // of one pass over the weights

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

struct Packed {
  int64_t rows, width, words;  // words of mask a row
  const uint64_t* mask;        // (rows, words)
  const void* values;
  const int64_t* starts;  // (rows + 1,) first value of each row, and the number of values
};

// x is (tokens, words * 64), padded with zeros: bfloat16 if `bfloat16_x`, else float32. y is (tokens, rows) of the
// values' dtype, bias (rows,) of the same or null.
struct Product {
  Packed weight;
  const void* x;
  int64_t x_stride;
  int32_t tokens;  // 1 to kMaxTokens
  const void* bias;
  void* y;
  int64_t y_stride;
};

// Elementwise parts of training (training.h), by dtype where there are two. Rows and ranges are independent of each
// other, so results do not depend on the number of threads.
struct Training {
  double (*kl_row[2])(const void* student, const void* teacher, void* grad, int64_t n);
  void (*softmax_row[2])(void* scores, int64_t seen, int64_t n, float* scratch);
  float (*rms_norm_row)(const float* x, const float* w, float eps, float* y, int64_t n);
  void (*rms_norm_backward_row)(const float* x, const float* w, const float* g, float factor, float* out, int64_t n);
  void (*rotary_row[2])(const void* x, const float* cos, const float* sin, void* y, int64_t half, int32_t transpose);
};

// One instruction set. Every function gives what the portable one gives, products of finite x up to the order of
// summation (and AVX-512's flush subnormal factors to zero; zero times infinity is NaN only where zeros are multiplied).
struct Path {
  const char* name;
  bool (*usable)();
  bool bfloat16_x;  // takes bfloat16 x as it is; others get float32
  void (*product_bf16)(const Product&, int64_t begin, int64_t end);  // rows [begin, end)
  void (*product_f32)(const Product&, int64_t begin, int64_t end);
  // Values to where bits are set, zeros elsewhere; n outputs. Reads no value beyond `end`; returns the first one not
  // used, or null if there are more bits than values.
  const uint16_t* (*expand16)(const uint64_t* bits, int64_t n, const uint16_t* values, const uint16_t* end, uint16_t* out);
  const uint32_t* (*expand32)(const uint64_t* bits, int64_t n, const uint32_t* values, const uint32_t* end, uint32_t* out);
  // The same, bfloat16 to float32.
  const uint16_t* (*widen)(const uint64_t* bits, int64_t n, const uint16_t* values, const uint16_t* end, float* out);
  // float32 rounded to nearest even, +0 where bits are clear; false if a result is NaN or infinite.
  bool (*round_bf16)(const uint64_t* bits, int64_t n, const float* in, uint16_t* out);
  Training training;
};

extern const Path* const kPaths[];  // best first; null at the end

}  // namespace es
