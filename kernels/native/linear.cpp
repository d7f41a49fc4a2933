// y = x w^T + b of contiguous x (T, K), w (N, K), b (N), y (T, N).
//
// A task is a block of weights, small enough to stay in a core's second cache, by a block of rows of x. Few rows give
// tasks along N alone: each thread then streams its own share of the weights once, which is all that decoding costs.
#include "linear.h"
#include "linear_tiles.h"

constexpr long BLOCK = 256 << 10;  // bytes of weights in a block
constexpr long ROWS = 240;         // rows of x in a block

template <class X, class W, class Y>
static void linear(const X *x, const W *w, const W *bias, Y *y, long T, long N, long K, int threads) {
    if (T <= 0 || N <= 0) return;
#if COTERIE_TILES
    if constexpr (sizeof(X) == 2 && sizeof(W) == 2)
        if (TiledLinear<Y>::takes(N, K)) return TiledLinear<Y>{x, w, bias, y, T, N, K, nullptr}.run(threads);
#endif
    long most = BLOCK / (K * long(sizeof(W)) + 1) + 1;
    long blocks_N = share(share(N, threads), most) * threads, width = share(share(N, blocks_N), 8) * 8;
    blocks_N = share(N, width);
    long blocks_T = share(T, ROWS), height = share(T, blocks_T), tasks = blocks_N * blocks_T;
    Linear<X, W, Y> all = {x, w, bias, y, K, N};
#pragma omp parallel for schedule(static) num_threads(threads) if (tasks > 1)
    for (long task = 0; task < tasks; task++) {
        long n = task / blocks_T * width, t = task % blocks_T * height;
        all.block(t, T - t < height ? T : t + height, n, N - n < width ? N : n + width);
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
