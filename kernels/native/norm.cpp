// Norms over the last axis of contiguous rows (T, D), with the residual sum before them; all in fp32.
#include <cmath>

#include "simd.h"

constexpr long SMALL = 1 << 15;  // numbers that one thread norms sooner than a second one wakes up

struct Norm {
    float eps;
    bool centre;  // layer norm: less the mean
};

// f(first column, columns) over a row, whole vectors first.
template <class F> static inline void columns(long D, F f) {
    long d = 0;
    for (; d + LANES <= D; d += LANES) f(d, LANES);
    if (d < D) f(d, D - d);
}

template <class T> static inline vec get(const T *p, long n) { return n == LANES ? load(p) : load_part(p, n); }
template <class T> static inline void put(T *p, vec a, long n) { n == LANES ? store(p, a) : store_part(p, a, n); }

// y = norm(x) * weight + bias of one row.
template <class X> static void row(const X *x, const X *weight, const X *bias, X *y, long D, Norm norm) {
    float mean = 0;
    if (norm.centre) {
        vec total = zeros();
        columns(D, [&](long d, long n) { total = add(total, get(x + d, n)); });
        mean = sum(total) / float(D);
    }
    vec square = zeros();
    columns(D, [&](long d, long n) {
        vec a = get(x + d, n);
        if (norm.centre) a = keep(sub(a, all(mean)), n);
        square = fma(a, a, square);
    });
    float scale = 1.0f / std::sqrt(sum(square) / float(D) + norm.eps);
    columns(D, [&](long d, long n) {
        vec a = mul(mul(sub(get(x + d, n), all(mean)), all(scale)), get(weight + d, n));
        put(y + d, bias ? add(a, get(bias + d, n)) : a, n);
    });
}

template <class X>
static void norm(const X *x, const X *residual, const X *weight, const X *bias, X *y, X *h, long T, long D, long inner,
                 long stride, Norm kind, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (T * D > SMALL)
    for (long t = 0; t < T; t++) {
        const X *from = x + t / inner * stride + t % inner * D;
        if (residual) {
            X *total = h + t * D;
            columns(D, [&](long d, long n) { put(total + d, add(get(from + d, n), get(residual + t * D + d, n)), n); });
            from = total;
        }
        row(from, weight, bias, y + t * D, D, kind);
    }
}

// Rows of x lie side by side, `inner` of them at every `stride` numbers; those of residual, y and h all do. Without a
// residual h is not written.
#define NORM(NAME, X)                                                                                                 \
    extern "C" void NAME(const void *x, const void *residual, const void *weight, const void *bias, void *y, void *h, \
                         long T, long D, long inner, long stride, float eps, int centre, int threads) {               \
        norm((const X *)x, (const X *)residual, (const X *)weight, (const X *)bias, (X *)y, (X *)h, T, D, inner,      \
             stride, Norm{eps, centre != 0}, threads);                                                                \
    }

// x += y of n numbers.
template <class X> static void plus(X *x, const X *y, long n, int threads) {
    long parts = share(n, SMALL);
#pragma omp parallel for schedule(static) num_threads(threads) if (parts > 1)
    for (long part = 0; part < parts; part++) {
        long first = part * SMALL, count = n - first < SMALL ? n - first : SMALL;
        columns(count, [&](long i, long wide) {
            X *own = x + first + i;
            put(own, add(get(own, wide), get(y + first + i, wide)), wide);
        });
    }
}

extern "C" void plus_bf16(void *x, const void *y, long n, int threads) { plus((bf16 *)x, (const bf16 *)y, n, threads); }
extern "C" void plus_fp32(void *x, const void *y, long n, int threads) {
    plus((float *)x, (const float *)y, n, threads);
}

NORM(norm_bf16, bf16)
NORM(norm_fp32, float)
