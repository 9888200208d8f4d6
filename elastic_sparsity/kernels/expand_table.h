// For instruction sets without an expand instruction: where each of 8 lanes takes its value from, a byte of mask a row.
#pragma once
#include <cstdint>

namespace es {
namespace {

struct ExpandTable {
  // Byte shuffles of eight 16-bit lanes; 0x80 and above gives zero on x86 and on Arm.
  alignas(64) uint8_t bytes[256][16];
  constexpr ExpandTable() : bytes() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool set = mask >> lane & 1;
        bytes[mask][2 * lane] = set ? uint8_t(2 * next) : 0x80;
        bytes[mask][2 * lane + 1] = set ? uint8_t(2 * next + 1) : 0x80;
        next += set;
      }
    }
  }
};
constexpr ExpandTable kExpand{};

}  // namespace
}  // namespace es
