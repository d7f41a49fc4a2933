// The experts of a MoE layer through tiles (tiles.h), with the tasks of experts.h.
//
// The rows of each expert are packed into groups first. What the first product answers, (16 hidden columns, 16 rows),
// becomes words of the second one's operand as it stands: hidden rows are never written one by one.
#pragma once
#include "experts.h"
#include "tiles.h"

#if COTERIE_TILES

struct TiledLayer : Layer<bf16> {
    word *x_packed = nullptr;  // of each group its own (D / 2, 16)
    word *a_packed = nullptr;  // of each group its own (F / 2, 16)

    static bool takes(long D, long F) { return has_tiles() && D > 0 && F > 0 && D % STEP == 0 && F % STEP == 0; }

    void find_room(char *&room, long most) {
        long groups = most / GROUP + at_most(most, E + most / ROWS);
        take(x_packed, room, groups * GROUP * D / 2);
        take(a_packed, room, groups * GROUP * F / 2);
        take(out, room, most * D);
    }

    void pack_part(const bf16 *x, Plan::Part part) const {
        const bf16 *rows[GROUP];
        for (long i = 0; i < part.rows; i += GROUP) {
            for (long m = 0; m < GROUP; m++)
                rows[m] = i + m < part.rows ? x + plan.token_R[part.row + i + m] * D : nullptr;
            pack(rows, D, x_packed + (part.group + i / GROUP) * GROUP * D / 2);
        }
    }

    // What hidden() reads first of a task, for `products` that come before it.
    Ahead before_hidden(long task, long products) const {
        long tasks_F = share(F, width_F);
        if (task >= plan.parts_count * tasks_F) return {};
        const bf16 *w = w_in + (plan.parts[task / tasks_F].e * P * F + task % tasks_F * width_F) * D;
        return {w, w + (P == 2 ? F : GROUP) * D, D, products};
    }

    // Some columns of a of one part: all its groups pass over two blocks of weights before the next two are read.
    void hidden(long task, long next) const {
        alignas(64) float z[4 * ANSWER];
        long tasks_F = share(F, width_F), wide = P == 2 ? GROUP : 2 * GROUP;
        long begin = task % tasks_F * width_F, end = at_most(F, begin + width_F);
        const Plan::Part &part = plan.parts[task / tasks_F];
        long all = share(part.rows, GROUP), passes = share(all, 2);
        const bf16 *w = w_in + (part.e * P * F + begin) * D;
        for (long f = begin; f < end; f += wide, w += wide * D) {
            const bf16 *other = P == 2 ? w + F * D : f + GROUP < end ? w + GROUP * D : w;
            Ahead ahead(w + wide * D, w + wide * D + (P == 2 ? F : GROUP) * D, D, passes);
            if (f + wide >= end) ahead = before_hidden(next, passes);
            for (long g = 0; g < all; g += 2) {
                long groups = at_most(all - g, 2);
                products(groups, all, w, other, D, x_packed + (part.group + g) * GROUP * D / 2, z, ahead);
                for (long j = 0; j < groups; j++)
                    activate(part, part.group + g + j, f, z + 2 * j * ANSWER, other != w);
            }
        }
    }

    // Two answers of one group into words of a.
    void activate(Plan::Part part, long group, long f, float *z, bool both) const {
        const bf16 *bias = b_in ? b_in + part.e * P * F + f : nullptr;
        word *to = a_packed + (group * F / 2 + f / 2) * GROUP;
        if (bias) add_to_rows(z, bias);
        if (bias && both) add_to_rows(z + ANSWER, bias + (P == 2 ? F : GROUP));
        if (P == 2) {
            swiglu(z, z + ANSWER, ANSWER);
            return join(z, to);
        }
        gelu(z, both ? 2 * ANSWER : ANSWER);
        join(z, to);
        if (both) join(z + ANSWER, to + GROUP / 2 * GROUP);
    }

    static void add_to_rows(float *z, const bf16 *bias) {
        for (long i = 0; i < GROUP; i++) store(z + i * GROUP, add(load(z + i * GROUP), all(widen(bias[i]))));
    }

