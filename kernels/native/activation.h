// The activations of feed-forward networks over rows of fp32. Every number is computed by itself, so the compiler
// may take any number of them at once.
#pragma once
#include <cstdint>
#include <cstring>

// e^x to 2 units in the last place: 2^n e^r with |r| <= log(2) / 2. Beyond fp32's range it stays just inside; NaN
// stays NaN.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is a whole number
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;  // the coefficients of Cephes' expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;  // the low bits of the shifted number are n
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// gate = silu(gate) * up
static inline void swiglu(float *gate, const float *up, long n) {
    for (long i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// The tanh form: z (1 + tanh(s)) / 2 = z / (1 + e^-2s).
static inline void gelu(float *z, long n) {
    for (long i = 0; i < n; i++) {
        float s = 1.59576912f * (z[i] + 0.044715f * (z[i] * z[i] * z[i]));
        z[i] = z[i] / (1.0f + exponential(-s));
    }
}
