// exponential.h by itself, so that it can be held to its bounds on every input.
// Variants: portable avx2 avx512

#include "exponential.h"

// Elements [begin, end) of x -> y: e^x, or ln x.
TESSERA_ENTRY(void, exponential)(int64_t begin, int64_t end, const float* x, float* y) {
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t count = end - i < LANES ? end - i : LANES;
        if (count == LANES) write(y + i, exponential(read(x + i)));
        else write_part(y + i, exponential(read_part(x + i, count)), count);
    }
}

TESSERA_ENTRY(void, logarithm)(int64_t begin, int64_t end, const float* x, float* y) {
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t count = end - i < LANES ? end - i : LANES;
        if (count == LANES) write(y + i, logarithm(read(x + i)));
        else write_part(y + i, logarithm(read_part(x + i, count)), count);
    }
}
