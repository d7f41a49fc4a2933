// Rotary position embedding of queries and keys: (x[i], x[i + d/2]) turns by the angle of its token and i, in fp32.
#include "simd.h"

constexpr long SMALL = 1 << 15;  // numbers that one thread rotates sooner than a second one wakes up

// One head of d = 2 * half numbers.
template <class X> static void turn(const X *x, const float *cos, const float *sin, X *y, long half) {
    for (long i = 0; i < half; i += LANES) {
        long n = half - i;
        if (n >= LANES) {
            vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
            store(y + i, sub(mul(a, c), mul(b, s)));
            store(y + half + i, fma(b, c, mul(a, s)));
        } else {
            vec a = load_part(x + i, n), b = load_part(x + half + i, n);
            vec c = load_part(cos + i, n), s = load_part(sin + i, n);
            store_part(y + i, sub(mul(a, c), mul(b, s)), n);
            store_part(y + half + i, fma(b, c, mul(a, s)), n);
        }
    }
}

template <class X>
static void heads(const X *x, long stride, long count, const float *cos, const float *sin, X *y, long t, long half) {
    for (long h = 0; h < count; h++)
        turn(x + t * stride + h * 2 * half, cos, sin, y + (t * count + h) * 2 * half, half);
}

// q (T, H, d) and k (T, G, d) with any stride between tokens, heads side by side; cos and sin (S, half), of which
// token t has row t modulo S. The answers are contiguous.
template <class X>
static void rope(const X *q, const X *k, long q_stride, long k_stride, const float *cos, const float *sin, X *q_out,
                 X *k_out, long T, long S, long H, long G, long half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (T * (H + G) * half * 2 > SMALL)
    for (long t = 0; t < T; t++) {
        const float *c = cos + t % S * half, *s = sin + t % S * half;
        heads(q, q_stride, H, c, s, q_out, t, half);
        heads(k, k_stride, G, c, s, k_out, t, half);
    }
}

#define ROPE(NAME, X)                                                                                                 \
    extern "C" void NAME(const void *q, const void *k, long q_stride, long k_stride, const void *cos,                 \
                         const void *sin, void *q_out, void *k_out, long T, long S, long H, long G, long half,        \
                         int threads) {                                                                               \
        rope((const X *)q, (const X *)k, q_stride, k_stride, (const float *)cos, (const float *)sin, (X *)q_out,      \
             (X *)k_out, T, S, H, G, half, threads);                                                                  \
    }

ROPE(rope_bf16, bf16)
ROPE(rope_fp32, float)
