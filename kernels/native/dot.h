// Dot products of a few rows by a few rows, in registers: the inside of every product in this folder.
//
// The rows of x and of w both lie along K, as weights lie in the model, so nothing is packed. Each output is summed
// in one order, LANES chains along K and then `sum`, whatever the tile: a row's result does not depend on how many
// rows there are or where it stands among them.
#pragma once
#include "simd.h"

// One operand of one step along K. Two bf16 rows multiply in pairs where the machine can (dpbf16ps); all else is
// widened to fp32.
template <class X, class W> struct Step {
    static constexpr long K = LANES;
    using operand = vec;
    template <class T> static inline operand take(const T *p) { return load(p); }
    template <class T> static inline operand take_part(const T *p, long n) { return load_part(p, n); }
    static inline vec add(operand x, operand w, vec sum) { return fma(x, w, sum); }
};

#if COTERIE_AVX512 && defined(__AVX512BF16__)
template <> struct Step<bf16, bf16> {
    static constexpr long K = 32;
    using operand = __m512i;
    static inline operand take(const bf16 *p) { return _mm512_loadu_si512(p); }
    static inline operand take_part(const bf16 *p, long n) {
        return _mm512_maskz_loadu_epi16(__mmask32(n >= 32 ? ~0u : (1u << n) - 1), p);
    }
    static inline vec add(operand x, operand w, vec sum) {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)x, (__m512bh)w)};
    }
};
#endif

// out[i] = sum(a[i]).
template <int COUNT> static inline void sums(const vec *a, float *out) {
    if constexpr (COUNT >= 16) {
        sums16(a, out);
        sums<COUNT - 16>(a + 16, out + 16);
    } else if constexpr (COUNT >= 6) {
        vec padded[16];
        float sixteen[16];
        for (int i = 0; i < 16; i++) padded[i] = a[i < COUNT ? i : 0];
        sums16(padded, sixteen);
        memcpy(out, sixteen, COUNT * sizeof(float));
    } else {
        for (int i = 0; i < COUNT; i++) out[i] = sum(a[i]);
    }
}

// out[m * N + n] = sum over k of x[m][k] * w[n * stride + k], in fp32. The best tile is 4 x 4, 6 x 4 of
// many rows, and 1 x 8 or 2 x 8 of few. With AHEAD the next N rows of w are fetched meanwhile: four streams do not keep the memory busy, eight do.
template <int M, int N, bool AHEAD = false, class X, class W>
static inline __attribute__((always_inline)) void dots(const X *const *x, const W *w, long stride, long K, float *out) {
    using step = Step<X, W>;
    vec acc[M * N];
    const X *row[M];
    for (int m = 0; m < M; m++) {
        row[m] = x[m];
        for (int n = 0; n < N; n++) acc[m * N + n] = zeros();
    }
    long k = 0;
    for (; k + step::K <= K; k += step::K) {
        typename step::operand wide[N];
        for (int n = 0; n < N; n++) {
            wide[n] = step::take(w + n * stride + k);
            if (AHEAD) __builtin_prefetch(w + (N + n) * stride + k);
        }
        for (int m = 0; m < M; m++) {
            auto own = step::take(row[m] + k);
            for (int n = 0; n < N; n++) acc[m * N + n] = step::add(own, wide[n], acc[m * N + n]);
        }
    }
    if (k < K) {
        typename step::operand wide[N];
        for (int n = 0; n < N; n++) wide[n] = step::take_part(w + n * stride + k, K - k);
        for (int m = 0; m < M; m++) {
            auto own = step::take_part(row[m] + k, K - k);
            for (int n = 0; n < N; n++) acc[m * N + n] = step::add(own, wide[n], acc[m * N + n]);
        }
    }
    sums<M * N>(acc, out);
}
