// y = x w^T + b of contiguous x (T, K), w (N, K), b (N), y (T, N): one thread's part of it.
#pragma once
#include "dot.h"

constexpr long FEW = 32 << 10;  // bytes of x that stay in the first cache while the block's weights pass

template <class X, class W, class Y> struct Linear {
    const X *x;
    const W *w, *bias;
    Y *y;
    long K, N;

    // y[t .. t + M][n .. n + WIDE].
    template <int M, int WIDE, bool AHEAD> inline void tile(long t, long n) const {
        constexpr int COUNT = (M * WIDE + LANES - 1) / LANES * LANES;
        const X *rows[M];
        float sums[COUNT];
        Y out[COUNT];
        for (int m = 0; m < M; m++) rows[m] = x + (t + m) * K;
        dots<M, WIDE, AHEAD>(rows, w + n * K, K, K, sums);
        if (bias)
            for (int m = 0; m < M; m++)
                for (int i = 0; i < WIDE; i++) sums[m * WIDE + i] += widen(bias[n + i]);
        for (int i = 0; i < COUNT; i += LANES) store(out + i, load(sums + i));
        for (int m = 0; m < M; m++) memcpy(y + (t + m) * N + n, out + m * WIDE, WIDE * sizeof(Y));
    }

    // M rows against a block of weights, the weights being fetched ahead where nobody has read them before.
    template <int M, bool AHEAD> void strip(long t, long n, long n_end) const {
        constexpr int WIDE = M <= 2 ? 8 : 4;
        for (; n + WIDE <= n_end; n += WIDE) tile<M, WIDE, AHEAD && WIDE == 4>(t, n);
        for (; n < n_end; n++) tile<M, 1, false>(t, n);
    }

    template <bool AHEAD> void strip(long m, long t, long n, long n_end) const {
        if (m == 6) strip<6, AHEAD>(t, n, n_end);
        if (m == 5) strip<5, AHEAD>(t, n, n_end);
        if (m == 4) strip<4, AHEAD>(t, n, n_end);
        if (m == 3) strip<3, AHEAD>(t, n, n_end);
        if (m == 2) strip<2, AHEAD>(t, n, n_end);
        if (m == 1) strip<1, AHEAD>(t, n, n_end);
    }

    // Few rows, which wait in the first cache, pass over four rows of weights before the next four are read: the
    // memory works all the time. Many rows pass over the whole block, six at a time.
    void block(long t, long t_end, long n, long n_end) const {
        long rows = t_end - t, wide = rows > 4 && rows * K * long(sizeof(X)) <= FEW ? 4 : n_end - n;
        for (; n < n_end; n += wide) {
            long end = n_end - n < wide ? n_end : n + wide, tiles = share(rows, rows > 8 ? 6 : 4), m = share(rows, tiles);
            strip<true>(m, t, n, end);
            for (long i = t + m; --tiles > 0; i += m) {
                m = share(t_end - i, tiles);
                strip<false>(m, i, n, end);
            }
        }
    }
};
