// What this machine can run, and the version of the interface: the two things Python asks before it calls a kernel.

#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// Raised whenever an entry point's arguments or meaning change; library.py refuses any other.
EXPORT int64_t tessera_version() { return 1; }

namespace {

enum Feature : int64_t { AVX2 = 1, AVX512 = 2, AVX512_BF16 = 4, AMX = 8 };

#if defined(__x86_64__)

uint64_t enabled_states() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

bool has(uint32_t word, int bit) { return word >> bit & 1; }

// The tiles' state is large, so Linux gives it only to processes that ask for it.
bool tiles_granted() {
#if defined(__linux__)
    const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}

int64_t detect() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 27)) return 0;  // OSXSAVE
    bool fma = has(c, 12);
    uint64_t states = enabled_states();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int64_t found = 0;
    if (fma && has(b, 5) && (states & 0x6) == 0x6) found |= AVX2;
    bool wide = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);  // F, DQ, BW, VL
    if ((found & AVX2) && wide && (states & 0xE6) == 0xE6) found |= AVX512;
    bool tiles = has(d, 22) && has(d, 24);  // AMX-BF16, AMX-TILE
    if (!(found & AVX512) || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !has(a, 5)) return found;
    found |= AVX512_BF16;
    if (tiles && (states & 0x60000) == 0x60000 && tiles_granted()) found |= AMX;
    return found;
}

#else

int64_t detect() { return 0; }

#endif

}  // namespace

EXPORT int64_t tessera_features() { return detect(); }
