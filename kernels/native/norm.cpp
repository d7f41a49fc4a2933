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
template <class X, class W>
static void row(const X *x, const W *weight, const W *bias, X *y, long D, Norm norm) {
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

template <class X, class W>
static void norm(const X *x, const X *residual, const W *weight, const W *bias, X *y, X *h, long T, long D, Norm kind,
                 int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (T * D > SMALL)
    for (long t = 0; t < T; t++) {
        const X *from = x + t * D;
        if (residual) {
            X *total = h + t * D;
            columns(D, [&](long d, long n) { put(total + d, add(get(from + d, n), get(residual + t * D + d, n)), n); });
            from = total;
        }
        row(from, weight, bias, y + t * D, D, kind);
    }
}

// Without a residual h is not written. x, residual, y and h are of one kind, weight and bias of another.
#define NORM(NAME, X, W)                                                                                              \
    extern "C" void NAME(const void *x, const void *residual, const void *weight, const void *bias, void *y, void *h, \
                         long T, long D, float eps, int centre, int threads) {                                        \
        norm((const X *)x, (const X *)residual, (const W *)weight, (const W *)bias, (X *)y, (X *)h, T, D,             \
             Norm{eps, centre != 0}, threads);                                                                        \
    }

NORM(norm_bf16, bf16, bf16)
NORM(norm_fp32, float, float)
