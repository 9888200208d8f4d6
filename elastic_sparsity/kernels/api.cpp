// The C interface that `native.py` calls. Sizes are checked there; counts and bits of files are checked here.
#include <memory>

#include "generic.h"
#include "parallel.h"

namespace es {

extern const Path kPortable;
#if defined(ES_AVX512)
extern const Path kAvx512;
#endif
#if defined(ES_AVX2)
extern const Path kAvx2;
#endif
#if defined(ES_NEON)
extern const Path kNeon;
#endif

const Path* const kPaths[] = {
#if defined(ES_AVX512)
    &kAvx512,
#endif
#if defined(ES_AVX2)
    &kAvx2,
#endif
#if defined(ES_NEON)
    &kNeon,
#endif
    &kPortable, nullptr};

namespace {

// Rows a thread takes at once: a few takes each, so that one slow thread is not waited for; small products stay whole.
int64_t row_chunk(int64_t rows, int64_t width, int32_t threads) {
  constexpr int64_t kSmallest = 1 << 16;  // weights; below that a fork costs more than it saves
  const int64_t least = (kSmallest + width - 1) / (width ? width : 1);
  int64_t chunk = rows / (4 * int64_t(threads > 0 ? threads : 1));
  chunk = (chunk + 3) / 4 * 4;
  return chunk > least ? chunk : least;
}

inline uint64_t load_word(const uint8_t* bytes, int64_t available) {
  uint64_t word = 0;
  std::memcpy(&word, bytes, available < 8 ? size_t(available) : 8);
  return word;
}

struct Shell {
  const void* values;
  int64_t count;
  int32_t dtype;
};

inline float value_at(const Shell& shell, int64_t i) {
  return shell.dtype == kBfloat16 ? to_float(static_cast<const uint16_t*>(shell.values)[i])
                                  : static_cast<const float*>(shell.values)[i];
}

}  // namespace
}  // namespace es

using namespace es;

#pragma GCC visibility push(default)
extern "C" {

// Raised whenever a signature or a meaning here changes: native.py refuses a library of another build.
int32_t es_version() { return 2; }

int32_t es_path_count() {
  int32_t count = 0;
  while (kPaths[count]) ++count;
  return count;
}
const char* es_path_name(int32_t path) { return kPaths[path]->name; }
int32_t es_path_usable(int32_t path) { return kPaths[path]->usable(); }

// y (tokens, rows) = x (tokens, width) times the transposed packed matrix, plus bias; all of one dtype, contiguous.
void es_product(int32_t path, Fork fork, int32_t threads, int32_t dtype, int64_t rows, int64_t width,
                const uint64_t* mask, const void* values, const int64_t* starts, const void* x, int64_t tokens,
                const void* bias, void* y) {
  const Path& isa = *kPaths[path];
  const int64_t words = (width + kWordBits - 1) / kWordBits, padded = words * kWordBits;
  const size_t size = dtype == kBfloat16 ? 2 : 4;
  const bool as_it_is = padded == width && (dtype == kFloat32 || isa.bfloat16_x);
  std::unique_ptr<char[]> copy;
  if (!as_it_is) {
    const bool widened = dtype == kBfloat16 && !isa.bfloat16_x;
    const size_t to_size = widened ? 4 : size;
    copy.reset(new char[size_t(tokens * padded) * to_size]());
    for (int64_t t = 0; t < tokens; ++t) {
      char* to = copy.get() + size_t(t * padded) * to_size;
      const char* from = static_cast<const char*>(x) + size_t(t * width) * size;
      if (widened) {
        for (int64_t i = 0; i < width; ++i)
          reinterpret_cast<float*>(to)[i] = to_float(reinterpret_cast<const uint16_t*>(from)[i]);
      } else {
        std::memcpy(to, from, size_t(width) * size);
      }
    }
  }
  const char* rows_of_x = as_it_is ? static_cast<const char*>(x) : copy.get();
  const size_t x_size = dtype == kBfloat16 && isa.bfloat16_x ? 2 : 4;
  parallel(fork, threads, rows, row_chunk(rows, width, threads), [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < tokens; first += kMaxTokens) {
      Product p;
      p.weight = {rows, width, words, mask, values, starts};
      p.x = rows_of_x + size_t(first * padded) * x_size;
      p.x_stride = padded;
      p.tokens = int32_t(tokens - first < kMaxTokens ? tokens - first : kMaxTokens);
      p.bias = bias;
      p.y = static_cast<char*>(y) + size_t(first * rows) * size;
      p.y_stride = rows;
      (dtype == kBfloat16 ? isa.product_bf16 : isa.product_f32)(p, begin, end);
    }
  });
}

