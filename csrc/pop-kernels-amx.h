// Kernels with the tiles of AMX, which multiply 16 rows of activations and 16 outputs at once. All else is as with
// AVX-512 VNNI: the unpacked weights have the order that the tiles read, and the sums of products are the same.

#pragma once

#include "pop-kernels-float.h"
#include "pop-kernels-pass.h"

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(POP_KERNELS_HAS_AVX512_VNNI)
#    define POP_KERNELS_HAS_AMX

#    include <sys/syscall.h>
#    include <unistd.h>

struct pop_amx : pop_avx512_vnni {
    static constexpr int  rows      = 16;
    static constexpr bool has_block = true;

    // Asks Linux to let this process use tiles. Without this permission, instructions with tiles end the process.
    static bool ask_permission() {
        constexpr long request   = 0x1023; // ARCH_REQ_XCOMP_PERM, which the headers of older systems lack
        constexpr long tile_data = 18;     // XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request, tile_data) == 0;
    }

    // Sets the sizes of the tiles for blocks of 4 * group inputs: 0 and 1 hold sums, 2 activations, 3 and 4 weights.
    template <int group> static void configure() {
        alignas(64) configuration sizes = {};

        sizes.palette = 1;
        for (int tile = 0; tile < 5; tile++) {
            sizes.row_bytes[tile] = tile == 2 ? 4 * group : 64;
            sizes.n_rows[tile]    = tile < 3 ? rows : group;
        }
#    if defined(__GNUC__) && !defined(__clang__)
        asm volatile("" : : "m"(sizes)); // GCC 12 believes that the instruction reads 8 of the 64 bytes
#    endif
        _tile_loadconfig(&sizes);
    }

    static void release() { _tile_release(); }

    // Adds the products of 4 * group inputs of each row, which are `stride` bytes apart, and of 32 outputs.
    template <int group, int R>
    static void multiply_block(const int8_t * x, size_t stride, const uint8_t * w, vi (&sum)[R][pop_vectors]) {
        static_assert(R == rows, "other numbers of rows do without tiles");
        constexpr size_t w_stride = sizeof(sum[0]); // both vectors of outputs

        asm volatile("" : : : "memory"); // GCC 12 does not know that the next instructions read memory
        _tile_loadd(2, x, stride);
        _tile_loadd(3, w, w_stride);
        _tile_loadd(4, w + sizeof(vi), w_stride);
        _tile_loadd(0, &sum[0][0], sizeof(sum[0]));
        _tile_loadd(1, &sum[0][1], sizeof(sum[0]));
        _tile_dpbsud(0, 2, 3); // activations are signed, weights are not
        _tile_dpbsud(1, 2, 4);
        _tile_stored(0, &sum[0][0], sizeof(sum[0]));
        _tile_stored(1, &sum[0][1], sizeof(sum[0]));
    }

private:
    // The 64 bytes that the instruction reads
    struct configuration {
        uint8_t  palette;
        uint8_t  start_row;
        uint8_t  reserved[14];
        uint16_t row_bytes[16];
        uint8_t  n_rows[16];
    };
};

template <class F> struct pop_quantized<pop_amx, F> : pop_quantized<pop_avx512_vnni, F> {
    using vectors = pop_quantized<pop_avx512_vnni, F>;

    static constexpr int rows = pop_amx::rows;

    // Vectors multiply the rows that are left over at the end.
    static void multiply(const pop_product_job &        job,
                         int64_t                        c,
                         int64_t                        r,
                         int                            n_rows,
                         const typename vectors::tile & t,
                         const float *                  sums,
                         float *                        out,
                         size_t                         stride) {
        if (n_rows == rows) {
            const int n_blocks = (int) job.chunk_inputs(c) / 4 / F::group;
            pop_multiply<pop_amx, typename vectors::shape, rows>(vectors::activations(job, c, r), t, n_blocks, sums,
                                                                 out, stride);
            return;
        }
        for (int i = 0; i < n_rows; i += vectors::rows) {
            vectors::multiply(job, c, r + i, std::min(vectors::rows, n_rows - i), t,
                              sums ? sums + i * vectors::tile::outputs : nullptr, out + i * stride, stride);
        }
    }
};

// No tiles multiply F16, and those of BF16 are not used.
template <class F> struct pop_float<pop_amx, F> : pop_float<pop_avx512_vnni, F> {};

// Other code in this thread may use tiles, too, so they are configured for each pass.
template <class F> struct pop_pass_state<pop_quantized<pop_amx, F>> {
    pop_pass_state() { pop_amx::configure<F::group>(); }

    ~pop_pass_state() { pop_amx::release(); }

    pop_pass_state(const pop_pass_state &)             = delete;
    pop_pass_state & operator=(const pop_pass_state &) = delete;
};
#endif
