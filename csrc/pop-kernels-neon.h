// The vector instructions of Arm NEON with products of four bytes (sdot), and with products of small matrices of bytes
// (smmla, of the extension I8MM). pop-kernels-simd.h explains such structs.

#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

// A pop_two holds vectors of 16 bytes as one of 32, as long as those of AVX2. ggml's groups of 8 rows fill it.
template <class V> struct pop_two {
    V lo;
    V hi;
};

struct pop_neon_dot {
    using v4 = int32x4_t;
    using vi = pop_two<int32x4_t>;
    using vf = pop_two<float32x4_t>;

    static constexpr int  lanes   = 8;
    static constexpr int  rows    = 4;
    static constexpr bool has_dot = true, is_signed = true, has_block = true, has_dot_bf16 = false;

    static vi   zero() { return all(0); }
    static vf   zero_f() { return all_f(0.0f); }
    static vi   load(const void * p) { return { load_4(p), load_4((const uint8_t *) p + 16) }; }
    static vf   load_f(const float * p) { return { vld1q_f32(p), vld1q_f32(p + 4) }; }
    static void store(void * p, vi a) {
        vst1q_s8((int8_t *) p, vreinterpretq_s8_s32(a.lo));
        vst1q_s8((int8_t *) p + 16, vreinterpretq_s8_s32(a.hi));
    }
    static void store_f(float * p, vf a) {
        vst1q_f32(p, a.lo);
        vst1q_f32(p + 4, a.hi);
    }
    static vi all(int32_t x) { return { vdupq_n_s32(x), vdupq_n_s32(x) }; }
    static vi all_8(int8_t x) { return of_8({ vdupq_n_s8(x), vdupq_n_s8(x) }); }
    static vf all_f(float x) { return { vdupq_n_f32(x), vdupq_n_f32(x) }; }
    static vi and_(vi a, vi b) { return { a.lo & b.lo, a.hi & b.hi }; }
    static vi or_(vi a, vi b) { return { a.lo | b.lo, a.hi | b.hi }; }
    static vi xor_(vi a, vi b) { return { a.lo ^ b.lo, a.hi ^ b.hi }; }
    static vi add(vi a, vi b) { return { vaddq_s32(a.lo, b.lo), vaddq_s32(a.hi, b.hi) }; }
    static vi add_8(vi a, vi b) { return of_8({ to_8(a.lo) + to_8(b.lo), to_8(a.hi) + to_8(b.hi) }); }
    static vi sub_8(vi a, vi b) { return of_8({ to_8(a.lo) - to_8(b.lo), to_8(a.hi) - to_8(b.hi) }); }
    static vi shl(vi a, int n) { return { a.lo << n, a.hi << n }; }
    static vi shr_signed(vi a, int n) { return { a.lo >> n, a.hi >> n }; }
    static vi shr(vi a, int n) {
        return { vreinterpretq_s32_u32(vreinterpretq_u32_s32(a.lo) >> n),
                 vreinterpretq_s32_u32(vreinterpretq_u32_s32(a.hi) >> n) };
    }
    static vf to_float(vi a) { return { vcvtq_f32_s32(a.lo), vcvtq_f32_s32(a.hi) }; }
    static vf mul(vf a, vf b) { return { vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi) }; }
    static vf fma(vf a, vf b, vf c) { return { vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi) }; }
    static vf max_f(vf a, vf b) { return { vmaxq_f32(a.lo, b.lo), vmaxq_f32(a.hi, b.hi) }; }
    static vf negate(vf a) { return { vnegq_f32(a.lo), vnegq_f32(a.hi) }; }
    static vf abs_f(vf a) { return { vabsq_f32(a.lo), vabsq_f32(a.hi) }; }

    // The same table of 16 bytes for each byte of a, whose upper bits are zero.
    static vi look_up(const int8_t * table, vi a) {
        const int8x16_t t = vld1q_s8(table);
        return of_8({ vqtbl1q_s8(t, to_u8(a.lo)), vqtbl1q_s8(t, to_u8(a.hi)) });
    }

    // Sets `value` in byte i of each lane of q where bit `first + i` of the lane in `bits` is set.
    static vi or_bits(vi q, vi bits, int first, int8_t value) {
        static const uint8_t places[16] = { 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12 };
        const uint8x16_t     replicate  = vaddq_u8(vld1q_u8(places), vdupq_n_u8((uint8_t) (first / 8)));
        const uint8x16_t     mask       = to_u8(vdupq_n_s32(first % 8 ? (int32_t) 0x80402010 : 0x08040201));
        const uint8x16_t     lo         = vtstq_u8(vqtbl1q_u8(to_u8(bits.lo), replicate), mask);
        const uint8x16_t     hi         = vtstq_u8(vqtbl1q_u8(to_u8(bits.hi), replicate), mask);
        return or_(q, and_({ vreinterpretq_s32_u8(lo), vreinterpretq_s32_u8(hi) }, all_8(value)));
    }

    // The half-precision numbers in the lower 16 bits of each lane.
    static vf half(vi a) { return { half_4(a.lo), half_4(a.hi) }; }

    // Reads 16 bytes of each of 8 rows. Lane i of out[j] gets bytes 4 j to 4 j + 3 of row i.
    static void load_rows(const uint8_t * p, size_t stride, vi out[4]) {
        v4 lo[4];
        v4 hi[4];
        transpose(p, stride, lo);
        transpose(p + 4 * stride, stride, hi);
        for (int i = 0; i < 4; i++) {
            out[i] = { lo[i], hi[i] };
        }
    }

    // Reads the same from rows that stand in groups, `stride` bytes apart, and take turns after some bytes.
    template <int rows, int turn> static void load_groups(const uint8_t * p, size_t stride, vi out[4]) {
        for (int i = 0; i < 4; i += turn / 4) {
            const uint8_t * const first  = p + 4 * rows * i;
            const uint8_t * const second = rows == 8 ? first + 4 * turn : first + stride; // rows 4 to 7
            if constexpr (turn == 4) {
                out[i] = { load_4(first), load_4(second) };
            } else {
                const vi a = load(first);
                const vi b = load(second);
                out[i]     = { vuzp1q_s32(a.lo, a.hi), vuzp1q_s32(b.lo, b.hi) };
                out[i + 1] = { vuzp2q_s32(a.lo, a.hi), vuzp2q_s32(b.lo, b.hi) };
            }
        }
    }

    // Reads 16 bits for each row. The rows stand in such groups.
    template <int rows> static vi load_groups_16(const uint8_t * p, size_t stride) {
        const uint8_t * const second = rows == 8 ? p + 8 : p + stride;
        return widen(vreinterpretq_u16_u8(vcombine_u8(vld1_u8(p), vld1_u8(second))));
    }

    static vi load_8(const uint8_t * p) { return widen(vmovl_u8(vld1_u8(p))); }

    // Puts unpacked weights, 64 bytes for each 4 inputs of 16 outputs, in the order of multiply_block().
    static void arrange(uint8_t * /*w*/, int /*n*/) {}

    // Adds the products of 4 * group inputs of each row, which are `stride` bytes apart, and of 16 outputs.
    template <int group, int R>
    static void multiply_block(const int8_t * x, size_t stride, const uint8_t * w, vi (&sum)[R][2]) {
        for (int g = 0; g < group; g += 4, x += 16, w += 256) {
            int8x16_t x_g[R];
            for (int r = 0; r < R; r++) {
                x_g[r] = vld1q_s8(x + r * stride);
            }
            add_inputs<0>(x_g, w, sum);
            add_inputs<1>(x_g, w, sum);
            add_inputs<2>(x_g, w, sum);
            add_inputs<3>(x_g, w, sum);
        }
    }

    static void prefetch(const void * p) { __builtin_prefetch(p); }

    static float largest(vf a) { return vmaxvq_f32(vmaxq_f32(a.lo, a.hi)); }

    // Bytes that are 0xff where a bit is set
    static vi bits_to_bytes(uint32_t bits) {
        static const uint8_t places[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1 };
        const uint8x16_t     all        = vreinterpretq_u8_u32(vdupq_n_u32(bits));
        const uint8x16_t     first      = vld1q_u8(places);
        const uint8x16_t     mask       = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
        const uint8x16_t     lo         = vtstq_u8(vqtbl1q_u8(all, first), mask);
        const uint8x16_t     hi         = vtstq_u8(vqtbl1q_u8(all, vaddq_u8(first, vdupq_n_u8(2))), mask);
        return { vreinterpretq_s32_u8(lo), vreinterpretq_s32_u8(hi) };
    }

    // Rounds 32 numbers times `factor` to bytes, and sums up each half of the bytes.
    static void round_32(const float * x, float factor, int8_t * q, int32_t sum[2]) {
        for (int half = 0; half < 2; half++) {
            int16x4_t a[4];
            for (int i = 0; i < 4; i++) {
                a[i] = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 16 * half + 4 * i), factor)));
            }
            const int8x16_t bytes =
                vcombine_s8(vmovn_s16(vcombine_s16(a[0], a[1])), vmovn_s16(vcombine_s16(a[2], a[3])));
            vst1q_s8(q + 16 * half, bytes);
            sum[half] = vaddlvq_s8(bytes);
        }
    }

