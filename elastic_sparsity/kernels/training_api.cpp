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

// Its gradient in place of `grad`, of the same shape as the softmax's result `shares`.
void es_causal_softmax_backward(int32_t path, Fork fork, int32_t threads, int32_t dtype, int64_t count, int64_t size,
                                int64_t start, char* grad, const char* shares) {
  const int64_t width = start + size, row_bytes = width * (dtype == kBfloat16 ? 2 : 4);
  const auto kernel = kPaths[path]->training.softmax_backward_row[dtype];
  parallel(fork, threads, count * size, rows_of_a_piece(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernel(grad + r * row_bytes, shares + r * row_bytes, start + r % size + 1, width);
  });
}

void es_merge(int32_t path, Fork fork, int32_t threads, int32_t dtype, int64_t rows, int64_t width, int64_t rank,
              const float* weight, const float* a, const float* b, int64_t b_stride, const uint8_t* mask, void* out) {
  const Merge merge{width, rank, weight, a, b, b_stride, mask, out};
  const auto kernel = kPaths[path]->training.merge_rows[dtype];
  parallel(fork, threads, rows, (rows_of_a_piece(width) + 3) / 4 * 4,
           [&](int64_t begin, int64_t end) { kernel(merge, begin, end); });
}

// `grad` (n,) bfloat16 masked in place, and in float32 in `wide`.
void es_mask_gradient(int32_t path, Fork fork, int32_t threads, int64_t n, const uint8_t* mask, uint16_t* grad,
                      float* wide) {
  const auto kernel = kPaths[path]->training.mask_gradient;
  parallel(fork, threads, n, kPiece, [&](int64_t begin, int64_t end) { kernel(mask, grad, wide, begin, end); });
}

void es_silu(int32_t path, Fork fork, int32_t threads, int32_t dtype, int64_t n, const void* x, void* y) {
  const auto kernel = kPaths[path]->training.silu[dtype];
  parallel(fork, threads, n, kPiece, [&](int64_t begin, int64_t end) { kernel(x, y, begin, end); });
}

void es_silu_backward(int32_t path, Fork fork, int32_t threads, int32_t dtype, int64_t n, const void* x,
                      const void* grad, void* out) {
  const auto kernel = kPaths[path]->training.silu_backward[dtype];
  parallel(fork, threads, n, kPiece, [&](int64_t begin, int64_t end) { kernel(x, grad, out, begin, end); });
}

}  // extern "C"
#pragma GCC visibility pop
