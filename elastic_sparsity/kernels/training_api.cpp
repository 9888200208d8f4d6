// The C interface of the elementwise parts of training. Shapes are checked in `fused.py`.
#include <memory>

#include "kernels.h"
#include "parallel.h"

using namespace es;

namespace {

constexpr int64_t kPiece = 1 << 15;  // elements a thread takes at once; a fork costs as much as some thousands
constexpr int64_t kSlackLanes = 16;

inline int64_t rows_of_a_piece(int64_t width) { return kPiece / (width ? width : 1) + 1; }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// KL of every row into `losses`, (rows,); the gradients of the student's (rows, width) into `grad`.
void es_kl(int32_t path, Fork fork, int32_t threads, int32_t dtype, int64_t rows, int64_t width, const char* student,
           const char* teacher, char* grad, double* losses) {
  const int64_t row_bytes = width * (dtype == kBfloat16 ? 2 : 4);
  const auto kernel = kPaths[path]->training.kl_row[dtype];
  parallel(fork, threads, rows, rows_of_a_piece(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      losses[r] = kernel(student + r * row_bytes, teacher + r * row_bytes, grad + r * row_bytes, width);
  });
}

// Softmax in place of (count * size, start + size) scores: row i of every `size` sees start + i % size + 1 of them.
void es_causal_softmax(int32_t path, Fork fork, int32_t threads, int32_t dtype, int64_t count, int64_t size,
                       int64_t start, char* scores) {
  const int64_t width = start + size, row_bytes = width * (dtype == kBfloat16 ? 2 : 4);
  const auto kernel = kPaths[path]->training.softmax_row[dtype];
  parallel(fork, threads, count * size, rows_of_a_piece(width), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[size_t(width + kSlackLanes)]);
    for (int64_t r = begin; r < end; ++r) kernel(scores + r * row_bytes, start + r % size + 1, width, scratch.get());
  });
}

// Rows of x, (rows, width) float32; `factors` (rows,) is what the gradient needs.
void es_rms_norm(int32_t path, Fork fork, int32_t threads, int64_t rows, int64_t width, const float* x, const float* w,
                 double eps, float* y, float* factors) {
  const auto kernel = kPaths[path]->training.rms_norm_row;
  parallel(fork, threads, rows, rows_of_a_piece(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) factors[r] = kernel(x + r * width, w, float(eps), y + r * width, width);
  });
}

void es_rms_norm_backward(int32_t path, Fork fork, int32_t threads, int64_t rows, int64_t width, const float* x,
                          const float* w, const float* grad, const float* factors, float* out) {
  const auto kernel = kPaths[path]->training.rms_norm_backward_row;
  parallel(fork, threads, rows, rows_of_a_piece(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernel(x + r * width, w, grad + r * width, factors[r], out + r * width, width);
  });
}

// x and y: (samples, heads, tokens, width) with whole rows of `width`, at the given strides in elements, in this order.
// Angles: (samples or 1, tokens, width), `angle_stride` elements from sample to sample.
void es_rotary(int32_t path, Fork fork, int32_t threads, int32_t dtype, int64_t samples, int64_t heads, int64_t tokens,
               int64_t width, const char* x, int64_t x_sample, int64_t x_head, int64_t x_token, const float* cosines,
               const float* sines, int64_t angle_stride, char* y, int64_t y_sample, int64_t y_head, int64_t y_token,
               int32_t transpose) {
  const int64_t size = dtype == kBfloat16 ? 2 : 4;
  const auto kernel = kPaths[path]->training.rotary_row[dtype];
  parallel(fork, threads, samples * tokens, rows_of_a_piece(heads * width), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t s = at / tokens, t = at % tokens, angles = s * angle_stride + t * width;
      for (int64_t h = 0; h < heads; ++h)
        kernel(x + (s * x_sample + h * x_head + t * x_token) * size, cosines + angles, sines + angles,
               y + (s * y_sample + h * y_head + t * y_token) * size, width / 2, transpose);
    }
  });
}

}  // extern "C"
#pragma GCC visibility pop