protected:
    static v4 load_4(const void * p) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t *) p)); }

private:
    static int8x16_t   to_8(v4 a) { return vreinterpretq_s8_s32(a); }
    static uint8x16_t  to_u8(v4 a) { return vreinterpretq_u8_s32(a); }
    static vi          of_8(pop_two<int8x16_t> a) { return { vreinterpretq_s32_s8(a.lo), vreinterpretq_s32_s8(a.hi) }; }
    static float32x4_t half_4(v4 a) { return vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(a))); }

    static vi widen(uint16x8_t a) {
        return { vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(a))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(a))) };
    }

    // Reads 16 bytes of each of 4 rows.
    static void transpose(const uint8_t * p, size_t stride, v4 out[4]) {
        const v4 a0 = load_4(p);
        const v4 a1 = load_4(p + stride);
        const v4 a2 = load_4(p + 2 * stride);
        const v4 a3 = load_4(p + 3 * stride);

        const int64x2_t b0 = vreinterpretq_s64_s32(vzip1q_s32(a0, a1));
        const int64x2_t b1 = vreinterpretq_s64_s32(vzip1q_s32(a2, a3));
        const int64x2_t b2 = vreinterpretq_s64_s32(vzip2q_s32(a0, a1));
        const int64x2_t b3 = vreinterpretq_s64_s32(vzip2q_s32(a2, a3));

        out[0] = vreinterpretq_s32_s64(vzip1q_s64(b0, b1));
        out[1] = vreinterpretq_s32_s64(vzip2q_s64(b0, b1));
        out[2] = vreinterpretq_s32_s64(vzip1q_s64(b2, b3));
        out[3] = vreinterpretq_s32_s64(vzip2q_s64(b2, b3));
    }

    // Adds the products of inputs 4 * i to 4 * i + 3 of 16.
    template <int i, int R> static void add_inputs(const int8x16_t (&x)[R], const uint8_t * w, vi (&sum)[R][2]) {
        for (int v = 0; v < 2; v++) {
            const vi w_i = load(w + 64 * i + 32 * v);
            for (int r = 0; r < R; r++) {
                sum[r][v].lo = vdotq_laneq_s32(sum[r][v].lo, to_8(w_i.lo), x[r], i);
                sum[r][v].hi = vdotq_laneq_s32(sum[r][v].hi, to_8(w_i.hi), x[r], i);
            }
        }
    }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
