// Plain C++: what every other path is tested against.
#include "generic.h"
#define ES_LANES 4
#include "training.h"

namespace es {
namespace {
bool always() { return true; }
}  // namespace

extern const Path kPortable;
const Path kPortable = {
    "portable",
    always,
    false,
    product_generic<uint16_t, uint16_t>,
    product_generic<uint32_t, float>,
    expand_generic<uint16_t, uint16_t>,
    expand_generic<uint32_t, uint32_t>,
    expand_generic<uint16_t, float>,
    round_generic,
    lanes::kTraining,
};

}  // namespace es
