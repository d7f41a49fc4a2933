// Products of bf16 rows in the tile registers of AMX.
//
// The weights are the left operand as they lie in the model: a tile is 16 of their rows by 32 numbers along K. Up to
// 16 rows of x, a group, are the right operand, packed as (K / 2 words, 16), a word being two neighbours along K. A
// product of tiles takes as long for one row as for 16, so few rows wait for nothing but the weights.
//
// An output is summed along K in one order, whatever stands beside it: a row's bits do not depend on the others.
#pragma once
#include "lanes.h"

constexpr long GROUP = 16;     // rows of x in a group, and of weights in a tile
constexpr long STEP = 32;      // numbers along K in a tile
constexpr long ANSWER = 256;   // numbers of a tile of answers: (16 rows of weights, 16 rows of x)

#if COTERIE_AVX512 && defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define COTERIE_TILES 1
#include <cstdlib>
#include <sys/syscall.h>
#include <unistd.h>

// Whether this process may use the tiles: the system gives them to who asks. COTERIE_TILES=0: it shall not.
static inline bool has_tiles() {
    static const bool given = [] {
        const char *wish = getenv("COTERIE_TILES");
        constexpr long ASK = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return !(wish && *wish == '0') && syscall(SYS_arch_prctl, ASK, DATA) == 0;
    }();
    return given;
}

// While one lives, the tiles of its thread have rows of 64 bytes: 16 in the right operands (6 and 7), `rows` in the
// answers (0 to 3) and in the left operands (4 and 5).
struct Tiles {
    int shaped = 0;

    void rows(int count) {
        if (count == shaped) return;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, none[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        for (int i = 0; i < 6; i++) shape.rows[i] = uint8_t(count);
        asm volatile("ldtilecfg %0" ::"m"(shape));  // GCC's intrinsic owns up to reading the first 8 bytes alone
        shaped = count;
    }
    ~Tiles() {
        if (shaped) _tile_release();
    }
};

// out (K / 2, 16) of at most 16 rows; a null row is zeros.
static inline void pack(const bf16 *const *rows, long K, word *out) {
    for (long k = 0; k < K / 2; k += GROUP) {
        const word *part[GROUP];
        for (long i = 0; i < GROUP; i++) part[i] = rows[i] ? (const word *)rows[i] + k : nullptr;
        transpose(part, GROUP, out + k * GROUP, GROUP);
    }
}

// The first 16 rows of K numbers from each of two places, which products fetch while they compute: shared out evenly
// over as many products as there are to come, so that memory and tiles work at the same time.
struct Ahead {
    const char *first = nullptr, *second = nullptr;
    long left = 0, each = 0;  // lines of 64 bytes of either place: in all, and at a step

    Ahead() = default;
    Ahead(const bf16 *first, const bf16 *second, long K, long products)
        : first((const char *)first), second((const char *)second), left(K / 2), each(share(GROUP, products)) {}

    inline void fetch(long most) { most == GROUP && left >= GROUP ? some(GROUP) : some(left < most ? left : most); }

    inline __attribute__((always_inline)) void some(long lines) {
        for (long i = 0; i < lines; i++) {
            _mm_prefetch(first + i * 64, _MM_HINT_T1);
            _mm_prefetch(second + i * 64, _MM_HINT_T1);
        }
        first += lines * 64, second += lines * 64, left -= lines;
    }
};

// out[g][i] = the answer of w_i, 16 rows of weights, and group g, for i of 0 and 1. Groups lie K / 2 * 16 words apart.
// ALONE: other weights come next for the same groups, which stay in the first cache; else other groups for the same
// weights. What does not stay is loaded with the hint that it will not.
template <int G, bool ALONE>
static inline void products(const bf16 *w0, const bf16 *w1, long K, const word *x, float *out, Ahead &ahead) {
    const word *y = x + K / 2 * GROUP;
    asm volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
    _tile_zero(0);
    _tile_zero(1);
    if (G == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < K; k += STEP) {
        if (ALONE) {
            _tile_stream_loadd(4, w0 + k, K * 2);
            _tile_loadd(6, x + k / 2 * GROUP, 64);
            _tile_stream_loadd(5, w1 + k, K * 2);
            if (G == 2) _tile_loadd(7, y + k / 2 * GROUP, 64);
        } else {
            _tile_loadd(4, w0 + k, K * 2);
            _tile_stream_loadd(6, x + k / 2 * GROUP, 64);
            _tile_loadd(5, w1 + k, K * 2);
            if (G == 2) _tile_stream_loadd(7, y + k / 2 * GROUP, 64);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (G == 2) {
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        ahead.fetch(ahead.each);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + ANSWER, 64);
    if (G == 2) {
        _tile_stored(2, out + 2 * ANSWER, 64);
        _tile_stored(3, out + 3 * ANSWER, 64);
    }
}

// The same for one group or two, of `all` that meet these weights.
static inline void products(long groups, long all, const bf16 *w0, const bf16 *w1, long K, const word *x, float *out,
                            Ahead &ahead) {
    if (all == 2) return products<2, true>(w0, w1, K, x, out, ahead);
    if (all == 1) return products<1, true>(w0, w1, K, x, out, ahead);
    groups == 2 ? products<2, false>(w0, w1, K, x, out, ahead) : products<1, false>(w0, w1, K, x, out, ahead);
}

// An answer's first n rows of x as rows of 16 numbers: out[i * stride + j] = answer[j][i].
static inline void turn(const float *answer, long n, float *out, long stride) {
    const word *rows[GROUP];
    for (long j = 0; j < GROUP; j++) rows[j] = (const word *)answer + j * GROUP;
    transpose(rows, n, (word *)out, stride);
}

#else

static inline bool has_tiles() { return false; }

#endif