struct pop_neon_i8mm : pop_neon_dot {
    // Each 128 bytes hold 8 inputs of 16 outputs. The 8 inputs of an output are brought together.
    static void arrange(uint8_t * w, int n) {
        for (int g = 0; g < n; g += 2, w += 128) {
            v4 a[8];
            for (int i = 0; i < 8; i++) {
                a[i] = load_4(w + 16 * i);
            }
            for (int i = 0; i < 4; i++) {
                store(w + 32 * i, { vzip1q_s32(a[i], a[i + 4]), vzip2q_s32(a[i], a[i + 4]) });
            }
        }
    }

    // A product has 2 rows and 2 outputs. An odd last row is its own partner.
    template <int group, int R>
    static void multiply_block(const int8_t * x, size_t stride, const uint8_t * w, vi (&sum)[R][2]) {
        constexpr int pairs = (R + 1) / 2;

        v4 products[pairs][8] = {};
        for (int g = 0; g < group; g += 2, x += 8, w += 128) {
            int8x16_t x_g[pairs];
            for (int p = 0; p < pairs; p++) {
                const int8_t * row = x + 2 * p * stride;
                x_g[p]             = vcombine_s8(vld1_s8(row), vld1_s8(2 * p + 1 < R ? row + stride : row));
            }
            for (int o = 0; o < 8; o++) {
                const int8x16_t w_o = vld1q_s8((const int8_t *) w + 16 * o);
                for (int p = 0; p < pairs; p++) {
                    products[p][o] = vmmlaq_s32(products[p][o], x_g[p], w_o);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            for (int v = 0; v < 2; v++) {
                const v4 * four = products[r / 2] + 4 * v;
                sum[r][v]       = add(sum[r][v], { row_of(r % 2, four[0], four[1]), row_of(r % 2, four[2], four[3]) });
            }
        }
    }

private:
    // One row of the products with 4 outputs
    static v4 row_of(int odd, v4 a, v4 b) {
        const int64x2_t left  = vreinterpretq_s64_s32(a);
        const int64x2_t right = vreinterpretq_s64_s32(b);
        return vreinterpretq_s32_s64(odd ? vzip2q_s64(left, right) : vzip1q_s64(left, right));
    }
};
#endif