// Rows [begin, end) of a packed matrix as dense rows of `width`.
void es_expand_rows(int32_t path, Fork fork, int32_t threads, int32_t size, int64_t begin, int64_t end, int64_t width,
                    const uint64_t* mask, const void* values, const int64_t* starts, const void* values_end,
                    void* out) {
  const Path& isa = *kPaths[path];
  const int64_t words = (width + kWordBits - 1) / kWordBits;
  parallel(fork, threads, end - begin, row_chunk(end - begin, width, threads), [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const uint64_t* bits = mask + (begin + r) * words;
      const int64_t start = starts[begin + r];
      if (size == 2)
        isa.expand16(bits, width, static_cast<const uint16_t*>(values) + start,
                     static_cast<const uint16_t*>(values_end), static_cast<uint16_t*>(out) + r * width);
      else
        isa.expand32(bits, width, static_cast<const uint32_t*>(values) + start,
                     static_cast<const uint32_t*>(values_end), static_cast<uint32_t*>(out) + r * width);
    }
  });
}

// ---- Shells of a file. `covered` and `pattern` are ceil(n / 64) words; out is (n,) float32. Each returns how many
// weights it placed, or -1: padding bits set, -2: more bits than values (nothing is read beyond them).

static bool padding_is_clear(const uint8_t* bits, int64_t n) {
  return n % 8 == 0 || !(bits[n / 8] >> (n % 8));
}

// The first shell: fills `out` whole.
int64_t es_place_core(int32_t path, const uint8_t* bits, int64_t n, int32_t dtype, const void* values, int64_t count,
                      uint64_t* covered, float* out) {
  if (!padding_is_clear(bits, n)) return -1;
  const int64_t bytes = (n + 7) / 8, words = (n + kWordBits - 1) / kWordBits;
  int64_t placed = 0;
  for (int64_t w = 0; w < words; ++w) {
    covered[w] = load_word(bits + 8 * w, bytes - 8 * w);
    placed += count_bits(covered[w]);
  }
  if (placed > count) return -2;
  if (!placed) {
    std::memset(out, 0, size_t(n) * sizeof(float));
    return 0;
  }
  const Path& isa = *kPaths[path];
  if (dtype == kBfloat16) {
    const auto* from = static_cast<const uint16_t*>(values);
    isa.widen(covered, n, from, from + count, out);
  } else {
    const auto* from = static_cast<const uint32_t*>(values);
    isa.expand32(covered, n, from, from + count, reinterpret_cast<uint32_t*>(out));
  }
  return placed;
}

// A bitmap: of an increment (all its bits are new), or of a pattern (`pattern` gets it; bits not covered are new).
int64_t es_place_bitmap(const uint8_t* bits, int64_t n, int32_t dtype, const void* values, int64_t count,
                        uint64_t* covered, uint64_t* pattern, float* out) {
  if (!padding_is_clear(bits, n)) return -1;
  const int64_t bytes = (n + 7) / 8, words = (n + kWordBits - 1) / kWordBits;
  const Shell shell{values, count, dtype};
  int64_t placed = 0;
  for (int64_t w = 0; w < words; ++w) {
    const uint64_t listed = load_word(bits + 8 * w, bytes - 8 * w);
    if (pattern) pattern[w] = listed;
    uint64_t fresh = pattern ? listed & ~covered[w] : listed;
    covered[w] |= listed;
    const int64_t here = count_bits(fresh);
    if (placed + here > count) return -2;
    for (; fresh; fresh &= fresh - 1) out[w * kWordBits + __builtin_ctzll(fresh)] = value_at(shell, placed++);
  }
  return placed;
}

// Elias-Fano positions, see packing.py: `low` bit planes of ceil(count / 8) bytes, then the bitmap of high parts.
// Also -3: not increasing or out of range; -4: another number of set bits than `count`.
int64_t es_place_positions(const uint8_t* packed, int64_t count, int64_t n, int32_t low, int32_t dtype,
                           const void* values, uint64_t* covered, float* out) {
  const int64_t plane = (count + 7) / 8, high_bits = count + ((n - 1) >> low), bytes = (high_bits + 7) / 8;
  for (int32_t j = 0; j < low; ++j)
    if (!padding_is_clear(packed + j * plane, count)) return -1;
  const uint8_t* high = packed + low * plane;
  if (!padding_is_clear(high, high_bits)) return -4;
  const Shell shell{values, count, dtype};
  int64_t i = 0, previous = -1;
  uint64_t lows[8];
  for (int64_t byte = 0; byte < bytes; byte += 8) {
    for (uint64_t word = load_word(high + byte, bytes - byte); word; word &= word - 1) {
      if (i == count) return -4;
      if (i % 8 == 0) {  // low parts of the next eight positions
        for (int k = 0; k < 8; ++k) lows[k] = 0;
        for (int32_t j = 0; j < low; ++j) {
          const unsigned bits = packed[j * plane + i / 8];
          for (int k = 0; k < 8; ++k) lows[k] |= uint64_t(bits >> k & 1) << j;
        }
      }
      const int64_t position = ((byte * 8 + __builtin_ctzll(word) - i) << low) | int64_t(lows[i % 8]);
      if (position <= previous || position >= n) return -3;
      previous = position;
      covered[position / kWordBits] |= uint64_t(1) << (position % kWordBits);
      out[position] = value_at(shell, i++);
    }
  }
  return i == count ? count : -4;
}

