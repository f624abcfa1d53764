// The vector instructions that the kernels use, in one struct per instruction set. The kernels are templates over it.

#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC 12 warns about its own _mm512_undefined_ps()
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

// 8 lanes of 32 bits. Bytes are multiplied in pairs, which are summed in 16 bits.
struct pop_avx2 {
    using vi = __m256i;
    using vf = __m256;

    static constexpr int  lanes   = 8;
    static constexpr int  rows    = 4; // activation rows that one call of the kernel takes
    static constexpr bool has_dot = false;

    static constexpr bool has_dot_bf16 = false;

    static vi   zero() { return _mm256_setzero_si256(); }
    static vf   zero_f() { return _mm256_setzero_ps(); }
    static vi   load(const void * p) { return _mm256_loadu_si256((const __m256i *) p); }
    static vf   load_f(const float * p) { return _mm256_loadu_ps(p); }
    static void store(void * p, vi a) { _mm256_storeu_si256((__m256i *) p, a); }
    static void store_f(float * p, vf a) { _mm256_storeu_ps(p, a); }
    static vi   all(int32_t x) { return _mm256_set1_epi32(x); }
    static vi   all_8(int8_t x) { return _mm256_set1_epi8(x); }
    static vf   all_f(float x) { return _mm256_set1_ps(x); }
    static vi   and_(vi a, vi b) { return _mm256_and_si256(a, b); }
    static vi   or_(vi a, vi b) { return _mm256_or_si256(a, b); }
    static vi   xor_(vi a, vi b) { return _mm256_xor_si256(a, b); }
    static vi   add(vi a, vi b) { return _mm256_add_epi32(a, b); }
    static vi   add_8(vi a, vi b) { return _mm256_add_epi8(a, b); }
    static vi   shl(vi a, int n) { return _mm256_slli_epi32(a, n); }
    static vi   shr(vi a, int n) { return _mm256_srli_epi32(a, n); }
    static vi   shr_signed(vi a, int n) { return _mm256_srai_epi32(a, n); }
    static vf   to_float(vi a) { return _mm256_cvtepi32_ps(a); }
    static vf   mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
    static vf   add_f(vf a, vf b) { return _mm256_add_ps(a, b); }
    static vf   fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
    static vf   negate(vf a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }

