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

    // The first two blocks of rows that hidden() reads of a part from column f on.
    void first_rows(Plan::Part part, long f, const bf16 **rows) const {
        rows[0] = w_in + (part.e * P * F + f) * D;
        rows[1] = rows[0] + (P == 2 ? F : GROUP) * D;
    }

    // a[rows][f .. f_end] of one part. Where memory is waited for, the rows that come next are fetched meanwhile.
    void hidden(Plan::Part part, long f_begin, long f_end, const Plan::Part *after) const {
        alignas(64) float z[4 * ANSWER];
        long wide = P == 2 ? GROUP : 2 * GROUP, all = share(part.rows, GROUP);
        for (long g = 0; g < all; g += 2) {
            long groups = at_most(all - g, 2);
            for (long f = f_begin; f < f_end; f += wide) {
                const bf16 *rows[2], *next[2];
                first_rows(part, f, rows);
                bool last = f + wide >= f_end, ahead = g == 0 && !(last && !after);
                if (ahead) last ? first_rows(*after, f_end < F ? f_end : 0, next) : first_rows(part, f + wide, next);
                if (P == 1 && f + GROUP >= f_end) rows[1] = rows[0];
                products(groups, rows[0], rows[1], D, x_packed + (part.group + g) * GROUP * D / 2, z,
                         ahead ? next : nullptr);
                for (long j = 0; j < groups; j++)
                    activate(part, part.group + g + j, f, z + 2 * j * ANSWER, rows[1] != rows[0]);
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

    // Neighbours along K become one word.
    static void join(const float *z, word *out) {
        for (long i = 0; i < GROUP; i += 2) {
            __m512i low = _mm512_cvtepu16_epi32(narrowed(load(z + i * GROUP)));
            __m512i high = _mm512_cvtepu16_epi32(narrowed(load(z + (i + 1) * GROUP)));
            _mm512_store_si512(out + i / 2 * GROUP, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }

    // out[r][0 .. n] = w_out[d .. d + n] a_r of all rows.
    void outputs(float *own, long d, long n) const {
        alignas(64) float z[4 * ANSWER];
        for (long p = 0; p < plan.parts_count; p++) {
            Plan::Part part = plan.parts[p];
            const bf16 *w = w_out + (part.e * D + d) * F, *b = b_out ? b_out + part.e * D + d : nullptr;
            long all = share(part.rows, GROUP);
            for (long g = 0; g < all; g += 2) {
                long groups = at_most(all - g, 2);
                for (long i = 0; i < n; i += 2 * GROUP) {
                    long second = i + GROUP < n ? GROUP : 0;
                    const bf16 *rows = w + i * F, *next[2] = {rows + 2 * GROUP * F, rows + 3 * GROUP * F};
                    if (i + 2 * GROUP >= n && p + 1 < plan.parts_count) {
                        next[0] = w_out + (plan.parts[p + 1].e * D + d) * F;
                        next[1] = next[0] + GROUP * F;
                    }
                    bool ahead = g == 0 && (i + 2 * GROUP < n || p + 1 < plan.parts_count);
                    products(groups, rows, rows + second * F, F, a_packed + (part.group + g) * GROUP * F / 2, z,
                             ahead ? next : nullptr);
                    for (long j = 0; j < groups; j++) {
                        put(part, g + j, z + 2 * j * ANSWER, own + i, n, b ? b + i : nullptr);
                        if (second) put(part, g + j, z + (2 * j + 1) * ANSWER, own + i + GROUP, n, b ? b + i + GROUP : b);
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

    void run(const bf16 *x, const float *weights, bf16 *y, long T, long K, int threads) const {
        long tasks_F = share(F, width_F), tasks_D = share(D, width_D), R = plan.first_E[E];
        long tasks = plan.parts_count * tasks_F;
#pragma omp parallel num_threads(threads) if (R * F * D > SMALL)
        {
            Tiles tiles;
            tiles.rows(GROUP);
#pragma omp for schedule(static)
            for (long p = 0; p < plan.parts_count; p++) pack_part(x, plan.parts[p]);
            // Static: who computes a task has fetched what it begins with.
#pragma omp for schedule(static)
            for (long task = 0; task < tasks; task++) {
                long f = task % tasks_F * width_F;
                const Plan::Part *after = task + 1 < tasks ? plan.parts + (task + 1) / tasks_F : nullptr;
                hidden(plan.parts[task / tasks_F], f, at_most(F, f + width_F), after);
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

#endif
