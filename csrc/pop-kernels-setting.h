// This setting says which kernels run: the best for the processor, none, or, for tests, those of a lower instruction
// set of x86. Kernels that nobody has measured wait for "on": those for Arm, and those with AMX.

#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>

enum pop_kernels_setting {
    POP_KERNELS_OFF,
    POP_KERNELS_BEST,
#if !defined(__aarch64__)
    POP_KERNELS_TILES, // the best, which may also use the tiles of AMX
    POP_KERNELS_AVX2,
    POP_KERNELS_AVX_VNNI,
#endif
};

inline pop_kernels_setting pop_read_setting(const char * text) {
#if defined(__aarch64__)
    // The kernels of ggml are tuned for Arm.
    return text && strcmp(text, "on") == 0 ? POP_KERNELS_BEST : POP_KERNELS_OFF;
#else
    if (!text) {
        return POP_KERNELS_BEST;
    }
    return strcmp(text, "on") == 0        ? POP_KERNELS_TILES
           : strcmp(text, "off") == 0     ? POP_KERNELS_OFF
           : strcmp(text, "avx2") == 0    ? POP_KERNELS_AVX2
           : strcmp(text, "avxvnni") == 0 ? POP_KERNELS_AVX_VNNI
                                          : POP_KERNELS_BEST;
#endif
}

// The environment variable is read once. pop_kernels_choose() sets another value.
inline std::atomic<pop_kernels_setting> & pop_setting() {
    static std::atomic<pop_kernels_setting> setting{ pop_read_setting(getenv("POP_KERNELS")) };
    return setting;
}

// Returns whether the best kernels run, with AMX or without.
inline bool pop_setting_is_best() {
#if !defined(__aarch64__)
    if (pop_setting() == POP_KERNELS_TILES) {
        return true;
    }
#endif
    return pop_setting() == POP_KERNELS_BEST;
}
