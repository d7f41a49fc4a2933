// Rotary position embedding of queries and keys: (x[i], x[i + d/2]) turns by the angle of its token and i, in fp32.
#include <cmath>

#include "simd.h"

constexpr long SMALL = 1 << 15;  // numbers that one thread rotates sooner than a second one wakes up

// One head of d = 2 * half numbers, in its place.
template <class X> static void turn(X *x, const float *cos, const float *sin, long half) {
    for (long i = 0; i < half; i += LANES) {
        long n = half - i;
        if (n >= LANES) {
            vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
            store(x + i, sub(mul(a, c), mul(b, s)));
            store(x + half + i, fma(b, c, mul(a, s)));
        } else {
            vec a = load_part(x + i, n), b = load_part(x + half + i, n);
            vec c = load_part(cos + i, n), s = load_part(sin + i, n);
            store_part(x + i, sub(mul(a, c), mul(b, s)), n);
            store_part(x + half + i, fma(b, c, mul(a, s)), n);
        }
    }
}

// q (T, H, d) and k (T, G, d) with any stride between tokens, heads side by side; cos and sin (S, half), of which
// token t has row t modulo S.
template <class X>
static void rope(X *q, X *k, long q_stride, long k_stride, const float *cos, const float *sin, long T, long S, long H,
                 long G, long half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (T * (H + G) * half * 2 > SMALL)
    for (long t = 0; t < T; t++) {
        const float *c = cos + t % S * half, *s = sin + t % S * half;
        for (long h = 0; h < H; h++) turn(q + t * q_stride + h * 2 * half, c, s, half);
        for (long h = 0; h < G; h++) turn(k + t * k_stride + h * 2 * half, c, s, half);
    }
}

#define ROPE(NAME, X)                                                                                                 \
    extern "C" void NAME(void *q, void *k, long q_stride, long k_stride, const void *cos, const void *sin, long T,    \
                         long S, long H, long G, long half, int threads) {                                            \
        rope((X *)q, (X *)k, q_stride, k_stride, (const float *)cos, (const float *)sin, T, S, H, G, half, threads);  \
    }

// cos and sin (T, half) of positions * rates.
extern "C" void rope_table(const void *positions, const void *rates, void *cos, void *sin, long T, long half,
                           int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (T * half > SMALL / 8)
    for (long t = 0; t < T; t++)
        for (long i = 0; i < half; i++) {
            float angle = float(((const int64_t *)positions)[t]) * ((const float *)rates)[i];
            ((float *)cos)[t * half + i] = std::cos(angle);
            ((float *)sin)[t * half + i] = std::sin(angle);
        }
}

ROPE(rope_bf16, bf16)
ROPE(rope_fp32, float)
