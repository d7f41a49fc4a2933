// The experts of a MoE layer for tokens that are all here: y_t = sum over k of weight_tk * expert(x_t).
//
// The tokens are counted by expert, then one parallel region computes in two phases: the hidden rows a = act(w_in x)
// of all experts, and, after one barrier, the outputs w_out a with their weighted sum. A task of the first phase is a
// block of hidden columns of one expert, a task of the second a block of output columns of all experts. So every row
// of weights is read by one thread, once, for all of its tokens, and the threads share the bytes and not the experts.
//
// Shapes: T tokens, D model, E experts, K choices, R routed rows, F hidden, P 2 (gate, up) or 1 projections.
#include "activation.h"
#include "dot.h"

constexpr long ROWS = 512;         // of one expert in a task
constexpr long STRIP = 16;         // rows that pass together over a block of weights
constexpr long WIDTH = 256;        // columns of a task at most
constexpr long BLOCK = 256 << 10;  // bytes of weights that stay in a core's second cache
constexpr long UNIT = 64 << 10;    // bytes of weights that are worth a task
constexpr long SMALL = 1 << 16;    // multiplications that one thread does sooner than a second one wakes up

static inline long at_least(long a, long b) { return a > b ? a : b; }
static inline long at_most(long a, long b) { return a < b ? a : b; }

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
    long tiles = share(rows, 4), lines = share(4 * K * long(sizeof(X)), 64 * tiles);
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

namespace {

// Which rows there are. Row r belongs to token_R[r]; an expert's rows lie together, in the order of the tokens.
struct Plan {
    struct Part {
        long e, row, rows;
    };
    long *first_E;           // E + 1
    int *token_R, *slot_TK;  // slot: the row of a choice, -1 without
    Part *parts;             // at most ROWS rows of one expert
    long parts_count, experts_count;

    void make(const int64_t *ids, long T, long K, long E) {
        memset(first_E, 0, size_t(E + 1) * sizeof *first_E);
        for (long i = 0; i < T * K; i++) {
            int64_t e = ids ? ids[i] : 0;
            if (e >= 0) first_E[e + 1]++;
        }
        parts_count = experts_count = 0;
        for (long e = 0; e < E; e++) {
            long rows = first_E[e + 1];
            first_E[e + 1] += first_E[e];
            experts_count += rows > 0;
            for (long row = 0; row < rows; row += ROWS)
                parts[parts_count++] = {e, first_E[e] + row, at_most(rows - row, ROWS)};
        }
        for (long i = 0; i < T * K; i++) {
            int64_t e = ids ? ids[i] : 0;
            slot_TK[i] = e < 0 ? -1 : int(first_E[e]++);
            if (e >= 0) token_R[slot_TK[i]] = int(i / K);
        }
        for (long e = E; e > 0; e--) first_E[e] = first_E[e - 1];
        first_E[0] = 0;
    }
};

template <class X> struct Layer {
    const X *w_in, *b_in, *w_out, *b_out;
    long D, E, F, P;
    Plan plan = {};
    X *a_RF = nullptr;
    float *out = nullptr;  // of each block of output columns its own (R, columns)
    long width_F = 0, width_D = 0;

    // a[rows][f .. f + n] of one part.
    void hidden(const X *x, Plan::Part part, long f, long n) const {
        const X *w = w_in + (part.e * P * F + f) * D, *rows[STRIP];
        float z[STRIP * WIDTH], up[STRIP * WIDTH];
        for (long i = 0; i < part.rows; i += STRIP) {
            long count = at_most(part.rows - i, STRIP), row = part.row + i;
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
            for (long i = 0; i < part.rows; i += STRIP) {
                long count = at_most(part.rows - i, STRIP), row = part.row + i;
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

    // Columns of a task: as many as give every thread eight tasks, of at least UNIT bytes, and at most BLOCK bytes of
    // one expert. `sets` of tasks share the columns; one column of a task has `bytes` of weights, `one` of an expert.
    static long columns(long total, long sets, long bytes, long one, long threads) {
        long width = at_least(share(total * sets, threads * 8), share(UNIT, bytes));
        width = at_most(share(width, 16) * 16, at_most(at_least(BLOCK / one / 16 * 16, 16), WIDTH));
        return at_most(width, share(total, 16) * 16);
    }

    void run(const X *x, const float *weights, X *y, long T, long K, int threads) {
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

}  // namespace

template <class P> static void take(P *&own, char *&room, long count) {
    own = (P *)room;
    room += share(count * long(sizeof(P)), 64) * 64;
}

// 0, or 1 where an id is no expert's: y is then not written. `room` holds whatever `expert_native.py` counts for
// `at_once` tokens, and gaps up to multiples of 64 bytes.
template <class X>
static int experts(const X *x, const int64_t *ids, const float *weights, X *y, char *room, Layer<X> layer, long T,
                   long K, long at_once, int threads) {
    long most = at_most(T, at_once) * K, in = layer.P * layer.D * long(sizeof(X)), out = layer.F * long(sizeof(X));
    Plan &plan = layer.plan;
    take(plan.first_E, room, layer.E + 1);
    take(plan.parts, room, most);
    take(plan.token_R, room, most);
    take(plan.slot_TK, room, most);
    take(layer.a_RF, room, most * layer.F);
    take(layer.out, room, most * layer.D);
    for (long i = 0; ids && i < T * K; i++)
        if (ids[i] >= layer.E) return 1;
    for (long t = 0; t < T; t += at_once) {
        long own = at_most(T - t, at_once);
        plan.make(ids ? ids + t * K : nullptr, own, K, layer.E);
        layer.width_F = Layer<X>::columns(layer.F, plan.parts_count, in, in, threads);
        layer.width_D = Layer<X>::columns(layer.D, 1, at_least(plan.experts_count, 1) * out, out, threads);
        layer.run(x + t * layer.D, weights ? weights + t * K : nullptr, y + t * layer.D, own, K, threads);
    }
    return 0;
}

#define EXPERTS(NAME, X)                                                                                              \
    extern "C" int NAME(const void *x, const void *ids, const void *weights, const void *w_in, const void *b_in,      \
                        const void *w_out, const void *b_out, void *y, void *room, long T, long K, long D, long E,    \
                        long F, long P, long at_once, int threads) {                                                  \
        Layer<X> layer = {(const X *)w_in, (const X *)b_in, (const X *)w_out, (const X *)b_out, D, E, F, P};          \
        return experts((const X *)x, (const int64_t *)ids, (const float *)weights, (X *)y, (char *)room, layer, T, K, \
                       at_once, threads);                                                                             \
    }

EXPERTS(experts_bf16, bf16)
EXPERTS(experts_fp32, float)
