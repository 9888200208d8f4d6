// How the C interface shares rows among threads.
#pragma once
#include <atomic>
#include <cstdint>

namespace es {
namespace {

// Runs `work(begin, end)` over [0, count) on torch's own OpenMP threads, whose entry point Python hands in: a second
// pool would fight with it for the cores, since idle OpenMP threads spin.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <class Work>
void parallel(Fork fork, int32_t threads, int64_t count, int64_t chunk, const Work& work) {
  if (!fork || threads < 2 || count <= chunk) return work(0, count);
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count, chunk;
    const Work* work;
  } shared;
  shared.count = count, shared.chunk = chunk, shared.work = &work;
  fork(
      [](void* data) {
        auto& s = *static_cast<Shared*>(data);
        for (int64_t at; (at = s.next.fetch_add(s.chunk)) < s.count;)
          (*s.work)(at, at + s.chunk < s.count ? at + s.chunk : s.count);
      },
      &shared, unsigned(threads), 0);
}

}  // namespace
}  // namespace es
