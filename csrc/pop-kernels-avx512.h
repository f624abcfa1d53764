// The vector instructions of AVX-512 VNNI. pop-kernels-simd.h explains such structs.

#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC 12 warns about its own _mm512_undefined_ps()
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#    define POP_KERNELS_HAS_AVX512_VNNI
struct pop_avx512_vnni {
    using vi = __m512i;
    using vf = __m512;

    static constexpr int  lanes   = 16;
    static constexpr int  rows    = 6;
    static constexpr bool has_dot = true, is_signed = false, has_block = false;

#    if defined(__AVX512BF16__)
    static constexpr bool has_dot_bf16 = true;
#    else
    static constexpr bool has_dot_bf16 = false;
#    endif

    static vi   zero() { return _mm512_setzero_si512(); }
    static vf   zero_f() { return _mm512_setzero_ps(); }
    static vi   load(const void * p) { return _mm512_loadu_si512(p); }
    static vf   load_f(const float * p) { return _mm512_loadu_ps(p); }
    static void store(void * p, vi a) { _mm512_storeu_si512(p, a); }
    static void store_f(float * p, vf a) { _mm512_storeu_ps(p, a); }
    static vi   all(int32_t x) { return _mm512_set1_epi32(x); }
    static vi   all_8(int8_t x) { return _mm512_set1_epi8(x); }
    static vf   all_f(float x) { return _mm512_set1_ps(x); }
    static vi   and_(vi a, vi b) { return _mm512_and_si512(a, b); }
    static vi   or_(vi a, vi b) { return _mm512_or_si512(a, b); }
    static vi   xor_(vi a, vi b) { return _mm512_xor_si512(a, b); }
    static vi   add(vi a, vi b) { return _mm512_add_epi32(a, b); }
    static vi   add_8(vi a, vi b) { return _mm512_add_epi8(a, b); }
    static vi   shl(vi a, int n) { return _mm512_slli_epi32(a, (unsigned) n); }
    static vi   shr(vi a, int n) { return _mm512_srli_epi32(a, (unsigned) n); }
    static vi   shr_signed(vi a, int n) { return _mm512_srai_epi32(a, (unsigned) n); }
    static vf   to_float(vi a) { return _mm512_cvtepi32_ps(a); }
    static vf   mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
    static vf   add_f(vf a, vf b) { return _mm512_add_ps(a, b); }
    static vf   fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
    static vf   negate(vf a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }

    static vf keep(vf a) {
#    if defined(__GNUC__)
        asm("" : "+v"(a));
#    endif
        return a;
    }
    static vf   max_f(vf a, vf b) { return _mm512_max_ps(a, b); }
    static bool same_f(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) == 0xffff; }
    static vf   where_equal(vf a, float value, vf yes, vf no) {
        return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, all_f(value), _CMP_EQ_OQ), yes);
    }
    static vf where_bit(vi bits, int bit, vf yes, vf no) {
        return _mm512_mask_mov_ps(no, _mm512_test_epi32_mask(bits, all((int32_t) (1u << bit))), yes);
    }
    static vf load_half(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
    static vf scale_2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
    static vf round_f(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

    static vi look_up(const int8_t * table, vi a) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table)), a);
    }

    static vi or_bits(vi q, vi bits, int first, int8_t value) {
        const vi replicate =
            _mm512_add_epi8(_mm512_set1_epi8((char) (first / 8)),
                            _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
        const vi        mask = all(first % 8 ? (int32_t) 0x80402010 : 0x08040201);
        const __mmask64 set  = _mm512_test_epi8_mask(_mm512_shuffle_epi8(bits, replicate), mask);
        return _mm512_mask_add_epi8(q, set, q, _mm512_set1_epi8(value));
    }

    static vf half(vi a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }

    static vi quarters(const uint8_t * p, size_t stride) {
        vi a = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));
        a    = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *) (p + 4 * stride)), 1);
        a    = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *) (p + 8 * stride)), 2);
        return _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *) (p + 12 * stride)), 3);
    }

    static void load_rows(const uint8_t * p, size_t stride, vi out[4]) {
        const vi a0 = quarters(p, stride);
        const vi a1 = quarters(p + stride, stride);
        const vi a2 = quarters(p + 2 * stride, stride);
        const vi a3 = quarters(p + 3 * stride, stride);
        const vi b0 = _mm512_unpacklo_epi32(a0, a1);
        const vi b1 = _mm512_unpacklo_epi32(a2, a3);
        const vi b2 = _mm512_unpackhi_epi32(a0, a1);
        const vi b3 = _mm512_unpackhi_epi32(a2, a3);

        out[0] = _mm512_unpacklo_epi64(b0, b1);
        out[1] = _mm512_unpackhi_epi64(b0, b1);
        out[2] = _mm512_unpacklo_epi64(b2, b3);
        out[3] = _mm512_unpackhi_epi64(b2, b3);
    }

    template <int rows, int turn> static void load_groups(const uint8_t * p, size_t stride, vi out[4]) {
        static_assert(rows == 8 && turn == 8, "ggml has no other groups here");
        const vi even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const vi odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        for (int i = 0; i < 4; i += 2) {
            const vi a = load(p + 32 * i);
            const vi b = load(p + stride + 32 * i);

            out[i]     = _mm512_permutex2var_epi32(a, even, b);
            out[i + 1] = _mm512_permutex2var_epi32(a, odd, b);
        }
    }

    template <int rows> static vi load_groups_16(const uint8_t * p, size_t stride) {
        const __m256i a = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) p));
        return _mm512_cvtepu16_epi32(_mm256_inserti128_si256(a, _mm_loadu_si128((const __m128i *) (p + stride)), 1));
    }

    static vi load_8(const uint8_t * p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)); }

    static vi dot(vi sum, vi w, vi x) { return _mm512_dpbusd_epi32(sum, w, x); }

#    if defined(__AVX512BF16__)
    static vf dot_bf16(vf sum, vf w, vf x) { return _mm512_dpbf16_ps(sum, (__m512bh) w, (__m512bh) x); }
#    endif
};
#endif