    // Keeps a in a register, where the compiler would rather load it several times.
    static vf keep(vf a) {
#if defined(__GNUC__)
        asm("" : "+x"(a));
#endif
        return a;
    }
    // Has sums computed in the order of the source. GCC would compute all products first, and run out of registers.
    static vi keep(vi a) {
#if defined(__GNUC__)
        asm("" : "+x"(a));
#endif
        return a;
    }
    static vf   max_f(vf a, vf b) { return _mm256_max_ps(a, b); }
    static bool same_f(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) == 0xff; }
    static vf   where_equal(vf a, float value, vf yes, vf no) {
        return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, all_f(value), _CMP_EQ_OQ));
    }
    // Takes `yes` in the lanes where the bit is set.
    static vf where_bit(vi bits, int bit, vf yes, vf no) {
        const vi mask = all((int32_t) (1u << bit));
        return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(and_(bits, mask), mask)));
    }
    static vf load_half(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
    // 2^n times a, for an integer n
    static vf scale_2(vf a, vf n) {
        const vi exponent = shl(_mm256_cvtps_epi32(max_f(n, all_f(-126.0f))), 23);
        const vf scaled   = _mm256_castsi256_ps(add(_mm256_castps_si256(a), exponent));
        return _mm256_and_ps(scaled, _mm256_cmp_ps(n, all_f(-126.0f), _CMP_GE_OQ));
    }
    static vf round_f(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

    // The same table of 16 bytes for each byte of a, whose upper bits are zero.
    static vi look_up(const int8_t * table, vi a) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table)), a);
    }

    // Sets `value` in byte i of each lane of q where bit `first + i` of the lane in `bits` is set.
    static vi or_bits(vi q, vi bits, int first, int8_t value) {
        const vi replicate = _mm256_add_epi8(
            _mm256_set1_epi8((char) (first / 8)),
            _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c));
        const vi mask = all(first % 8 ? (int32_t) 0x80402010 : 0x08040201);
        const vi set  = _mm256_cmpeq_epi8(and_(_mm256_shuffle_epi8(bits, replicate), mask), mask);
        return or_(q, and_(set, _mm256_set1_epi8(value)));
    }

    // The half-precision numbers in the lower 16 bits of each lane.
    static vf half(vi a) {
        const vi packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(and_(a, all(0xffff)), zero()), 0x08);
        return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    }

    // Reads 16 bytes of each of 8 rows. Lane i of out[j] gets bytes 4 j to 4 j + 3 of row i.
    static void load_rows(const uint8_t * p, size_t stride, vi out[4]) {
        vi a[4];
        for (int i = 0; i < 4; i++) {
            a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) (p + i * stride))),
                                           _mm_loadu_si128((const __m128i *) (p + (i + 4) * stride)), 1);
        }
        const vi b0 = _mm256_unpacklo_epi32(a[0], a[1]);
        const vi b1 = _mm256_unpacklo_epi32(a[2], a[3]);
        const vi b2 = _mm256_unpackhi_epi32(a[0], a[1]);
        const vi b3 = _mm256_unpackhi_epi32(a[2], a[3]);

        out[0] = _mm256_unpacklo_epi64(b0, b1);
        out[1] = _mm256_unpackhi_epi64(b0, b1);
        out[2] = _mm256_unpacklo_epi64(b2, b3);
        out[3] = _mm256_unpackhi_epi64(b2, b3);
    }

    // Reads the same from rows that stand in groups of 8, `stride` bytes apart, which take turns after 8 bytes.
    static void load_groups(const uint8_t * p, size_t /*stride*/, vi out[4]) {
        for (int i = 0; i < 4; i += 2) {
            const __m256 a = _mm256_loadu_ps((const float *) (p + 32 * i));
            const __m256 b = _mm256_loadu_ps((const float *) (p + 32 * i + 32));

            out[i]     = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8);
            out[i + 1] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8);
        }
    }

    // Reads 16 bits for each row, which stand in groups of 8.
    static vi load_groups_16(const uint8_t * p, size_t /*stride*/) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p));
    }

    static vi load_8(const uint8_t * p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p)); }

    // 16-bit sums of two products each, of unsigned bytes of w and signed bytes of x
    static vi pairs(vi w, vi x) { return _mm256_maddubs_epi16(w, x); }
    static vi add_16(vi a, vi b) { return _mm256_add_epi16(a, b); }
    static vi widen(vi sum, vi a) { return add(sum, _mm256_madd_epi16(a, _mm256_set1_epi16(1))); }
    static vi abs_8(vi a) { return _mm256_abs_epi8(a); }
    static vi sign_8(vi x, vi w) { return _mm256_sign_epi8(x, w); }
};

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#    define POP_KERNELS_HAS_AVX_VNNI
struct pop_avx_vnni : pop_avx2 {
    static constexpr bool has_dot = true;

    static vi dot(vi sum, vi w, vi x) {
#    if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        return _mm256_dpbusd_epi32(sum, w, x);
#    else
        return _mm256_dpbusd_avx_epi32(sum, w, x);
#    endif
    }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#    define POP_KERNELS_HAS_AVX512_VNNI
struct pop_avx512_vnni {
    using vi = __m512i;
    using vf = __m512;

    static constexpr int  lanes   = 16;
    static constexpr int  rows    = 6;
    static constexpr bool has_dot = true;

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

    static void load_groups(const uint8_t * p, size_t stride, vi out[4]) {
        const vi even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const vi odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        for (int i = 0; i < 4; i += 2) {
            const vi a = load(p + 32 * i);
            const vi b = load(p + stride + 32 * i);

            out[i]     = _mm512_permutex2var_epi32(a, even, b);
            out[i + 1] = _mm512_permutex2var_epi32(a, odd, b);
        }
    }

    static vi load_groups_16(const uint8_t * p, size_t stride) {
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
