// Elementwise parts of training in one pass each; T is float or uint16_t (bfloat16), all sums are float32.
#pragma once
#include <cmath>

#include "vectors.h"

namespace es {
namespace {
namespace lanes {

constexpr int64_t kRun = 4096;  // of a row's loss is summed in float32, and the runs in double

// The largest element; NaN may be missed, but is in every sum over the row.
template <class T>
ES_INLINE float row_largest(const T* x, int64_t n) {
  F a = all(-INFINITY), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) a = larger(load(x + i), a), b = larger(load(x + i + kLanes), b);
  for (; i < n; i += kLanes) a = larger(n - i >= kLanes ? load(x + i) : load_part(x + i, n - i, -INFINITY), a);
  return largest(larger(a, b));
}

// log(sum of exp) of a row. Infinite or NaN elements give what the formula gives.
template <class T>
ES_INLINE float row_logsumexp(const T* x, int64_t n) {
  const float top = row_largest(x, n);
  F a{}, b{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) a += exp(load(x + i) - top), b += exp(load(x + i + kLanes) - top);
  for (; i + kLanes <= n; i += kLanes) a += exp(load(x + i) - top);
  if (i < n) a += exp(load_part(x + i, n - i, -INFINITY) - top);
  return top + std::log(sum(a + b));
}

// KL(teacher || student) of a row of logits; the student's gradient, its share minus the teacher's, goes to `grad`.
template <class T>
double kl_row(const void* student_row, const void* teacher_row, void* grad_row, int64_t n) {
  const auto *student = static_cast<const T*>(student_row), *teacher = static_cast<const T*>(teacher_row);
  auto* grad = static_cast<T*>(grad_row);
  const float log_q = row_logsumexp(student, n), log_p = row_logsumexp(teacher, n);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    F sums{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const F t = load(teacher + i) - log_p, s = load(student + i) - log_q, p = exp(t);
      sums += p * (t - s);
      store(exp(s) - p, grad + i);
    }
    if (i < end) {  // logits of 0 in the lanes beyond the row: finite, and not counted
      const F t = load_part(teacher + i, end - i, 0) - log_p, s = load_part(student + i, end - i, 0) - log_q;
      const F p = exp(t);
      float terms[kLanes];
      store(p * (t - s), terms);
      for (int64_t k = 0; k < end - i; ++k) total += terms[k];
      store_part(exp(s) - p, grad + i, end - i);
    }
    total += sum(sums);
  }
  return total;
}

// Softmax of the first `seen` of `n` scores in place, zeros behind; `scratch` holds n float32 and a vector more.
template <class T>
void softmax_row(void* row, int64_t seen, int64_t n, float* scratch) {
  auto* scores = static_cast<T*>(row);
  const float top = row_largest(scores, seen);
  F sums{};
  int64_t i = 0;
  for (; i < seen; i += kLanes) {
    const F x = seen - i >= kLanes ? load(scores + i) : load_part(scores + i, seen - i, -INFINITY);
    const F e = exp(x - top);
    sums += e;
    store(e, scratch + i);
  }
  const float factor = 1.0f / sum(sums);
  for (i = 0; i + kLanes <= seen; i += kLanes) store(load(scratch + i) * factor, scores + i);
  if (i < seen) store_part(load(scratch + i) * factor, scores + i, seen - i);
  std::memset(scores + seen, 0, size_t(n - seen) * sizeof(T));
}

// (grad - sum of grad * share) * share in place of `grad`, over the first `seen` of `n`; zeros behind.
template <class T>
void softmax_backward_row(void* grad_row, const void* shares_row, int64_t seen, int64_t n) {
  auto* grad = static_cast<T*>(grad_row);
  const auto* shares = static_cast<const T*>(shares_row);
  F sums{};
  int64_t i = 0;
  for (; i + kLanes <= seen; i += kLanes) sums += load(grad + i) * load(shares + i);
  const int64_t rest = seen - i;
  if (rest) sums += load_part(grad + i, rest, 0) * load_part(shares + i, rest, 0);
  const float mean = sum(sums);
  for (i = 0; i + kLanes <= seen; i += kLanes) store((load(grad + i) - mean) * load(shares + i), grad + i);
  if (rest) store_part((load_part(grad + i, rest, 0) - mean) * load_part(shares + i, rest, 0), grad + i, rest);
  std::memset(grad + seen, 0, size_t(n - seen) * sizeof(T));
}

// A level's weight: (weight + B A) where the mask is set, +0 elsewhere; rounded once.
template <int R, int C, class T>
ES_INLINE void merge_block(const Merge& m, int64_t row, int64_t column) {
  F sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = load(m.weight + (row + r) * m.width + column + c * kLanes);
  for (int64_t k = 0; k < m.rank; ++k) {
    F a[C];
    for (int c = 0; c < C; ++c) a[c] = load(m.a + k * m.width + column + c * kLanes);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] += a[c] * m.b[(row + r) * m.b_stride + k];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      const int64_t at = (row + r) * m.width + column + c * kLanes;
      store(masked(sums[r][c], m.mask + at), static_cast<T*>(m.out) + at);
    }
}

