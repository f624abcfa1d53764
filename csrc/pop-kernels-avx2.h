// The vector instructions of AVX2 and of AVX-VNNI. pop-kernels-simd.h explains such structs.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

// 8 lanes of 32 bits. Bytes are multiplied in pairs, which are summed in 16 bits.
struct pop_avx2 {
    using vi = __m256i;
    using vf = __m256;

    static constexpr int  lanes   = 8;
    static constexpr int  rows    = 4;
    static constexpr bool has_dot = false, is_signed = true, has_block = false, has_dot_bf16 = false;

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
    static vi   sub_8(vi a, vi b) { return _mm256_sub_epi8(a, b); }
    static vi   shl(vi a, int n) { return _mm256_slli_epi32(a, n); }
    static vi   shr(vi a, int n) { return _mm256_srli_epi32(a, n); }
    static vi   shr_signed(vi a, int n) { return _mm256_srai_epi32(a, n); }
    static vf   to_float(vi a) { return _mm256_cvtepi32_ps(a); }
    static vf   mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
    static vf   add_f(vf a, vf b) { return _mm256_add_ps(a, b); }
    static vf   fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
    static vf   negate(vf a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
    static vf   abs_f(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

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

    // Reads the same from rows that stand in groups, `stride` bytes apart, and take turns after some bytes.
    template <int rows, int turn> static void load_groups(const uint8_t * p, size_t /*stride*/, vi out[4]) {
        static_assert(rows == 8 && turn == 8, "ggml has no other groups here");
        for (int i = 0; i < 4; i += 2) {
            const __m256 a = _mm256_loadu_ps((const float *) (p + 32 * i));
            const __m256 b = _mm256_loadu_ps((const float *) (p + 32 * i + 32));

            out[i]     = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8);
            out[i + 1] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8);
        }
    }

    // Reads 16 bits for each row. The rows stand in such groups.
    template <int rows> static vi load_groups_16(const uint8_t * p, size_t /*stride*/) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p));
    }

    static vi load_8(const uint8_t * p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p)); }

    // 16-bit sums of two products each, of unsigned bytes of w and signed bytes of x
    static vi pairs(vi w, vi x) { return _mm256_maddubs_epi16(w, x); }
    static vi add_16(vi a, vi b) { return _mm256_add_epi16(a, b); }
    static vi widen(vi sum, vi a) { return add(sum, _mm256_madd_epi16(a, _mm256_set1_epi16(1))); }
    static vi abs_8(vi a) { return _mm256_abs_epi8(a); }
    static vi sign_8(vi x, vi w) { return _mm256_sign_epi8(x, w); }

    // The rest is used on all processors of this family, as pop_base.

    static void prefetch(const void * p) { _mm_prefetch((const char *) p, _MM_HINT_T0); }

    static float largest(vf a) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        m        = _mm_max_ps(m, _mm_movehl_ps(m, m));
        m        = _mm_max_ss(m, _mm_movehdup_ps(m));
        return _mm_cvtss_f32(m);
    }

    // Bytes that are 0xff where a bit is set
    static vi bits_to_bytes(uint32_t bits) {
        const vi replicate = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const vi mask      = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
        const vi bytes     = _mm256_shuffle_epi8(all((int32_t) bits), replicate);
        return _mm256_cmpeq_epi8(and_(bytes, mask), mask);
    }

    // Rounds 32 numbers times `factor` to bytes, and sums up each half of the bytes.
    static void round_32(const float * x, float factor, int8_t * q, int32_t sum[2]) {
        vi a[4];
        for (int i = 0; i < 4; i++) {
            a[i] = _mm256_cvtps_epi32(mul(load_f(x + 8 * i), all_f(factor)));
        }
        const vi in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const vi low      = _mm256_packs_epi32(a[0], a[1]);
        const vi high     = _mm256_packs_epi32(a[2], a[3]);
        const vi bytes    = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), in_order);
        store(q, bytes);

        const vi fours = widen(zero(), pairs(all_8(1), bytes));
        const vi eight = add(fours, _mm256_shuffle_epi32(fours, 0x4e));
        const vi all   = add(eight, _mm256_shuffle_epi32(eight, 0xb1));

        sum[0] = _mm256_cvtsi256_si32(all);
        sum[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(all, 1));
    }
};

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
struct pop_avx_vnni : pop_avx2 {
    static constexpr bool has_dot = true, is_signed = false;

    static vi dot(vi sum, vi w, vi x) {
#    if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        return _mm256_dpbusd_epi32(sum, w, x);
#    else
        return _mm256_dpbusd_avx_epi32(sum, w, x);
#    endif
    }
};
#else
using pop_avx_vnni = pop_avx2; // the best of 32 bytes
#endif
