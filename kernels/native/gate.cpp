// The router of a MoE layer where nothing is dropped: logits, scores, the best K of E experts, their weights and the
// load. Shapes: T tokens, D model, E experts, K choices, groups of M experts.
#include <cmath>
#include <cstdlib>

#include "linear.h"

constexpr long WORK = 1 << 18;  // multiplications that one thread does sooner than a second one wakes up
constexpr long ROWS = 32;       // tokens of a task

struct Choice {
    long E, K, groups, open;  // `open` groups compete
    bool sigmoid, renormalize;
    float scale;
};

static void softmax(float *a, long n) {
    float most = a[0], total = 0;
    for (long i = 1; i < n; i++) most = a[i] > most ? a[i] : most;
    for (long i = 0; i < n; i++) total += a[i] = std::exp(a[i] - most);
    for (long i = 0; i < n; i++) a[i] /= total;
}

// Whether a comes before b: NaN first, as in a descending sort of torch. Equals do not, so the lowest index stays.
static inline bool before(float a, float b) { return a > b || (a != a && b == b); }

static inline long best_of(const float *a, long n) {
    long best = 0;
    for (long i = 1; i < n; i++)
        if (before(a[i], a[best])) best = i;
    return best;
}

// Closes all groups but the best ones, by the sum of their best two scores, or the only one.
static void close_groups(float *select, float *sums, const Choice &how) {
    long M = how.E / how.groups;
    for (long g = 0; g < how.groups; g++) {
        const float *own = select + g * M;
        long first = best_of(own, M);
        float second = -INFINITY;
        for (long i = 0; i < M; i++)
            if (i != first && before(own[i], second)) second = own[i];
        sums[g] = M > 1 ? own[first] + second : own[first];
    }
    for (long n = 0; n < how.open; n++) {
        long g = best_of(sums, how.groups);
        sums[g] = -INFINITY;
        for (long i = g * M; i < (g + 1) * M; i++) select[how.E + i] = select[i];
    }
    memcpy(select, select + how.E, size_t(how.E) * sizeof(float));
}

// `scores` holds the logits of one token; `select` is room for 2 E + groups numbers.
static void choose(float *scores, const float *bias, float *select, int64_t *ids, float *weights, const Choice &how) {
    if (how.sigmoid)
        for (long e = 0; e < how.E; e++) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    else
        softmax(scores, how.E);
    for (long e = 0; e < how.E; e++) select[e] = bias ? scores[e] + bias[e] : scores[e];
    if (how.groups > 1) {
        for (long e = 0; e < how.E; e++) select[how.E + e] = -INFINITY;
        close_groups(select, select + 2 * how.E, how);
    }
    float total = 0;
    for (long k = 0; k < how.K; k++) {
        long e = best_of(select, how.E);
        ids[k] = e, weights[k] = scores[e], total += scores[e];
        select[e] = -INFINITY;
    }
    float by = how.renormalize ? total > 1e-20f || total != total ? total : 1e-20f : 1.0f;
    for (long k = 0; k < how.K; k++) weights[k] = weights[k] / by * how.scale;
}

template <class X>
static void gate(const X *x, const float *w, const float *bias, int64_t *ids, float *weights, int64_t *counts, long T,
                 long D, Choice how, int threads) {
    long tasks = share(T, ROWS);
#pragma omp parallel for schedule(static) num_threads(threads) if (T * D * how.E > WORK && tasks > 1)
    for (long task = 0; task < tasks; task++) {
        long t = task * ROWS, end = T - t < ROWS ? T : t + ROWS;
        float *logits = (float *)malloc(size_t((end - t + 2) * how.E + how.groups) * sizeof(float));
        float *select = logits + (end - t) * how.E;
        Linear<X, float, float>{x + t * D, w, nullptr, logits, D, how.E}.block(0, end - t, 0, how.E);
        for (long i = 0; i < end - t; i++)
            choose(logits + i * how.E, bias, select, ids + (t + i) * how.K, weights + (t + i) * how.K, how);
        free(logits);
    }
    for (long e = 0; e < how.E; e++) counts[e] = 0;
    for (long a = 0; a < T * how.K; a++) counts[ids[a]]++;
}

#define GATE(NAME, X)                                                                                                 \
    extern "C" void NAME(const void *x, const void *w, const void *bias, void *ids, void *weights, void *counts,      \
                         long T, long D, long E, long K, long groups, long open, int sigmoid, int renormalize,        \
                         float scale, int threads) {                                                                  \
        gate((const X *)x, (const float *)w, (const float *)bias, (int64_t *)ids, (float *)weights,                   \
             (int64_t *)counts, T, D,                                                                                 \
             Choice{E, K, groups, open, sigmoid != 0, renormalize != 0, scale}, threads);                             \
    }

// x_t *= sigmoid(logit_t) of rows (T, D).
template <class X> static void scale(X *x, const X *logits, long T, long D) {
    for (long t = 0; t < T; t++) {
        float by = 1.0f / (1.0f + std::exp(-widen(logits[t])));
        for (long d = 0; d < D; d++) narrow(widen(x[t * D + d]) * by, x[t * D + d]);
    }
}

extern "C" void scale_bf16(void *x, const void *logits, long T, long D) { scale((bf16 *)x, (const bf16 *)logits, T, D); }
extern "C" void scale_fp32(void *x, const void *logits, long T, long D) {
    scale((float *)x, (const float *)logits, T, D);
}

// y_t = c_0 y_t + c_1 r_t of rows (T, D), with c the softmax of two logits.
template <class X> static void mix(X *y, const X *r, const X *logits, long T, long D, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (T * D > 1 << 16)
    for (long t = 0; t < T; t++) {
        float second = 1.0f / (1.0f + std::exp(widen(logits[2 * t]) - widen(logits[2 * t + 1])));
        vec c = all(1.0f - second), e = all(second);
        X *to = y + t * D;
        for (long d = 0; d < D; d += LANES) {
            long n = D - d < LANES ? D - d : LANES;
            store_part(to + d, fma(load_part(to + d, n), c, mul(load_part(r + t * D + d, n), e)), n);
        }
    }
}

extern "C" void mix_bf16(void *y, const void *r, const void *logits, long T, long D, int threads) {
    mix((bf16 *)y, (const bf16 *)r, (const bf16 *)logits, T, D, threads);
}
extern "C" void mix_fp32(void *y, const void *r, const void *logits, long T, long D, int threads) {
    mix((float *)y, (const float *)r, (const float *)logits, T, D, threads);
}

GATE(gate_bf16, bf16)
GATE(gate_fp32, float)
