// Elementwise parts of training in one pass each; T is float or uint16_t (bfloat16), all sums are float32.
#pragma once
#include <cmath>

#include "vectors.h"

namespace es {
namespace {
namespace lanes {

constexpr int64_t kRun = 4096;  // elements of a row that are summed in float32; the runs' sums are added in double

// The largest element; NaN may be missed, but is in every sum over the row.
template <class T>
ES_INLINE float row_largest(const T* x, int64_t n) {
  F a = all(-INFINITY), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) a = larger(load(x + i), a), b = larger(load(x + i + kLanes), b);
  for (; i < n; i += kLanes) a = larger(n - i >= kLanes ? load(x + i) : load_part(x + i, n - i, -INFINITY), a);
  return largest(larger(a, b));
}

// log(sum of exp) of a row, in two parts: added up they would lose what is small beside a large logit.
struct LogSum {
  float top, rest;
};
ES_INLINE F log_share(F x, LogSum of) { return x - of.top - of.rest; }

// Infinite or NaN elements give what the formula gives.
template <class T>
ES_INLINE LogSum row_logsumexp(const T* x, int64_t n) {
  const float top = row_largest(x, n);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    F a{}, b{};
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) a += exp(load(x + i) - top), b += exp(load(x + i + kLanes) - top);
    for (; i + kLanes <= end; i += kLanes) a += exp(load(x + i) - top);
    if (i < end) a += exp(load_part(x + i, end - i, -INFINITY) - top);
    total += sum(a + b);
  }
  return {top, float(std::log(total))};
}

// KL(teacher || student) of a row of logits; the student's gradient, its share minus the teacher's, goes to `grad`.
template <class T>
double kl_row(const void* student_row, const void* teacher_row, void* grad_row, int64_t n) {
  const auto *student = static_cast<const T*>(student_row), *teacher = static_cast<const T*>(teacher_row);
  auto* grad = static_cast<T*>(grad_row);
  const LogSum q_sum = row_logsumexp(student, n), p_sum = row_logsumexp(teacher, n);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    F sums{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const F t = log_share(load(teacher + i), p_sum), s = log_share(load(student + i), q_sum), p = exp(t);
      sums += p * (t - s);
      store(exp(s) - p, grad + i);
    }
    if (i < end) {  // logits of 0 in the lanes beyond the row: finite, and not counted
      const F t = log_share(load_part(teacher + i, end - i, 0), p_sum), p = exp(t);
      const F s = log_share(load_part(student + i, end - i, 0), q_sum);
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

// x w / sqrt(mean of squares + eps); returns the root's inverse.
inline float rms_norm_row(const float* x, const float* w, float eps, float* y, int64_t n) {
  F a{}, b{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const F first = load(x + i), second = load(x + i + kLanes);
    a += first * first, b += second * second;
  }
  for (; i < n; i += kLanes) {
    const F last = n - i >= kLanes ? load(x + i) : load_part(x + i, n - i, 0);
    a += last * last;
  }
  const float factor = 1.0f / std::sqrt(sum(a + b) / float(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) store(load(x + i) * factor * load(w + i), y + i);
  for (; i < n; ++i) y[i] = x[i] * factor * w[i];
  return factor;
}

// f w g - x f^3 mean(x w g), f the factor above.
inline void rms_norm_backward_row(const float* x, const float* w, const float* g, float factor, float* out, int64_t n) {
  F sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load(x + i) * load(w + i) * load(g + i);
  float total = sum(sums);
  for (; i < n; ++i) total += x[i] * w[i] * g[i];
  const float along = factor * factor * factor * (total / float(n));
  for (i = 0; i + kLanes <= n; i += kLanes) store(load(w + i) * load(g + i) * factor - load(x + i) * along, out + i);
  for (; i < n; ++i) out[i] = w[i] * g[i] * factor - x[i] * along;
}

// One head's half-rotation: (a, b) -> (a cos - b sin, b cos + a sin), each half with its own angles; or its transpose.
template <class T>
void rotary_row(const void* from, const float* cosines, const float* sines, void* to, int64_t half, int32_t transpose) {
  const auto* x = static_cast<const T*>(from);
  auto* y = static_cast<T*>(to);
  const float *cos_b = cosines + half, *sin_b = sines + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F a = load(x + i), b = load(x + half + i), s = load(sines + i), t = load(sin_b + i);
    store(transpose ? a * load(cosines + i) + b * t : a * load(cosines + i) - b * s, y + i);
    store(transpose ? b * load(cos_b + i) - a * s : b * load(cos_b + i) + a * t, y + half + i);
  }
  for (; i < half; ++i) {
    const float a = widened(x[i]), b = widened(x[half + i]), s = sines[i], t = sin_b[i];
    es::store(transpose ? a * cosines[i] + b * t : a * cosines[i] - b * s, y + i);
    es::store(transpose ? b * cos_b[i] - a * s : b * cos_b[i] + a * t, y + half + i);
  }
}

constexpr Training kTraining = {
    {kl_row<float>, kl_row<uint16_t>},
    {softmax_row<float>, softmax_row<uint16_t>},
    rms_norm_row,
    rms_norm_backward_row,
    {rotary_row<float>, rotary_row<uint16_t>},
};

}  // namespace lanes
}  // namespace
}  // namespace es
