// Lets programs use the tiles of AMX on a processor of x86-64 without them. `make amx` builds this library, and
// LD_PRELOAD puts it into programs of Linux.
//
// The processor refuses an instruction with tiles, and Linux tells the process so with the signal SIGILL. The handler
// here does what Intel's manual (Software Developer's Manual, volume 2) says of the instruction, and lets the program
// go on behind it. It ends the process where the real instruction would fault. So programs run as they were compiled.
//
// Linux grants the tiles to a process that asks; here, syscall() does, unless EMULATED_TILES=refused is in the
// environment. At its end, the process says on stderr how many products of tiles it has computed.

#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>

static constexpr int N_TILES = 8, MAX_ROWS = 16, MAX_BYTES = 64;

// The operand of ldtilecfg
struct tile_configuration {
    uint8_t  palette;
    uint8_t  start_row;
    uint8_t  reserved[14];
    uint16_t row_bytes[16];
    uint8_t  n_rows[16];
};

static_assert(sizeof(tile_configuration) == 64, "as in the manual");

struct tile_registers {
    tile_configuration configuration;
    uint8_t            tiles[N_TILES][MAX_ROWS][MAX_BYTES];
};

static thread_local tile_registers registers; // of each thread; palette 0: nothing is configured

static std::atomic<bool>    is_permitted;
static std::atomic<int64_t> n_signed_unsigned, n_others; // products of two tiles

static void require(bool holds, const char * what) {
    if (!holds) {
        fprintf(stderr, "emulated tiles: %s\n", what);
        abort();
    }
}

// The parts of an instruction with a VEX prefix of three bytes
struct instruction {
    const uint8_t * end;
    int             prefix; // 0: none, 1: 66, 2: F3, 3: F2
    int             opcode;
    int             reg;
    int             rm;
    int             vvvv;
    bool            has_memory;
    bool            has_sib;
    uint64_t        base;  // address without the index
    uint64_t        index; // its register times the scale
};

