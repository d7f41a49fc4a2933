// The experts of a MoE layer by dot products of rows: fp32 everywhere, bf16 where there are no tiles.
//
// One parallel region computes in two phases: the hidden rows a = act(w_in x) of all experts, and, after one barrier,
// the outputs w_out a with their weighted sum. A task of the first phase is a block of hidden columns of one expert, a
// task of the second a block of output columns of all experts. So every row of weights is read by one thread, once,
// for all of its tokens, and the threads share the bytes and not the experts.
//
// Shapes: T tokens, D model, E experts, K choices, R routed rows, F hidden, P 2 (gate, up) or 1 projections.
#pragma once
#include "activation.h"
#include "dot.h"
#include "plan.h"

constexpr long STRIP = 18;         // rows that pass together over a block of weights at most
constexpr long TALL = 6;           // rows of a tile of sums at most: more would not leave it in registers
constexpr long NEAR = 36 << 10;    // bytes of such rows that stay in a core's first cache

// out[m * stride + n] = <x_m, w_n> for M rows of x and `count` rows of w.
template <int M, bool AHEAD, class X>
static inline void strip(const X *const *x, const X *w, long count, long K, float *out, long stride) {
    constexpr int WIDE = M <= 2 ? 8 : 4;
    float sums[M * WIDE];
    long n = 0;
    for (; n + WIDE <= count; n += WIDE) {
        dots<M, WIDE, AHEAD && WIDE == 4>(x, w + n * K, K, K, sums);
        for (int m = 0; m < M; m++) memcpy(out + m * stride + n, sums + m * WIDE, WIDE * sizeof(float));
    }
    for (; n < count; n++) {
        dots<M, 1>(x, w + n * K, K, K, sums);
        for (int m = 0; m < M; m++) out[m * stride + n] = sums[m];
    }
}

template <bool AHEAD, class X>
static inline void strip(long m, const X *const *x, const X *w, long count, long K, float *out, long stride) {
    if (m == 6) strip<6, AHEAD>(x, w, count, K, out, stride);
    if (m == 5) strip<5, AHEAD>(x, w, count, K, out, stride);
    if (m == 4) strip<4, AHEAD>(x, w, count, K, out, stride);
    if (m == 3) strip<3, AHEAD>(x, w, count, K, out, stride);
    if (m == 2) strip<2, AHEAD>(x, w, count, K, out, stride);
    if (m == 1) strip<1, AHEAD>(x, w, count, K, out, stride);
}

// The same for any number of rows, at best STRIP: all of them pass over four rows of weights before the next four are
// read. Where nobody has read the weights before (FIRST), each pass fetches its share of those eight rows ahead, so
// that the memory works while the rows compute.
template <bool FIRST, class X>
static void product(long rows, const X *const *x, const X *w, long count, long K, float *out, long stride) {
    if (rows <= 4) return strip<FIRST>(rows, x, w, count, K, out, stride);
    long tiles = share(rows, TALL), lines = share(4 * K * long(sizeof(X)), 64 * tiles);
    for (long n = 0; n < count; n += 4, w += 4 * K) {
        const char *ahead = (const char *)(w + 8 * K);
        for (long i = 0, left = tiles; left > 0; left--) {
            long m = share(rows - i, left);
            if (FIRST)
                for (long end = lines; end > 0; end--, ahead += 64) __builtin_prefetch(ahead);
            strip<false>(m, x + i, w, at_most(count - n, 4), K, out + i * stride + n, stride);
            i += m;
        }
    }
}

template <class X>
static void product(bool first, long rows, const X *const *x, const X *w, long count, long K, float *out,
                    long stride) {
    first ? product<true>(rows, x, w, count, K, out, stride) : product<false>(rows, x, w, count, K, out, stride);
}

// Rows that pass together: where they are few, all of them, as the memory is slower than any cache.
template <class X> static long together(long rows, long K) {
    return rows <= STRIP || STRIP * K * long(sizeof(X)) <= NEAR ? STRIP : TALL;
}

template <class P> static void take(P *&own, char *&room, long count) {
    own = (P *)room;
    room += share(count * long(sizeof(P)), 64) * 64;
}

