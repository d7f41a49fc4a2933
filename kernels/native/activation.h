// The activations of feed-forward networks over rows of fp32. Every number is computed by itself.
#pragma once
#include "lanes.h"

// e^x to 2 units in the last place: 2^n e^r with |r| <= log(2) / 2. Beyond fp32's range it stays just inside; NaN
// stays NaN.
static inline vec exponential(vec x) {
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which the low bits hold
    x = larger(all(-87.0f), smaller(all(88.0f), x));
    vec shifted = fma(x, all(1.44269504f), magic), n = sub(shifted, magic);
    vec r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
    vec p = all(1.9875691500e-4f);  // the coefficients of Cephes' expf
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(fma(p, r, all(1.0f)), r, all(1.0f));
    return as_vec(bits_of(p) + (bits_of(shifted) << 23));
}

// z / (1 + e^by)
static inline vec damped(vec z, vec by) { return div(z, add(all(1.0f), exponential(by))); }

static inline vec silu(vec z) { return damped(z, sub(zeros(), z)); }

// The tanh form: z (1 + tanh(s)) / 2 = z / (1 + e^-2s).
static inline vec gelu(vec z) {
    return damped(z, mul(all(-1.59576912f), fma(mul(all(0.044715f), mul(z, z)), z, z)));
}

// gate = silu(gate) * up
static inline void swiglu(float *gate, const float *up, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(gate + i, mul(silu(load(gate + i)), load(up + i)));
    if (i < n) store_part(gate + i, mul(silu(load_part(gate + i, n - i)), load_part(up + i, n - i)), n - i);
}

static inline void gelu(float *z, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(z + i, gelu(load(z + i)));
    if (i < n) store_part(z + i, gelu(load_part(z + i, n - i)), n - i);
}
