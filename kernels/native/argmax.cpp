// The largest number of each row and where it stands first, NaN where the row holds one.
#include "simd.h"

constexpr long PIECE = 1024;  // numbers of which the largest is found before it is looked for

// The largest of n numbers; sets `odd` where one of them is NaN or infinite.
template <class T> static float largest(const T *x, long n, bool &odd) {
    vec most = all(-__builtin_inff()), zero = zeros();
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec a = load(x + i);
        most = larger(most, a);
        zero = fma(a, zeros(), zero);
    }
    float lanes[LANES], best = -__builtin_inff();
    store(lanes, most);
    for (float lane : lanes) best = lane > best ? lane : best;
    float rest = sum(zero);
    for (; i < n; i++) {
        float a = widen(x[i]);
        best = a > best ? a : best;
        rest += a * 0.0f;
    }
    odd |= rest != 0.0f;
    return best;
}

template <class T> static void row(const T *x, long n, int64_t *id, float *best) {
    bool odd = false;
    long piece = 0;
    *best = -__builtin_inff();
    *id = 0;
    for (long i = 0; i < n; i += PIECE) {
        float own = largest(x + i, n - i < PIECE ? n - i : PIECE, odd);
        if (own > *best) *best = own, piece = i;
    }
    if (odd) {  // an infinity is a number like any other, a NaN is the answer
        *best = -__builtin_inff();
        for (long i = 0; i < n; i++) {
            float a = widen(x[i]);
            if (a != a) {
                *best = a, *id = i;
                return;
            }
            if (a > *best) *best = a, *id = i;
        }
        return;
    }
    for (*id = piece; *id < n && widen(x[*id]) != *best;) ++*id;
}

template <class T> static void argmax(const T *x, int64_t *ids, float *best, long rows, long n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1)
    for (long r = 0; r < rows; r++) row(x + r * n, n, ids + r, best + r);
}

extern "C" void argmax_bf16(const void *x, void *ids, void *best, long rows, long n, int threads) {
    argmax((const bf16 *)x, (int64_t *)ids, (float *)best, rows, n, threads);
}

extern "C" void argmax_fp32(const void *x, void *ids, void *best, long rows, long n, int threads) {
    argmax((const float *)x, (int64_t *)ids, (float *)best, rows, n, threads);
}