template <class X> struct Layer {
    using number = X;
    const X *w_in, *b_in, *w_out, *b_out;
    long D, E, F, P;
    Plan plan = {};
    X *a_RF = nullptr;
    float *out = nullptr;  // of each block of output columns its own (R, columns)
    long width_F = 0, width_D = 0;

    // Memory for `most` rows.
    void find_room(char *&room, long most) {
        take(a_RF, room, most * F);
        take(out, room, most * D);
    }

    // What a task of either phase is.
    void cut(int threads) {
        long in = P * D * long(sizeof(X)), after = F * long(sizeof(X));
        width_F = columns(F, plan.parts_count, in, in, threads);
        width_D = columns(D, 1, at_least(plan.experts_count, 1) * after, after, threads);
    }

    // a[rows][f .. f + n] of one part.
    void hidden(const X *x, Plan::Part part, long f, long n) const {
        const X *w = w_in + (part.e * P * F + f) * D, *rows[STRIP];
        float z[STRIP * WIDTH], up[STRIP * WIDTH];
        for (long i = 0, step = together<X>(part.rows, D); i < part.rows; i += step) {
            long count = at_most(part.rows - i, step), row = part.row + i;
            for (long m = 0; m < count; m++) rows[m] = x + plan.token_R[row + m] * D;
            product(!i, count, rows, w, n, D, z, n);
            if (P == 2) product(!i, count, rows, w + F * D, n, D, up, n);
            for (long m = 0; m < count; m++) {
                const X *bias = b_in ? b_in + part.e * P * F + f : nullptr;
                float *own = z + m * n;
                if (bias) add_bias(own, bias, n);
                if (bias && P == 2) add_bias(up + m * n, bias + F, n);
                P == 2 ? swiglu(own, up + m * n, n) : gelu(own, n);
                round(a_RF + (row + m) * F + f, own, n);
            }
        }
    }

    static void add_bias(float *z, const X *bias, long n) {
        for (long i = 0; i < n; i++) z[i] += widen(bias[i]);
    }

    static void round(X *to, const float *from, long n) {
        long i = 0;
        for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
        if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
    }

    // out[r][0 .. n] = w_out[d .. d + n] a_r of all rows.
    void outputs(float *own, long d, long n) const {
        const X *rows[STRIP];
        for (long p = 0; p < plan.parts_count; p++) {
            Plan::Part part = plan.parts[p];
            const X *w = w_out + (part.e * D + d) * F;
            for (long i = 0, step = together<X>(part.rows, F); i < part.rows; i += step) {
                long count = at_most(part.rows - i, step), row = part.row + i;
                for (long m = 0; m < count; m++) rows[m] = a_RF + (row + m) * F;
                product(!i, count, rows, w, n, F, own + row * n, n);
                if (b_out)
                    for (long m = 0; m < count; m++) add_bias(own + (row + m) * n, b_out + part.e * D + d, n);
            }
        }
    }

    // y[t][d .. d + n], in the order of k.
    void combine(const float *own, const float *weights, X *y, long T, long K, long d, long n) const {
        float sum[WIDTH];
        for (long t = 0; t < T; t++) {
            for (long i = 0; i < n; i++) sum[i] = 0;
            for (long k = t * K; k < (t + 1) * K; k++) {
                if (plan.slot_TK[k] < 0) continue;
                const float *row = own + plan.slot_TK[k] * n;
                float by = weights ? weights[k] : 1.0f;
                for (long i = 0; i < n; i++) sum[i] += by * row[i];
            }
            round(y + t * D + d, sum, n);
        }
    }

    void run(const X *x, const float *weights, X *y, long T, long K, int threads) const {
        long tasks_F = share(F, width_F), tasks_D = share(D, width_D), R = plan.first_E[E];
#pragma omp parallel num_threads(threads) if (R * F * D > SMALL)
        {
#pragma omp for schedule(dynamic)
            for (long task = 0; task < plan.parts_count * tasks_F; task++) {
                long f = task % tasks_F * width_F;
                hidden(x, plan.parts[task / tasks_F], f, at_most(F - f, width_F));
            }
#pragma omp for schedule(dynamic)
            for (long task = 0; task < tasks_D; task++) {
                long d = task * width_D, n = at_most(D - d, width_D);
                float *own = out + R * d;
                outputs(own, d, n);
                combine(own, weights, y, T, K, d, n);
            }
        }
    }
};
