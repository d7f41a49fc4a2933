// y = x w^T + b of bf16 through tiles: see tiles.h.
#pragma once
#include "tiles.h"

#if COTERIE_TILES

template <class Y> struct TiledLinear {
    const bf16 *x, *w, *bias;
    Y *y;
    long T, N, K;
    word *packed;  // of every group its own (K / 2, 16)

    static constexpr long WIDE = 2 * GROUP;       // rows of weights that pass together
    static constexpr long BLOCK = 256 << 10;      // bytes of weights that stay in a core's second cache
    static constexpr long NEAR = 64 << 10;        // bytes of two blocks that pass from the second cache
    static constexpr long LONG = 8192;            // numbers of a row: each is on pages of its own
    static constexpr long HIGH = 16;              // groups in a task

    static bool takes(long N, long K) { return has_tiles() && K % STEP == 0 && K > 0 && N >= GROUP; }

    void pack_group(long g) const {
        const bf16 *rows[GROUP];
        for (long i = 0; i < GROUP; i++) rows[i] = g * GROUP + i < T ? x + (g * GROUP + i) * K : nullptr;
        pack(rows, K, packed + g * K / 2 * GROUP);
    }

    // The rows n .. n + 16 of weights, or the last 16: what is computed twice is the same.
    long within(long n) const { return n + GROUP <= N ? n : N - GROUP; }

    void put(const float *answer, long g, long n) const {
        long rows = T - g * GROUP < GROUP ? T - g * GROUP : GROUP;
        alignas(64) float turned[ANSWER];
        turn(answer, rows, turned, GROUP);
        vec more = bias ? load(bias + n) : zeros();
        for (long i = 0; i < rows; i++) {
            vec sum = load(turned + i * GROUP);
            store(y + (g * GROUP + i) * N + n, bias ? add(sum, more) : sum);
        }
    }

    // Some groups against some rows of weights: all of them pass over two blocks before the next two are read. Two at
    // a time pass over all blocks where a block is too long to stay near, or an answer's rows too long to be many.
    void task(long g_begin, long g_end, long n, long n_end) const {
        long some = WIDE * K * 2 <= NEAR && N <= LONG ? g_end - g_begin : 2;
        for (long g = g_begin; g < g_end; g += some)
            pass(g, g_end - g < some ? g_end : g + some, n, n_end, g == g_begin);
    }

    // Where nobody has read the weights before (`first`), they are fetched ahead.
    void pass(long g_begin, long g_end, long n, long n_end, bool first) const {
        alignas(64) float out[4 * ANSWER];
        long all = g_end - g_begin;
        for (; n < n_end; n += WIDE) {
            long n0 = within(n), n1 = within(n + GROUP < n_end ? n + GROUP : n);
            Ahead ahead;
            if (first && n + WIDE < n_end) ahead = {w + (n + WIDE) * K, w + (n + WIDE + GROUP) * K, K, share(all, 2)};
            for (long g = g_begin; g < g_end; g += 2) {
                long groups = g_end - g < 2 ? 1 : 2;
                products(groups, all, w + n0 * K, w + n1 * K, K, packed + g * K / 2 * GROUP, out, ahead);
                for (long j = 0; j < groups; j++) {
                    put(out + 2 * j * ANSWER, g + j, n0);
                    if (n1 != n0) put(out + (2 * j + 1) * ANSWER, g + j, n1);
                }
            }
        }
    }

    void run(int threads) {
        long groups = share(T, GROUP), tall = share(groups, share(groups, HIGH));
        long most = BLOCK / (K * 2) / WIDE * WIDE, blocks = share(share(N, threads), most < WIDE ? WIDE : most) * threads;
        long width = share(share(N, blocks), WIDE) * WIDE;
        blocks = share(N, width);
        long tasks = blocks * share(groups, tall);
        packed = (word *)aligned_alloc(64, size_t(groups * K / 2 * GROUP) * sizeof(word));
        if (groups == 1) pack_group(0);
#pragma omp parallel num_threads(threads) if (tasks > 1)
        {
            Tiles tiles;
            tiles.rows(GROUP);
            if (groups > 1) {
#pragma omp for schedule(static)
                for (long g = 0; g < groups; g++) pack_group(g);
            }
#pragma omp for schedule(static) nowait
            for (long i = 0; i < tasks; i++) {
                long n = i % blocks * width, g = i / blocks * tall;
                task(g, groups - g < tall ? groups : g + tall, n, N - n < width ? N : n + width);
            }
        }
        free(packed);
    }
};

#endif