    // Neighbours along K become one word. Subnormal numbers become zeros, as which tiles would take them.
    static void join(const float *z, word *out) {
        alignas(64) static constexpr uint16_t by_turns[32] = {
            0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31,
        };
        __m512i order = _mm512_load_si512(by_turns);
        for (long i = 0; i < GROUP; i += 2) {
            __m512bh both = _mm512_cvtne2ps_pbh(load(z + (i + 1) * GROUP).v, load(z + i * GROUP).v);
            _mm512_store_si512(out + i / 2 * GROUP, _mm512_permutexvar_epi16(order, (__m512i)both));
        }
    }

    // What outputs() reads first of a part's columns from d on.
    Ahead before_outputs(long p, long d, long products) const {
        if (p >= plan.parts_count || d >= D) return {};
        const bf16 *w = w_out + (plan.parts[p].e * D + d) * F;
        return {w, w + GROUP * F, F, products};
    }

    // out[r][0 .. n] = w_out[d .. d + n] a_r of all rows. The columns from `next` on are this thread's next ones.
    void outputs(float *own, long d, long n, long next) const {
        alignas(64) float z[4 * ANSWER];
        for (long p = 0; p < plan.parts_count; p++) {
            Plan::Part part = plan.parts[p];
            const bf16 *w = w_out + (part.e * D + d) * F, *b = b_out ? b_out + part.e * D + d : nullptr;
            long all = share(part.rows, GROUP), passes = share(all, 2);
            for (long i = 0; i < n; i += 2 * GROUP, w += 2 * GROUP * F) {
                long second = i + GROUP < n ? GROUP : 0;
                Ahead ahead(w + 2 * GROUP * F, w + 3 * GROUP * F, F, passes);
                bool last = i + 2 * GROUP >= n, more = p + 1 < plan.parts_count;
                if (last) ahead = more ? before_outputs(p + 1, d, passes) : before_outputs(0, next, passes);
                for (long g = 0; g < all; g += 2) {
                    long groups = at_most(all - g, 2);
                    products(groups, all, w, w + second * F, F, a_packed + (part.group + g) * GROUP * F / 2, z,
                             ahead);
                    for (long j = 0; j < 2 * groups; j++) {
                        long at = i + j % 2 * GROUP;
                        if (at < n) put(part, g + j / 2, z + j * ANSWER, own + at, n, b ? b + at : nullptr);
                    }
                }
            }
        }
    }

    // One answer into the rows of out.
    static void put(Plan::Part part, long g, float *answer, float *own, long n, const bf16 *bias) {
        if (bias) add_to_rows(answer, bias);
        turn(answer, at_most(part.rows - g * GROUP, GROUP), own + (part.row + g * GROUP) * n, n);
    }

    // Every task reads all hidden rows: half as many bytes of them as of weights at most.
    void cut(int threads) {
        Layer<bf16>::cut(threads);
        long wide = at_most(2 * share(plan.first_E[E], at_least(plan.experts_count, 1)), WIDTH);
        long tasks = share(share(D, at_least(width_D, wide)), threads) * threads;
        width_D = at_least(width_D, share(share(D, tasks), GROUP) * GROUP);
    }

    static long claim(long &next) { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }

    // Each thread knows its next task while it computes one, and fetches what that begins with.
    void run(const bf16 *x, const float *weights, bf16 *y, long T, long K, int threads) const {
        long tasks_F = plan.parts_count * share(F, width_F), tasks_D = share(D, width_D), R = plan.first_E[E];
        long next_F = 0, next_D = 0;
#pragma omp parallel num_threads(threads) if (R * F * D > SMALL)
        {
            Tiles tiles;
            tiles.rows(GROUP);
            long task = claim(next_F);
            before_hidden(task, 1).fetch(D / 2);
#pragma omp for schedule(dynamic)
            for (long p = 0; p < plan.parts_count; p++) pack_part(x, plan.parts[p]);
            for (long next; task < tasks_F; task = next) hidden(task, next = claim(next_F));
            task = claim(next_D);
            before_outputs(0, task * width_D, 1).fetch(F / 2);
#pragma omp barrier
            for (long next; task < tasks_D; task = next) {
                long d = task * width_D, n = at_most(D - d, width_D);
                float *own = out + R * d;
                outputs(own, d, n, (next = claim(next_D)) * width_D);
                combine(own, weights, y, T, K, d, n);
            }
        }
    }
};

#endif
