// How the types are unpacked whose weights stand in a code book: each code is a place in one of ggml's tables, and
// stands for 8 or 4 numbers. pop-kernels-unpack.h explains a type. The function decode() of each one here writes the
// 256 weights of a row's block, plus `offset`, and their scales.

#pragma once

#include "pop-kernels-unpack.h"
#include "simd-mappings.h"

template <class F> struct pop_code_book {
    static constexpr bool is_k = true, affine = false;
    static constexpr int  group_rows = 1;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        alignas(64) uint8_t q[S::lanes][pop_chunk];
        for (int i = 0; i < S::lanes; i++, p += stride) {
            float scale[64 / F::group];
            F::decode(p, q[i], scale);
            for (int b = 0; b < 64 / F::group; b++) {
                t.scale[b][v][i] = scale[b];
            }
        }
        for (int part = 0; part < 16; part++) {
            typename S::vi a[4];
            S::load_rows(q[0] + 16 * part, pop_chunk, a);
            for (int i = 0; i < 4; i++) {
                pop_put(t, v, 4 * part + i, a[i]);
            }
        }
    }
};

static inline uint16_t pop_load_16(const void * p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

static inline float pop_load_half(const uint8_t * p) {
    return GGML_CPU_FP16_TO_FP32(pop_load_16(p));
}

// Writes 32 numbers plus `offset`, after negating those whose bit is set.
static inline void pop_write_codes(uint8_t * q, const void * numbers, uint32_t negative, int8_t offset) {
    using B = pop_base;

    const B::vi mask    = B::bits_to_bytes(negative);
    const B::vi weights = B::sub_8(B::xor_(B::load(numbers), mask), mask);
    B::store(q, B::add_8(weights, B::all_8(offset)));
}

// The signs of 32 weights, of which each 8 have a code of 7 bits: the eighth makes the number of negative ones even.
static inline uint32_t pop_signs_7(uint32_t codes) {
    uint32_t signs = 0;
    for (int i = 0; i < 4; i++) {
        signs |= (uint32_t) ksigns_iq2xs[codes >> 7 * i & 127] << 8 * i;
    }
    return signs;
}

struct pop_iq2_xxs : pop_code_book<pop_iq2_xxs> {
    static constexpr int block = 66, group = 8, bits = 7, offset = 43;

    static void decode(const uint8_t * p, uint8_t * q, float * scale) {
        const float d = pop_load_half(p) / 8;
        for (int b = 0; b < 8; b++, q += 32) {
            const uint32_t rest = pop_load_32(p + 6 + 8 * b);
            scale[b]            = d * (int) (2 * (rest >> 28) + 1);
            uint64_t numbers[4];
            for (int i = 0; i < 4; i++) {
                numbers[i] = iq2xxs_grid[p[2 + 8 * b + i]];
            }
            pop_write_codes(q, numbers, pop_signs_7(rest), offset);
        }
    }
};

// Writes two scales of 4 bits, which are odd eighths of d.
static inline void pop_write_scales(float * scale, uint8_t codes, float d) {
    scale[0] = d / 8 * (2 * (codes & 15) + 1);
    scale[1] = d / 8 * (2 * (codes >> 4) + 1);
}

struct pop_iq2_xs : pop_code_book<pop_iq2_xs> {
    static constexpr int block = 74, group = 4, bits = 7, offset = 43;

    static void decode(const uint8_t * p, uint8_t * q, float * scale) {
        const float d = pop_load_half(p);
        for (int b = 0; b < 8; b++, q += 32) {
            pop_write_scales(scale + 2 * b, p[66 + b], d);
            uint64_t numbers[4];
            uint32_t signs = 0;
            for (int i = 0; i < 4; i++) {
                const uint16_t code = pop_load_16(p + 2 + 8 * b + 2 * i);
                numbers[i]          = iq2xs_grid[code & 511];
                signs |= (uint32_t) ksigns_iq2xs[code >> 9] << 8 * i;
            }
            pop_write_codes(q, numbers, signs, offset);
        }
    }
};

struct pop_iq2_s : pop_code_book<pop_iq2_s> {
    static constexpr int block = 82, group = 4, bits = 7, offset = 43;

    static void decode(const uint8_t * p, uint8_t * q, float * scale) {
        const float d = pop_load_half(p);
        for (int b = 0; b < 8; b++, q += 32) {
            pop_write_scales(scale + 2 * b, p[74 + b], d);
            const int high = p[66 + b];
            uint64_t  numbers[4];
            for (int i = 0; i < 4; i++) {
                numbers[i] = iq2s_grid[p[2 + 4 * b + i] | (high >> 2 * i & 3) << 8];
            }
            const uint32_t signs = pop_load_32(p + 34 + 4 * b);
            pop_write_codes(q, numbers, signs, offset);
        }
    }
};

struct pop_iq3_xxs : pop_code_book<pop_iq3_xxs> {
    static constexpr int block = 98, group = 8, bits = 7, offset = 62;

    static void decode(const uint8_t * p, uint8_t * q, float * scale) {
        const float d = pop_load_half(p) / 4;
        for (int b = 0; b < 8; b++, q += 32) {
            const uint32_t rest = pop_load_32(p + 66 + 4 * b);
            scale[b]            = d * (int) (2 * (rest >> 28) + 1);
            uint32_t numbers[8];
            for (int i = 0; i < 8; i++) {
                numbers[i] = iq3xxs_grid[p[2 + 8 * b + i]];
            }
            pop_write_codes(q, numbers, pop_signs_7(rest), offset);
        }
    }
};

struct pop_iq3_s : pop_code_book<pop_iq3_s> {
    static constexpr int block = 110, group = 8, bits = 5, offset = 15;

    static void decode(const uint8_t * p, uint8_t * q, float * scale) {
        const float d = pop_load_half(p);
        for (int b = 0; b < 8; b++, q += 32) {
            scale[b]       = d * (2 * (p[106 + b / 2] >> 4 * (b % 2) & 15) + 1);
            const int high = p[66 + b];
            uint32_t  numbers[8];
            for (int i = 0; i < 8; i++) {
                numbers[i] = iq3s_grid[p[2 + 8 * b + i] | (high >> i & 1) << 8];
            }
            const uint32_t signs = pop_load_32(p + 74 + 4 * b);
            pop_write_codes(q, numbers, signs, offset);
        }
    }
};

// Writes 32 weights of IQ1_S or IQ1_M. Each is -1, 0 or 1, plus an eighth, or less an eighth where the bit is set.
// Eight times that is an integer.
static inline void pop_write_codes_1(uint8_t * q, const void * numbers, uint32_t less, int8_t offset) {
    using B = pop_base;

    const B::vi eights  = B::and_(B::shl(B::load(numbers), 3), B::all_8((int8_t) 0xf8));
    const B::vi eighths = B::or_(B::bits_to_bytes(less), B::all_8(1)); // -1 or 1
    B::store(q, B::add_8(B::add_8(eights, eighths), B::all_8(offset)));
}

struct pop_iq1_s : pop_code_book<pop_iq1_s> {
    static constexpr int block = 50, group = 8, bits = 5, offset = 9;

    static void decode(const uint8_t * p, uint8_t * q, float * scale) {
        const float d = pop_load_half(p) / 8;
        for (int b = 0; b < 8; b++, q += 32) {
            const int high = pop_load_16(p + 34 + 2 * b);
            scale[b]       = d * (2 * (high >> 12 & 7) + 1);
            uint64_t numbers[4];
            for (int i = 0; i < 4; i++) {
                numbers[i] = iq1s_grid[p[2 + 4 * b + i] | (high >> 3 * i & 7) << 8];
            }
            const uint32_t less = high & 0x8000 ? 0xffffffff : 0;
            pop_write_codes_1(q, numbers, less, offset);
        }
    }
};

struct pop_iq1_m : pop_code_book<pop_iq1_m> {
    static constexpr int block = 56, group = 4, bits = 5, offset = 9;

    static void decode(const uint8_t * p, uint8_t * q, float * scale) {
        uint16_t scales[4]; // each has four scales of 3 bits, and 4 bits of d on top
        memcpy(scales, p + 48, sizeof(scales));
        const int   half = scales[0] >> 12 | (scales[1] >> 12) << 4 | (scales[2] >> 12) << 8 | (scales[3] >> 12) << 12;
        const float d    = GGML_CPU_FP16_TO_FP32((ggml_fp16_t) half) / 8;
        for (int b = 0; b < 16; b++) {
            scale[b] = d * (2 * (scales[b / 4] >> 3 * (b % 4) & 7) + 1);
        }
        for (int b = 0; b < 8; b++, q += 32) {
            const int high = pop_load_16(p + 32 + 2 * b);
            uint64_t  numbers[4];
            uint32_t  less = 0;
            for (int i = 0; i < 4; i++) {
                numbers[i] = iq1s_grid[p[4 * b + i] | (high >> 4 * i & 7) << 8];
                less |= high >> 4 * i & 8 ? 0xffu << 8 * i : 0;
            }
            pop_write_codes_1(q, numbers, less, offset);
        }
    }
};
