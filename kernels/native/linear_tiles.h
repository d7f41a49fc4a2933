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

    // Some groups against some rows of weights, which the first two groups fetch ahead.
    void task(long g, long g_end, long n, long n_end) const {
        alignas(64) float out[4 * ANSWER];
        for (bool first = true; g < g_end; g += 2, first = false) {
            long groups = g_end - g < 2 ? 1 : 2;
            for (long i = n; i < n_end; i += WIDE) {
                long n0 = within(i), n1 = within(i + GROUP < n_end ? i + GROUP : i);
                Ahead ahead;
                if (first && i + WIDE < n_end) ahead = {w + (i + WIDE) * K, w + (i + WIDE + GROUP) * K, K, 1};
                products(groups, w + n0 * K, w + n1 * K, K, packed + g * K / 2 * GROUP, out, ahead);
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
