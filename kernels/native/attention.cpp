// Stores the new keys and values of a ragged step and attends, in one call for a layer.
//
// Work is cut into units: some queries of one sequence, by some heads, over some parts of the keys. How it is cut
// depends on the number of threads and on what else there is to do, and no result depends on how it is cut.
#include <algorithm>
#include <vector>

#include "attention.h"

struct Call {
    const void *q, *k_new, *v_new;
    void *out, *k, *v, *k_scale, *v_scale;
    const int32_t *tables, *starts, *lengths;
    const int64_t *slots;
    const float *sinks;          // null: none
    int64_t k_stride, v_stride;  // numbers from a new token to the next
    int64_t tokens, sequences, columns, blocks, size, heads, groups, d, window, threads, stores;
};

struct Unit {
    int sequence, token, tokens, group, groups;
    int64_t from, to;  // parts
    int64_t partial;   // where its state goes, in rows; -1: it is all there is, and gives the answer
};

// One layer's step: queries in X, the cache in K, products in C.
template <class X, class K, class C> struct Layer {
    const Call &a;
    float factor;
    Store<K> k, v;
    long padded;
    int repeat;
    std::vector<Unit> units;
    std::vector<float> partials;  // of each row: values, then the largest score, then the sum
    bool stored = false;  // before any unit ran
    bool bad = false;

    Layer(const Call &call, double scale) : a(call), factor(float(scale * 1.4426950408889634)) {
        k = {(K *)a.k, (float *)a.k_scale, a.groups * a.d, a.groups};
        v = {(K *)a.v, (float *)a.v_scale, a.groups * a.d, a.groups};
        padded = (a.d + 31) & ~31L;
        repeat = int(a.heads / a.groups);
    }

    int fresh(int n) const { return a.starts[n + 1] - a.starts[n]; }
    int64_t parts_of(int64_t end) const { return (end + PART - 1) / PART; }
    int64_t first_key(int64_t position) const { return a.window && position >= a.window ? position - a.window + 1 : 0; }

    // Units of `groups` heads and, where `split`, one part each; a prefill's last queries, which see most, come first.
    void cut(int groups, bool split) {
        int64_t rows = 0;
        units.clear();
        for (int n = 0; n < a.sequences; n++) {
            int tall = std::min(fresh(n), ROWS / repeat);
            for (int end = fresh(n); end > 0; end -= tall) {
                int begin = std::max(0, end - tall), wide = std::max(1, std::min(groups, ROWS / (tall * repeat)));
                int64_t position = a.lengths[n] - fresh(n) + begin;
                int64_t from = first_key(position) / PART, to = parts_of(position + end - begin);
                for (int g = 0; g < a.groups; g += wide) {
                    int own = std::min<int>(wide, a.groups - g);
                    bool alone = !split || to - from == 1;
                    for (int64_t p = from; p < to; p = alone ? to : p + 1) {
                        Unit unit = {n, begin, end - begin, g, own, p, alone ? to : p + 1, -1};
                        if (!alone) {
                            unit.partial = rows;
                            rows += int64_t(own) * (end - begin) * repeat;
                        }
                        units.push_back(unit);
                    }
                }
            }
        }
        partials.resize(size_t(rows) * (padded + 2));
    }

    void plan() {
        int64_t wanted = 4 * a.threads;
        cut(int(a.groups), false);
        if (int64_t(units.size()) < wanted) cut(1, false);
        if (int64_t(units.size()) < wanted && a.threads > 1 && int64_t(units.size()) % a.threads) cut(1, true);
    }

    void put(int64_t t, int group) {
        int64_t slot = a.slots[t], at = (slot * a.groups + group) * a.d;
        if (slot < 0 || slot >= a.blocks * a.size) {
            bad = true;
            return;
        }
        float sk = keep((const X *)a.k_new + t * a.k_stride + group * a.d, k.numbers + at, a.d);
        float sv = keep((const X *)a.v_new + t * a.v_stride + group * a.d, v.numbers + at, a.d);
        if (LARGEST<K> != 0) k.scales[slot * a.groups + group] = sk, v.scales[slot * a.groups + group] = sv;
    }

    // The slots of a tile's keys up to `end`, and whether the table names blocks that there are.
    bool find(int n, int64_t start, int64_t end, long *slot) const {
        const int32_t *table = a.tables + n * a.columns;
        int64_t column = start / a.size, offset = start % a.size;
        for (int64_t p = start; p < end; column++, offset = 0) {
            int64_t block = column < a.columns ? table[column] : -1;
            if (block < 0 || block >= a.blocks) return false;
            for (; offset < a.size && p < end; offset++, p++) slot[p - start] = block * a.size + offset;
        }
        return true;
    }

    // Asks for one head's keys and values of a tile while the tile before it is worked on.
    void fetch(int group, const long *slot, int64_t count) const {
        long bytes = a.d * long(sizeof(K));
        for (int64_t i = 0; i < count; i++) {
            long at = slot[i] * k.stride + group * a.d;
            for (long b = 0; b < bytes; b += 64) {
                __builtin_prefetch((const char *)(k.numbers + at) + b);
                __builtin_prefetch((const char *)(v.numbers + at) + b);
            }
        }
    }

    void ready_rows(Scratch<C> &s, const Unit &u) const {
        for (int g = 0, i = 0; g < u.groups; g++)
            for (int t = 0; t < u.tokens; t++)
                for (int r = 0; r < repeat; r++, i++) {
                    int64_t token = a.starts[u.sequence] + u.token + t, head = (u.group + g) * repeat + r;
                    s.row[i] = taken<X, C>((const X *)a.q + (token * a.heads + head) * a.d, s.query + i * a.d, a.d);
                    if (s.tiled && s.row[i] != s.query + i * a.d)
                        memcpy(s.query + i * a.d, s.row[i], size_t(a.d) * sizeof(C));
                }
    }

    // One head's rows, from row `base` on, to one tile.
    void tile(Scratch<C> &s, const Unit &u, int g, int64_t start, const long *slot) const {
        int64_t first = a.lengths[u.sequence] - fresh(u.sequence) + u.token;  // position of the first query
        int base = g * u.tokens * repeat;
        int64_t t0 = std::max<int64_t>(0, start - first), t1 = u.tokens;
        while (t1 > t0 && first_key(first + t1 - 1) >= start + TILE) t1--;
        if (t0 >= t1) return;
        auto lo = [&](int64_t t) { return int(std::max<int64_t>(0, first_key(first + t) - start)); };
        auto hi = [&](int64_t t) { return int(std::min<int64_t>(TILE, first + t + 1 - start)); };
        bool even = lo(t0) == lo(t1 - 1) && hi(t0) == hi(t1 - 1);
        fill<K, C>(s, k, v, slot, u.group + g, lo(t0), hi(t1 - 1), a.d, padded);
        int from = base + int(t0) * repeat, to = base + int(t1) * repeat;
        score_rows(s, from, to, a.d);
        if (even || finite<LARGEST<K> != 0>(s, padded)) {
            for (int i = from; i < to; i++) soft(s, i, lo((i - base) / repeat), hi((i - base) / repeat));
            weigh_rows(s, from, to, padded);
            return;
        }
        // A weight of 0 does not keep a NaN out: each row gets the values that it sees.
        for (int i = from; i < to; i++) {
            int64_t t = (i - base) / repeat;
            fill<K, C>(s, k, v, slot, u.group + g, lo(t), hi(t), a.d, padded);
            soft(s, i, lo(t), hi(t));
            weigh_rows(s, i, i + 1, padded);
        }
    }

    void soft(Scratch<C> &s, int row, int lo, int hi) const { soften<LARGEST<K> != 0>(s, row, factor, lo, hi); }

    void run(Scratch<C> &s, const Unit &u) {
        int rows = u.groups * u.tokens * repeat;
        int64_t end = a.lengths[u.sequence] - fresh(u.sequence) + u.token + u.tokens;
        int64_t begin = first_key(end - u.tokens);
        if (a.stores && !stored && u.to == parts_of(end))
            for (int g = 0; g < u.groups; g++) put(a.starts[u.sequence], u.group + g);
        ready_rows(s, u);
        s.total.clear(rows, padded);
        long slot[TILE], ahead[TILE];
        float total[ROWS] = {};
        bool first = true;  // nobody has asked for the first tile yet
        for (int64_t part = u.from; part < u.to; part++) {
            s.part.clear(rows, padded);
            int64_t start = std::max(part * PART, begin / TILE * TILE), stop = std::min((part + 1) * PART, end);
            for (; start < stop; start += TILE) {
                int64_t next = std::min(start + TILE, stop), last = std::min(next + TILE, stop);
                if (!find(u.sequence, start, next, slot) || !find(u.sequence, next, last, ahead)) {
                    bad = true;
                    return;
                }
                if (first)
                    for (int g = 0; g < u.groups; g++) fetch(u.group + g, slot, next - start);
                first = false;
                for (int g = 0; g < u.groups; g++) {
                    fetch(u.group + g, ahead, last - next);
                    tile(s, u, g, start, slot);
                }
            }
            for (int i = 0; i < rows; i++) {
                float sum_part = sum(s.part.sum[i]), *own = s.part.values + i * padded;
                if (u.partial < 0) {
                    merge(s.total.most[i], total[i], s.total.values + i * padded, s.part.most[i], sum_part, own, padded);
                } else {
                    float *out = partials.data() + (u.partial + i) * (padded + 2);
                    memcpy(out, own, size_t(padded) * 4);
                    out[padded] = s.part.most[i], out[padded + 1] = sum_part;
                }
            }
        }
        if (u.partial < 0)
            for (int i = 0; i < rows; i++) finish(u, i, s.total.most[i], total[i], s.total.values + i * padded);
    }

    // The answer of one row: the sink's share, and the division.
    void finish(const Unit &u, int row, float most, float total, const float *values) const {
        int per = u.tokens * repeat, t = row % per / repeat;
        int64_t token = a.starts[u.sequence] + u.token + t, head = (u.group + row / per) * repeat + row % repeat;
        float decay = 1;
        if (a.sinks) {
            float sink = a.sinks[head] * 1.44269504f, high = sink > most ? sink : most;
            decay = exp2(most - high);
            total = total * decay + exp2(sink - high);
        }
        X *out = (X *)a.out + (token * a.heads + head) * a.d;
        vec part = all(decay / total);
        for (long i = 0; i < a.d; i += LANES)  // + 0: tiles of keys that a row does not see may turn -0 into 0
            store_part(out + i, fma(load(values + i), part, zeros()), a.d - i);
    }

    // Merges the parts of split rows, in order. Units of the same rows lie one behind the other.
    void join() {
        std::vector<float> values(padded);
        for (size_t i = 0, next; i < units.size(); i = next) {
            next = i + 1;
            const Unit &u = units[i];
            if (u.partial < 0) continue;
            while (next < units.size() && units[next].partial >= 0 && units[next].sequence == u.sequence &&
                   units[next].token == u.token && units[next].group == u.group)
                next++;
            for (int row = 0; row < u.groups * u.tokens * repeat; row++) {
                float most = LOWEST, total = 0;
                std::fill(values.begin(), values.end(), 0.0f);
                for (size_t j = i; j < next; j++) {
                    const float *p = partials.data() + (units[j].partial + row) * (padded + 2);
                    merge(most, total, values.data(), p[padded], p[padded + 1], p, padded);
                }
                finish(u, row, most, total, values.data());
            }
        }
    }

    void all_of_it() {
        plan();
        int64_t keys = 0;
        for (int n = 0; n < a.sequences; n++) {
            keys += int64_t(a.lengths[n]) * fresh(n);
            // A decode's token is read by its own unit alone, which stores it: no thread waits for another.
            if (a.stores && fresh(n) > 1) stored = true;
        }
        int threads = keys * a.heads < 512 ? 1 : int(a.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            if (stored) {
#pragma omp for schedule(static)
                for (int64_t t = 0; t < a.tokens; t++)
                    for (int g = 0; g < a.groups; g++) put(t, g);
            }
            Scratch<C> s;
            s.tiled = sizeof(C) == 2 && has_tiles() && a.d % 32 == 0;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < int64_t(units.size()); i++) run(s, units[i]);
        }
        if (!partials.empty()) join();
    }
};

