// Which rows an expert layer computes, and how its work is cut into tasks.
//
// Shapes: T tokens, E experts, K choices, R routed rows.
#pragma once
#include "simd.h"

constexpr long ROWS = 512;         // of one expert in a task
constexpr long WIDTH = 256;        // columns of a task at most
constexpr long BLOCK = 256 << 10;  // bytes of weights that stay in a core's second cache
constexpr long UNIT = 64 << 10;    // bytes of weights that are worth a task
constexpr long SMALL = 1 << 16;    // multiplications that one thread does sooner than a second one wakes up

static inline long at_least(long a, long b) { return a > b ? a : b; }
static inline long at_most(long a, long b) { return a < b ? a : b; }

// Which rows there are. Row r belongs to token_R[r]; an expert's rows lie together, in the order of the tokens.
struct Plan {
    struct Part {
        long e, row, rows, group;  // group: its first one, of 16 rows each
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
        long group = parts_count = experts_count = 0;
        for (long e = 0; e < E; e++) {
            long rows = first_E[e + 1];
            first_E[e + 1] += first_E[e];
            experts_count += rows > 0;
            for (long row = 0; row < rows; row += ROWS) {
                Part part = {e, first_E[e] + row, at_most(rows - row, ROWS), group};
                parts[parts_count++] = part;
                group += share(part.rows, 16);
            }
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

// Columns of a task: as many as give every thread eight tasks, of at least UNIT bytes, and at most BLOCK bytes of
// one expert. `sets` of tasks share the columns; one column of a task has `bytes` of weights, `one` of an expert.
static inline long columns(long total, long sets, long bytes, long one, long threads) {
    long width = at_least(share(total * sets, threads * 8), share(UNIT, bytes));
    width = at_most(share(width, 16) * 16, at_most(at_least(BLOCK / one / 16 * 16, 16), WIDTH));
    return at_most(width, share(total, 16) * 16);
}