template <int C, class T>
ES_INLINE void merge_columns(const Merge& m, int64_t begin, int64_t end, int64_t column) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) merge_block<4, C, T>(m, row, column);
  for (; row < end; ++row) merge_block<1, C, T>(m, row, column);
}

// Panels of columns, so that their part of A stays in the first cache while all rows pass.
template <class T>
void merge_rows(const Merge& m, int64_t begin, int64_t end) {
  constexpr int kPanel = kLanes == 16 ? 4 : 2;  // of 32 and of 16 registers
  int64_t column = 0;
  for (; column + kPanel * kLanes <= m.width; column += kPanel * kLanes) merge_columns<kPanel, T>(m, begin, end, column);
  for (; column + kLanes <= m.width; column += kLanes) merge_columns<1, T>(m, begin, end, column);
  for (; column < m.width; ++column)
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * m.width + column;
      float sum = m.weight[at];
      for (int64_t k = 0; k < m.rank; ++k) sum += m.a[k * m.width + column] * m.b[row * m.b_stride + k];
      es::store(m.mask[at] ? sum : 0.0f, static_cast<T*>(m.out) + at);
    }
}

// Zeros in `grad` where the mask is clear; the same in float32 to `wide`.
inline void mask_gradient(const uint8_t* mask, uint16_t* grad, float* wide, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const F kept = masked(load(grad + i), mask + i);
    store(kept, wide + i);
    const H halves = __builtin_convertvector(U(kept) >> 16, H);
    std::memcpy(grad + i, &halves, sizeof halves);
  }
  for (; i < end; ++i) {
    grad[i] = mask[i] ? grad[i] : 0;
    wide[i] = to_float(grad[i]);
  }
}

// x / (1 + exp(-x)).
ES_INLINE F sigmoid(F x) {
  const F e = exp(x > 0.0f ? -x : x);  // at most 1: no overflow
  return (x > 0.0f ? all(1) : e) / (1.0f + e);
}

template <class T>
void silu(const void* from, void* to, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(from);
  auto* y = static_cast<T*>(to);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const F at = load(x + i);
    store(at * sigmoid(at), y + i);
  }
  if (i < end) {
    const F at = load_part(x + i, end - i, 0);
    store_part(at * sigmoid(at), y + i, end - i);
  }
}

// grad * s (1 + x (1 - s)), s the sigmoid of x.
template <class T>
void silu_backward(const void* input, const void* upstream, void* to, int64_t begin, int64_t end) {
  const auto *x = static_cast<const T*>(input), *grad = static_cast<const T*>(upstream);
  auto* out = static_cast<T*>(to);
  int64_t i = begin;
  for (; i < end; i += kLanes) {
    const bool whole = end - i >= kLanes;
    const F at = whole ? load(x + i) : load_part(x + i, end - i, 0), s = sigmoid(at);
    const F g = whole ? load(grad + i) : load_part(grad + i, end - i, 0);
    const F found = g * s * (1.0f + at * (1.0f - s));
    if (whole) store(found, out + i);
    else store_part(found, out + i, end - i);
  }
}

constexpr Training kTraining = {
      {kl_row<float>, kl_row<uint16_t>},
      {softmax_row<float>, softmax_row<uint16_t>},
      {softmax_backward_row<float>, softmax_backward_row<uint16_t>},
      {merge_rows<float>, merge_rows<uint16_t>},
      mask_gradient,
      {silu<float>, silu<uint16_t>},
      {silu_backward<float>, silu_backward<uint16_t>},
};

}  // namespace lanes
}  // namespace
}  // namespace es
