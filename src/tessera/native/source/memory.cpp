// Memory that a process has freed stays its own: a training step frees and asks for the same blocks again and again, and
// each block that went back to the system comes as pages that have to be cleared first.

#include <stdint.h>
#include <stdlib.h>  // which says whether this is glibc

#if defined(__GLIBC__)
#include <malloc.h>
#endif

// Returns 1 where the allocator took the wish, 0 where it has no such setting.
extern "C" __attribute__((visibility("default"))) int64_t tessera_keep_freed_memory() {
#if defined(__GLIBC__)
    const int largest_block = 32 << 20;  // the most that glibc takes; larger blocks are always mapped anew
    return mallopt(M_MMAP_THRESHOLD, largest_block) && mallopt(M_TRIM_THRESHOLD, INT32_MAX);
#else
    return 0;
#endif
}
