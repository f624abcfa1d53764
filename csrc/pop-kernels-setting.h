// This setting says which kernels run: the best for the processor, none, or, for tests, those of a lower instruction
// set of x86.

#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>

enum pop_kernels_setting {
    POP_KERNELS_OFF,
    POP_KERNELS_BEST,
#if !defined(__aarch64__)
    POP_KERNELS_AVX2,
    POP_KERNELS_AVX_VNNI,
#endif
};

inline pop_kernels_setting pop_read_setting(const char * text) {
#if defined(__aarch64__)
    // Nobody has measured the kernels for Arm yet, while those of ggml are tuned for it.
    return text && strcmp(text, "on") == 0 ? POP_KERNELS_BEST : POP_KERNELS_OFF;
#else
    if (!text) {
        return POP_KERNELS_BEST;
    }
    return strcmp(text, "off") == 0       ? POP_KERNELS_OFF
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