// 0, or 1 where a table or a slot is outside the cache.
template <class X, class K, class C> static int attend(const Call &a, double scale) {
    Layer<X, K, C> layer(a, scale);
    layer.all_of_it();
    return layer.bad;
}

#define ATTEND(NAME, X, K, C)                                                                                         \
    extern "C" int attend_##NAME(const void *q, const void *k_new, const void *v_new, void *out, void *k, void *v,    \
                                 void *k_scale, void *v_scale, const void *tables, const void *starts,                \
                                 const void *lengths, const void *slots, const void *sinks, long k_stride,            \
                                 long v_stride, long tokens, long sequences, long columns, long blocks, long size,    \
                                 long heads, long groups, long d, long window, long threads, long stores,             \
                                 double scale) {                                                                      \
        Call call = {q, k_new, v_new, out, k, v, k_scale, v_scale, (const int32_t *)tables, (const int32_t *)starts,  \
                     (const int32_t *)lengths, (const int64_t *)slots, (const float *)sinks, k_stride, v_stride,      \
                     tokens, sequences, columns, blocks, size, heads, groups, d, window, threads, stores};            \
        return attend<X, K, C>(call, scale);                                                                          \
    }

ATTEND(bf16_bf16, bf16, bf16, bf16)
ATTEND(bf16_int8, bf16, int8_t, bf16)
ATTEND(bf16_fp8, bf16, fp8, bf16)
ATTEND(bf16_fp16, bf16, fp16, float)
ATTEND(bf16_fp32, bf16, float, float)
ATTEND(fp32_bf16, float, bf16, float)
ATTEND(fp32_int8, float, int8_t, float)
ATTEND(fp32_fp8, float, fp8, float)
ATTEND(fp32_fp16, float, fp16, float)
ATTEND(fp32_fp32, float, float, float)
