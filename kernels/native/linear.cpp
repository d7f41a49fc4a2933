// y = x w^T + b of contiguous x (T, K), w (N, K), b (N), y (T, N).
//
// A task is a block of weights, small enough to stay in a core's second cache, by a block of rows of x. Few rows give
// tasks along N alone: each thread then streams its own share of the weights once, which is all that decoding costs.
#include "dot.h"

constexpr long CACHED = 256 << 10;  // bytes of weights in a block
constexpr long ROWS = 120;          // rows of x in a block

static inline long share(long total, long parts) { return (total + parts - 1) / parts; }

template <int M, int N, class X, class W, class Y>
static inline void tile(const X *x, const W *w, const W *bias, Y *y, long K, long stride) {
    const X *rows[M];
    float out[M * N];
    for (int m = 0; m < M; m++) rows[m] = x + m * K;
    dots<M, N>(rows, w, K, K, out);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) narrow(out[m * N + n] + (bias ? widen(bias[n]) : 0.0f), y[m * stride + n]);
}

// M rows of x by n rows of w.
template <int M, class X, class W, class Y>
static void strip(const X *x, const W *w, const W *bias, Y *y, long n, long K, long stride) {
    constexpr int N = M <= 2 ? 8 : 4;
    long i = 0;
    for (; i + N <= n; i += N) tile<M, N>(x, w + i * K, bias ? bias + i : nullptr, y + i, K, stride);
    for (; i < n; i++) tile<M, 1>(x, w + i * K, bias ? bias + i : nullptr, y + i, K, stride);
}

template <class X, class W, class Y>
static void block(const X *x, const W *w, const W *bias, Y *y, long t, long n, long K, long stride) {
    for (long tiles = share(t, 6), i = 0; tiles > 0; tiles--) {  // of nearly equal height
        long m = share(t - i, tiles);
        const X *own = x + i * K;
        Y *out = y + i * stride;
        if (m == 1) strip<1>(own, w, bias, out, n, K, stride);
        if (m == 2) strip<2>(own, w, bias, out, n, K, stride);
        if (m == 3) strip<3>(own, w, bias, out, n, K, stride);
        if (m == 4) strip<4>(own, w, bias, out, n, K, stride);
        if (m == 5) strip<5>(own, w, bias, out, n, K, stride);
        if (m == 6) strip<6>(own, w, bias, out, n, K, stride);
        i += m;
    }
}

template <class X, class W, class Y>
static void linear(const X *x, const W *w, const W *bias, Y *y, long T, long N, long K, int threads) {
    long most = CACHED / (K * long(sizeof(W))) + 1;
    long blocks_N = share(share(N, threads), most) * threads, width = (share(N, blocks_N) + 7) & ~7L;
    blocks_N = share(N, width);
    long blocks_T = share(T, ROWS), height = share(T, blocks_T), tasks = blocks_N * blocks_T;
#pragma omp parallel for schedule(static) num_threads(threads) if (tasks > 1)
    for (long task = 0; task < tasks; task++) {
        long n = task / blocks_T * width, t = task % blocks_T * height;
        long tall = T - t < height ? T - t : height, wide = N - n < width ? N - n : width;
        block(x + t * K, w + n * K, bias ? bias + n : nullptr, y + t * N + n, tall, wide, K, N);
    }
}

#define LINEAR(NAME, X, W, Y)                                                                                         \
    extern "C" void NAME(const void *x, const void *w, const void *bias, void *y, long T, long N, long K,             \
                         int threads) {                                                                               \
        linear((const X *)x, (const W *)w, (const W *)bias, (Y *)y, T, N, K, threads);                                \
    }

LINEAR(linear_bf16, bf16, bf16, bf16)
LINEAR(linear_bf16_fp32, bf16, bf16, float)
LINEAR(linear_fp32, float, float, float)
LINEAR(linear_mixed, bf16, float, float)
