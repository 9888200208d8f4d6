// Every instruction path of a build against the portable one, on random matrices: for processors that pytest does not run
// on. tests/test_kernels_arm.py compiles it for 64-bit Arm and runs it in an emulator. Prints what it checked; exit 1: differs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../elastic_sparsity/kernels/kernels.h"

using namespace es;

static std::mt19937 rng(0);
static int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
static float normal() { return std::normal_distribution<float>()(rng); }
static uint16_t half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);
}

struct Matrix {
  int64_t rows, width, words;
  std::vector<uint64_t> mask;
  std::vector<uint16_t> halves;
  std::vector<float> floats;
  std::vector<int64_t> starts;
};

static Matrix random_matrix(double kept) {
  Matrix m;
  m.rows = uniform(1, 9), m.width = uniform(1, 400), m.words = (m.width + 63) / 64;
  m.mask.assign(size_t(m.rows * m.words), 0);
  std::bernoulli_distribution keep(kept);
  for (int64_t r = 0; r < m.rows; ++r) {
    m.starts.push_back(int64_t(m.floats.size()));
    for (int64_t i = 0; i < m.width; ++i) {
      if (!keep(rng)) continue;
      m.mask[size_t(r * m.words + i / 64)] |= uint64_t(1) << (i % 64);
      const float value = normal();
      m.floats.push_back(value), m.halves.push_back(half(value));
    }
  }
  m.starts.push_back(int64_t(m.floats.size()));
  m.floats.resize(m.floats.size() + kSlack), m.halves.resize(m.halves.size() + kSlack);
  return m;
}

static int failures = 0;
static void expect(bool good, const char* path, const char* what) {
  if (!good) ++failures, std::printf("%s: %s differs from the portable path\n", path, what);
}

static void check_products(const Path& path, const Path& reference, const Matrix& m) {
  const int tokens = uniform(1, kMaxTokens);
  const int64_t stride = m.words * 64;
  std::vector<float> x(size_t(tokens * stride));
  std::vector<uint16_t> x_halves(x.size());
  for (int t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < m.width; ++i) {
      const uint32_t bits = uint32_t(half(normal())) << 16;
      std::memcpy(&x[size_t(t * stride + i)], &bits, 4);
      x_halves[size_t(t * stride + i)] = uint16_t(bits >> 16);
    }
  for (int is_float = 0; is_float < 2; ++is_float) {
    std::vector<float> found(size_t(tokens * m.rows)), expected(found.size());
    std::vector<uint16_t> found_halves(found.size()), expected_halves(found.size());
    Product p;
    p.weight = {m.rows, m.width, m.words, m.mask.data(),
                is_float ? static_cast<const void*>(m.floats.data()) : m.halves.data(), m.starts.data()};
    p.x = x.data(), p.x_stride = stride, p.tokens = tokens, p.bias = nullptr, p.y_stride = m.rows;
    p.y = is_float ? static_cast<void*>(expected.data()) : expected_halves.data();
    (is_float ? reference.product_f32 : reference.product_bf16)(p, 0, m.rows);
    if (!is_float && path.bfloat16_x) p.x = x_halves.data();
    p.y = is_float ? static_cast<void*>(found.data()) : found_halves.data();
    (is_float ? path.product_f32 : path.product_bf16)(p, 0, m.rows);
    for (size_t i = 0; i < found.size(); ++i) {
      float a = found[i], b = expected[i];
      if (!is_float) {
        const uint32_t wide_a = uint32_t(found_halves[i]) << 16, wide_b = uint32_t(expected_halves[i]) << 16;
        std::memcpy(&a, &wide_a, 4), std::memcpy(&b, &wide_b, 4);
      }
      expect(std::fabs(a - b) <= (is_float ? 1e-4f : 0.01f * std::fabs(b) + 1e-3f), path.name, "a product");
    }
  }
}

template <class In, class Out>
using Expand = const In* (*)(const uint64_t*, int64_t, const In*, const In*, Out*);

template <class In, class Out>
static void check_expand(const char* name, Expand<In, Out> path, Expand<In, Out> reference, const Matrix& m,
                         const std::vector<In>& values) {
  for (int64_t r = 0; r < m.rows; ++r) {
    std::vector<Out> found(size_t(m.width), Out(7)), expected(found);
    const In* first = values.data() + m.starts[size_t(r)];
    const In* end = values.data() + m.starts[size_t(r) + 1] + uniform(-1, 1);  // one too few must be refused
    const auto* mask = m.mask.data() + r * m.words;
    if (end < first) continue;
    const In* a = path(mask, m.width, first, end, found.data());
    const In* b = reference(mask, m.width, first, end, expected.data());
    expect(a == b, name, "the number of values an expansion takes");
    if (b) expect(!std::memcmp(found.data(), expected.data(), found.size() * sizeof(Out)), name, "an expansion");
  }
}

int main() {
  int paths = 0;
  while (kPaths[paths]) ++paths;
  const Path& reference = *kPaths[paths - 1];
  for (int index = 0; index + 1 < paths; ++index) {
    const Path& path = *kPaths[index];
    if (!path.usable()) continue;
    for (int round = 0; round < 400; ++round) {
      const Matrix m = random_matrix(round % 5 / 4.0);
      check_products(path, reference, m);
      check_expand<uint16_t, uint16_t>(path.name, path.expand16, reference.expand16, m, m.halves);
      check_expand<uint16_t, float>(path.name, path.widen, reference.widen, m, m.halves);
      std::vector<uint32_t> words(m.floats.size());
      std::memcpy(words.data(), m.floats.data(), 4 * words.size());
      check_expand<uint32_t, uint32_t>(path.name, path.expand32, reference.expand32, m, words);
      std::vector<uint64_t> bits(m.mask.begin(), m.mask.begin() + m.words);
      std::vector<float> in(size_t(m.width));
      for (float& value : in) value = uniform(0, 50) ? normal() : INFINITY;
      std::vector<uint16_t> found(in.size()), expected(in.size());
      const bool a = path.round_bf16(bits.data(), m.width, in.data(), found.data());
      const bool b = reference.round_bf16(bits.data(), m.width, in.data(), expected.data());
      expect(a == b && found == expected, path.name, "rounding");
    }
    std::printf("%s: 400 matrices\n", path.name);
  }
  return failures != 0;
}