int64_t es_count_bits(const uint64_t* bits, int64_t words) {
  int64_t found = 0;
  for (int64_t w = 0; w < words; ++w) found += count_bits(bits[w]);
  return found;
}

// How many rows keep another number than `kept`.
int64_t es_wrong_rows(const uint64_t* bits, int64_t rows, int64_t width, int64_t kept) {
  int64_t wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t at = row * width, left = width, found = 0;
    while (left > 0) {
      const int64_t offset = at % kWordBits, here = left < kWordBits - offset ? left : kWordBits - offset;
      uint64_t word = bits[at / kWordBits] >> offset;
      if (here < kWordBits) word &= (uint64_t(1) << here) - 1;
      found += count_bits(word);
      at += here, left -= here;
    }
    wrong += found != kept;
  }
  return wrong;
}

// How many groups of `size` neighbours keep more than `kept`; n is a multiple of size, size at most 64.
int64_t es_wrong_groups(const uint64_t* bits, int64_t n, int32_t kept, int32_t size) {
  const uint64_t ones = size < 64 ? (uint64_t(1) << size) - 1 : ~uint64_t(0);
  int64_t wrong = 0;
  for (int64_t at = 0; at < n; at += size) {
    const int64_t w = at / kWordBits, offset = at % kWordBits;
    uint64_t group = bits[w] >> offset;
    if (offset + size > kWordBits) group |= bits[w + 1] << (kWordBits - offset);
    wrong += count_bits(group & ones) > kept;
  }
  return wrong;
}

// Whether no element has all bits of `exponent` set, as NaN and infinity have.
int32_t es_all_finite(const void* data, int64_t n, int32_t size, uint32_t exponent) {
  bool finite = true;
  if (size == 2) {
    const auto* bits = static_cast<const uint16_t*>(data);
    for (int64_t i = 0; i < n; ++i) finite &= (bits[i] & exponent) != exponent;
  } else {
    const auto* bits = static_cast<const uint32_t*>(data);
    for (int64_t i = 0; i < n; ++i) finite &= (bits[i] & exponent) != exponent;
  }
  return finite;
}

// A finished weight: rounded to `dtype`, +0 where bits are clear. 0 if a kept value is NaN or infinite in it.
int32_t es_finish(int32_t path, const uint64_t* bits, int64_t n, const float* merged, int32_t dtype, void* out) {
  if (dtype == kBfloat16) return kPaths[path]->round_bf16(bits, n, merged, static_cast<uint16_t*>(out));
  auto* to = static_cast<uint32_t*>(out);
  const auto* from = reinterpret_cast<const uint32_t*>(merged);
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t keep = uint32_t(0) - uint32_t(bits[i / kWordBits] >> (i % kWordBits) & 1);
    to[i] = from[i] & keep;
    finite &= (to[i] & 0x7f800000u) != 0x7f800000u;
  }
  return finite;
}

// A finished weight packed by rows. values has room for every bit and kSlack more (zeroed here). Returns the number of
// values, or -1 if one is NaN or infinite.
int64_t es_pack_rows(const uint64_t* bits, int64_t rows, int64_t width, const float* merged, int32_t dtype,
                     uint64_t* mask, int64_t* starts, void* values) {
  const int64_t words = (width + kWordBits - 1) / kWordBits;
  int64_t next = 0;
  bool finite = true;
  for (int64_t row = 0; row < rows; ++row) {
    starts[row] = next;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t at = row * width + w * kWordBits, left = width - w * kWordBits, offset = at % kWordBits;
      uint64_t word = bits[at / kWordBits] >> offset;
      const int64_t here = left < kWordBits ? left : kWordBits;
      if (offset && offset + here > kWordBits) word |= bits[at / kWordBits + 1] << (kWordBits - offset);
      if (here < kWordBits) word &= (uint64_t(1) << here) - 1;
      mask[row * words + w] = word;
      for (; word; word &= word - 1) {
        const float value = merged[at + __builtin_ctzll(word)];
        if (dtype == kBfloat16) {
          const uint16_t half = to_bf16(value);
          static_cast<uint16_t*>(values)[next++] = half;
          finite &= (half & 0x7f80) != 0x7f80;
        } else {
          uint32_t same;
          std::memcpy(&same, &value, 4);
          static_cast<uint32_t*>(values)[next++] = same;
          finite &= (same & 0x7f800000u) != 0x7f800000u;
        }
      }
    }
  }
  starts[rows] = next;
  const size_t size = dtype == kBfloat16 ? 2 : 4;
  std::memset(static_cast<char*>(values) + size_t(next) * size, 0, kSlack * size);
  return finite ? next : -1;
}

}  // extern "C"
#pragma GCC visibility pop