static uint64_t value_of(const ucontext_t * context, int number) {
    static const int places[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    return (uint64_t) context->uc_mcontext.gregs[places[number]];
}

static int32_t read_32(const uint8_t * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

// Returns false for what is no instruction with tiles: those have the opcodes 49, 4B and 5E of map 2, W = 0 and L = 0.
static bool decode(const ucontext_t * context, instruction & out) {
    const uint8_t * p = (const uint8_t *) context->uc_mcontext.gregs[REG_RIP];
    if (p[0] != 0xc4 || (p[1] & 0x1f) != 2 || (p[2] & 0x84) || (p[3] != 0x49 && p[3] != 0x4b && p[3] != 0x5e)) {
        return false;
    }
    // The prefix stores the upper bits of register numbers and vvvv inverted.
    const int x = p[1] & 0x40 ? 0 : 8;
    const int b = p[1] & 0x20 ? 0 : 8;
    out.prefix  = p[2] & 3;
    out.vvvv    = ~(p[2] >> 3) & 15;
    out.opcode  = p[3];
    out.reg     = p[4] >> 3 & 7;
    out.rm      = p[4] & 7;
    out.base = out.index = 0;

    const int mode = p[4] >> 6;
    p += 5;
    out.has_memory = mode != 3;
    out.has_sib    = out.has_memory && out.rm == 4;

    bool has_base = out.has_memory;
    int  base     = out.rm;
    if (out.has_sib) {
        const int index = (p[0] >> 3 & 7) + x;
        out.index       = index == 4 ? 0 : value_of(context, index) << (p[0] >> 6);
        base            = p[0] & 7;
        p++;
    }
    const bool has_32 = mode == 2 || (mode == 0 && base == 5);
    if (mode == 0 && base == 5) {
        has_base = false;
    }
    if (has_base) {
        out.base = value_of(context, base + b);
    }
    if (mode == 1) {
        out.base += (int64_t) (int8_t) *p++;
    } else if (has_32 && out.has_memory) {
        out.base += (int64_t) read_32(p);
        p += 4;
        if (!has_base && !out.has_sib) {
            out.base += (uint64_t) p; // relative to the next instruction
        }
    }
    out.end = p;
    return true;
}

static void configure(const void * from) {
    tile_configuration c;
    memcpy(&c, from, sizeof(c));
    require(c.palette <= 1, "ldtilecfg: unknown palette");
    if (c.palette == 1) {
        require(c.start_row < MAX_ROWS, "ldtilecfg: start_row is too large");
        for (uint8_t byte : c.reserved) {
            require(byte == 0, "ldtilecfg: a reserved byte is not 0");
        }
        for (int i = 0; i < 16; i++) {
            const int rows = c.n_rows[i], bytes = c.row_bytes[i];
            require(rows <= MAX_ROWS && bytes <= MAX_BYTES, "ldtilecfg: a tile is too large");
            require((rows == 0) == (bytes == 0), "ldtilecfg: only one of rows and bytes is 0");
            require(i < N_TILES || rows == 0, "ldtilecfg: there are 8 tiles");
        }
    }
    memset(&registers, 0, sizeof(registers));
    if (c.palette == 1) {
        registers.configuration = c;
    }
}

static void require_configured(int tile) {
    require(registers.configuration.palette == 1, "no configuration");
    require(tile < N_TILES && registers.configuration.n_rows[tile], "a tile without configuration");
    require(registers.configuration.start_row == 0, "start_row is not 0");
}

static void load(int tile, const instruction & i) {
    require_configured(tile);
    memset(registers.tiles[tile], 0, sizeof(registers.tiles[tile]));
    for (int row = 0; row < registers.configuration.n_rows[tile]; row++) {
        memcpy(registers.tiles[tile][row], (const void *) (i.base + row * i.index),
               registers.configuration.row_bytes[tile]);
    }
}

static void store(int tile, const instruction & i) {
    require_configured(tile);
    for (int row = 0; row < registers.configuration.n_rows[tile]; row++) {
        memcpy((void *) (i.base + row * i.index), registers.tiles[tile][row], registers.configuration.row_bytes[tile]);
    }
}

// Adds a times b to c. An element of 32 bits holds four bytes: row m of a has 4 inputs in element k, and row k of b has
// the same 4 inputs of column n in element n.
static void multiply(int c, int a, int b, bool a_signed, bool b_signed) {
    const tile_configuration & sizes = registers.configuration;
    require_configured(c);
    require_configured(a);
    require_configured(b);
    require(c != a && c != b && a != b, "a product needs three different tiles");
    require(sizes.n_rows[c] == sizes.n_rows[a], "a product has as many rows as its first factor");
    require(sizes.row_bytes[c] == sizes.row_bytes[b], "a product has the columns of its second factor");
    require(sizes.row_bytes[a] == 4 * sizes.n_rows[b], "the inner sizes of a product differ");
    require(sizes.row_bytes[c] % 4 == 0, "a product has elements of 4 bytes");
    for (int m = 0; m < sizes.n_rows[c]; m++) {
        for (int n = 0; n < sizes.row_bytes[c] / 4; n++) {
            uint32_t sum = (uint32_t) read_32(registers.tiles[c][m] + 4 * n); // it wraps around
            for (int k = 0; k < sizes.row_bytes[a] / 4; k++) {
                for (int i = 0; i < 4; i++) {
                    const uint8_t x = registers.tiles[a][m][4 * k + i];
                    const uint8_t y = registers.tiles[b][k][4 * n + i];
                    sum += (uint32_t) ((a_signed ? (int8_t) x : (int) x) * (b_signed ? (int8_t) y : (int) y));
                }
            }
            memcpy(registers.tiles[c][m] + 4 * n, &sum, sizeof(sum));
        }
    }
    (a_signed && !b_signed ? n_signed_unsigned : n_others)++;
}

static bool execute(const instruction & i) {
    switch (i.opcode) {
        case 0x49:
            if (i.prefix == 0 && i.has_memory && i.reg == 0) { // ldtilecfg
                configure((const void *) (i.base + i.index));
            } else if (i.prefix == 0 && !i.has_memory && i.reg == 0 && i.rm == 0) { // tilerelease
                memset(&registers, 0, sizeof(registers));
            } else if (i.prefix == 3 && !i.has_memory && i.rm == 0) { // tilezero
                require_configured(i.reg);
                memset(registers.tiles[i.reg], 0, sizeof(registers.tiles[i.reg]));
            } else {
                return false;
            }
            return true;
        case 0x4b:
            if (!i.has_sib) {
                return false;
            }
            if (i.prefix == 1 || i.prefix == 3) { // tileloaddt1, tileloadd
                load(i.reg, i);
            } else if (i.prefix == 2) { // tilestored
                store(i.reg, i);
            } else {
                return false;
            }
            return true;
        case 0x5e: // tdpbuud, tdpbusd, tdpbsud, tdpbssd
            if (i.has_memory) {
                return false;
            }
            multiply(i.reg, i.rm, i.vvvv, i.prefix >= 2, i.prefix == 1 || i.prefix == 3);
            return true;
    }
    return false;
}

static void handle(int, siginfo_t *, void * context) {
    ucontext_t * c = (ucontext_t *) context;
    instruction  i;
    require(decode(c, i), "an instruction that this processor lacks, and which has no tiles");
    require(is_permitted, "Linux was not asked");
    require(execute(i), "an instruction with tiles that is not emulated");
    c->uc_mcontext.gregs[REG_RIP] = (greg_t) i.end;
}

__attribute__((constructor)) static void start() {
    struct sigaction action = {};
    action.sa_sigaction     = handle;
    action.sa_flags         = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

__attribute__((destructor)) static void end() {
    fprintf(stderr, "emulated tiles: %lld products of signed and unsigned bytes, %lld others\n",
            (long long) n_signed_unsigned, (long long) n_others);
}

// All that goes through this function of the C library, but for the request, is passed on.
extern "C" long syscall(long number, ...) noexcept {
    long    a[6];
    va_list arguments;
    va_start(arguments, number);
    for (long & argument : a) {
        argument = va_arg(arguments, long);
    }
    va_end(arguments);
    if (number == SYS_arch_prctl && a[0] == 0x1023) { // ARCH_REQ_XCOMP_PERM
        const char * setting = getenv("EMULATED_TILES");
        is_permitted         = a[1] == 18 && !(setting && strcmp(setting, "refused") == 0); // XFEATURE_XTILEDATA
        errno                = is_permitted ? 0 : EPERM;
        return is_permitted ? 0 : -1;
    }
    static std::atomic<long (*)(long, ...)> next; // not initialised under a lock, which could wait in a system call
    if (!next) {
        next = (long (*)(long, ...)) dlsym(RTLD_NEXT, "syscall");
    }
    return next.load()(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
