// Prints how many products of bytes a core adds up in a second, in billions: the peak that kernel_bench refers to.

#include <immintrin.h>

#include <algorithm>
#include <cstdio>
#include <ctime>

#if defined(__AVX512VNNI__)
using vector = __m512i;
#    define STEP(i) "vpdpbusd %12, %12, %" #i "\n"
#elif defined(__AVXVNNI__)
using vector = __m256i;
#    define STEP(i) "%{vex%} vpdpbusd %12, %12, %" #i "\n"
#else
using vector = __m256i;
#    define STEP(i) "vpmaddubsw %12, %12, %" #i "\n" // without the two instructions that widen and add the results
#endif

static double seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main() {
    constexpr int n_steps = 100000;
    double        best    = 1e9;

    vector s[12] = {};
    vector x     = {};
    for (int run = 0; run < 100; run++) {
        const double start = seconds();
        for (int i = 0; i < n_steps; i++) {
            asm volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10)
                             STEP(11)
                         : "+x"(s[0]), "+x"(s[1]), "+x"(s[2]), "+x"(s[3]), "+x"(s[4]), "+x"(s[5]), "+x"(s[6]),
                           "+x"(s[7]), "+x"(s[8]), "+x"(s[9]), "+x"(s[10]), "+x"(s[11])
                         : "x"(x));
        }
        best = std::min(best, seconds() - start);
    }
    printf("%f\n", 12.0 * n_steps * sizeof(vector) / best / 1e9);
}
