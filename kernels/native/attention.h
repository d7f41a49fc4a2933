// Attention of some rows (queries) to one tile of keys, softmax and all.
//
// Keys are taken in tiles of TILE at absolute positions, and tiles in parts of PART. In a tile every row does the
// same steps in the same order whatever it sees of it: what it does not see has the weight 0. A part starts afresh,
// and parts are merged in order. So a row's bits depend on its own query and keys and on nothing else.
#pragma once
#include "kvtypes.h"
#include "tiles.h"

constexpr int TILE = 64, PART = 512, ROWS = 128, WIDEST = 256;
constexpr int CHUNKS = TILE / LANES;  // vectors in a tile
constexpr float LOWEST = -1e30f;
constexpr float SLACK = 8;    // a larger score takes the place of `most` only if it is larger by this: values are
                              // rarely rescaled, and no weight is above 2^8

// The state of some rows: the score that has the weight 1 (times log2 e), none being much larger, the sum of weights,
// lane by lane, and the weighted values.
struct State {
    float most[ROWS];
    vec sum[ROWS];
    alignas(64) float values[ROWS * WIDEST];
    void clear(int rows, long padded) {
        for (int i = 0; i < rows; i++) most[i] = LOWEST, sum[i] = zeros();
        memset(values, 0, size_t(rows) * padded * sizeof(float));
    }
};

template <class C> struct Scratch {
    static constexpr int HELD = Words<C>::HELD;
    alignas(64) word keys[WIDEST / HELD * TILE];    // [word of a key][key]
    alignas(64) word values[TILE / HELD * WIDEST];  // [key or pair of keys][number]
    alignas(64) float scores[ROWS * TILE];
    alignas(64) word weights[ROWS * TILE / HELD];
    alignas(64) float key_scale[TILE], value_scale[TILE];
    alignas(64) C room[TILE * WIDEST];
    alignas(64) C query[ROWS * WIDEST];
    const C *row[ROWS];
    const word *value_row[TILE / HELD];  // in `values`, or where the cache has them in words of C
    float decay[ROWS];
    State part, total;
    bool tiled = false;  // rows go through tiles: all of `query` is then filled
#if COTERIE_TILES
    Tiles tiles;
#endif
};

// One head of one layer's keys or values.
template <class K> struct Store {
    K *numbers;
    float *scales;  // null where K needs none
    long stride;    // from a slot's numbers to the next slot's
    long heads;
};

// Readies the keys and values of slots lo to hi of a tile: keys across, values in pairs where C is bf16; the other
// slots are not read, and become zeros.
template <class K, class C>
static void fill(Scratch<C> &s, const Store<K> &k, const Store<K> &v, const long *slot, int head, int lo, int hi,
                 long d, long padded) {
    constexpr int HELD = Words<C>::HELD;
    const C *row[TILE];
    for (int i = 0; i < TILE; i++) {
        bool used = lo <= i && i < hi;
        row[i] = used ? taken<K, C>(k.numbers + slot[i] * k.stride + head * d, s.room + i * d, d) : nullptr;
        if (LARGEST<K> != 0) {
            s.key_scale[i] = used ? k.scales[slot[i] * k.heads + head] : 0;
            s.value_scale[i] = used ? v.scales[slot[i] * v.heads + head] : 0;
        }
    }
    long words = d / HELD;
    for (int j = 0; j < TILE; j += 16) {
        if (j + 16 <= lo || j >= hi) {
            for (long i = 0; i < words; i++) memset(s.keys + i * TILE + j, 0, 16 * sizeof(word));
            continue;
        }
        for (long i = 0; i < words; i += 16)
            transpose((const word *const *)row + j, words - i < 16 ? words - i : 16, s.keys + i * TILE + j, TILE, i);
    }
    for (int i = lo; i < hi; i++) row[i] = taken<K, C>(v.numbers + slot[i] * v.stride + head * d, s.room + i * d, d);
    for (int j = 0; j < TILE / HELD; j++) {
        word *out = s.values + j * padded;
        s.value_row[j] = out;
        if ((j + 1) * HELD <= lo || j * HELD >= hi) {
            memset(out, 0, size_t(padded) * sizeof(word));
            continue;
        }
        if constexpr (HELD == 2)
            for (long i = 0; i < d; i += 32)
                interleave(row[2 * j] ? row[2 * j] + i : nullptr, row[2 * j + 1] ? row[2 * j + 1] + i : nullptr,
                           d - i, out + i);
        else if (row[j] && d == padded)
            s.value_row[j] = (const word *)row[j];
        else
            for (long i = 0; i < padded; i += LANES)
                store((float *)out + i, row[j] ? load_part((const float *)row[j] + i, d - i) : zeros());
    }
}

// Whether all values of a tile, and their scales, are finite.
template <bool SCALED, class C> static bool finite(const Scratch<C> &s, long padded) {
    vec broken[4] = {zeros(), zeros(), zeros(), zeros()};
    for (int j = 0; j < TILE / Words<C>::HELD; j++)
        for (long i = 0; i < padded; i += LANES) {
            vec &own = broken[i / LANES % 4];
            own = Words<C>::add(load_words(s.value_row[j] + i), zeros(), own);
        }
    if (SCALED)
        for (int i = 0; i < TILE; i += LANES) broken[0] = fma(load(s.value_scale + i), zeros(), broken[0]);
    return sum(add(add(broken[0], broken[1]), add(broken[2], broken[3]))) == 0;
}

// scores = q k^T of M rows.
template <int M, class C> static inline void score(Scratch<C> &s, int row, long d) {
    constexpr int N = LANES == 16 ? 4 : 2;
    for (int c = 0; c < CHUNKS; c += N) {
        vec acc[M * N];
        for (int i = 0; i < M * N; i++) acc[i] = zeros();
        const word *keys = s.keys + c * LANES;
        const word *q[M];
        for (int m = 0; m < M; m++) q[m] = (const word *)s.row[row + m];
        for (long i = 0; i < d / Words<C>::HELD; i++, keys += TILE) {
            vec k[N];
            for (int n = 0; n < N; n++) k[n] = load_words(keys + n * LANES);
            for (int m = 0; m < M; m++) {
                vec own = all_words(q[m] + i);
                for (int n = 0; n < N; n++) acc[m * N + n] = Words<C>::add(k[n], own, acc[m * N + n]);
            }
        }
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) store(s.scores + (row + m) * TILE + (c + n) * LANES, acc[m * N + n]);
    }
}

// values = decay * values + weights v of M rows, N vectors of numbers from `at` on.
template <int M, int N, class C> static inline void weigh(Scratch<C> &s, int row, long at, long padded) {
    vec acc[M * N];
    constexpr int STEPS = TILE / Words<C>::HELD;
    float *out = s.part.values + row * padded + at;
    const word *weights = s.weights + row * STEPS;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[m * N + n] = mul(load(out + m * padded + n * LANES), all(s.decay[row + m]));
    for (int j = 0; j < STEPS; j++) {
        const word *values = s.value_row[j] + at;
        vec v[N];
        for (int n = 0; n < N; n++) v[n] = load_words(values + n * LANES);
        for (int m = 0; m < M; m++) {
            vec own = all_words(weights + m * STEPS + j);
            for (int n = 0; n < N; n++) acc[m * N + n] = Words<C>::add(v[n], own, acc[m * N + n]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(out + m * padded + n * LANES, acc[m * N + n]);
}

// From scores to weights of one row, which sees slots lo to hi of the tile.
template <bool SCALED, class C> static inline void soften(Scratch<C> &s, int row, float factor, int lo, int hi) {
    vec x[CHUNKS];
    for (int c = 0; c < CHUNKS; c++) {
        x[c] = mul(load(s.scores + row * TILE + c * LANES), all(factor));
        if (SCALED) x[c] = mul(x[c], load(s.key_scale + c * LANES));
        if (lo > 0 || hi < TILE) x[c] = only(x[c], c * LANES, lo, hi);
    }
    vec high = x[0];
    for (int c = 1; c < CHUNKS; c++) high = larger(high, x[c]);
    float most = s.part.most[row], decay = 1;
    vec total = s.part.sum[row];
    if (any_above(high, most + SLACK)) {
        float found = largest(high);
        decay = exp2(most - found);
        total = mul(total, all(decay));
        s.part.most[row] = most = found;
    }
    s.decay[row] = decay;
    C *out = (C *)(s.weights + row * (TILE / Words<C>::HELD));
    for (int c = 0; c < CHUNKS; c++) {
        x[c] = exp2(sub(x[c], all(most)));
        total = add(total, x[c]);
        if (SCALED) x[c] = mul(x[c], load(s.value_scale + c * LANES));
    }
    for (int c = 0; c < CHUNKS; c += 2) store_pair(out + c * LANES, x[c], x[c + 1]);
    s.part.sum[row] = total;
}

template <int M, class C> static inline void weigh_all(Scratch<C> &s, int row, long padded) {
    constexpr int N = LANES == 16 ? 4 : 2;
    long at = 0;
    for (; at + N * LANES <= padded; at += N * LANES) weigh<M, N>(s, row, at, padded);
    for (; at < padded; at += LANES) weigh<M, 1>(s, row, at, padded);
}

#if COTERIE_TILES

// The same through tiles, for n <= 16 rows: keys and values lie as right operands need them. Four answers, or two, of
// 16 columns each: out = left right, `steps` tiles of the left operand lying side by side.
template <int N>
static inline void answers(const void *left, long left_bytes, const word *right, long stride, long steps) {
    for (long k = 0; k < steps; k++, right += 16 * stride) {
        _tile_loadd(4, (const char *)left + k * 64, left_bytes);
        _tile_loadd(6, right, stride * 4);
        _tile_loadd(7, right + 16, stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (N == 2) continue;
        _tile_loadd(6, right + 32, stride * 4);
        _tile_loadd(7, right + 48, stride * 4);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
    }
}

template <int N> static inline void store_answers(float *out, long stride) {
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + 16, stride * 4);
    if (N == 2) return;
    _tile_stored(2, out + 32, stride * 4);
    _tile_stored(3, out + 48, stride * 4);
}

static inline void score_tiles(Scratch<bf16> &s, int row, int n, long d) {
    asm volatile("" ::: "memory");
    s.tiles.rows(n);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    answers<4>(s.query + row * d, d * 2, s.keys, TILE, d / STEP);
    store_answers<4>(s.scores + row * TILE, TILE);
}

template <int N> static inline void weigh_tiles(Scratch<bf16> &s, int row, long at, long padded) {
    float *out = s.part.values + row * padded + at;
    _tile_loadd(0, out, padded * 4);
    _tile_loadd(1, out + 16, padded * 4);
    if (N == 4) {
        _tile_loadd(2, out + 32, padded * 4);
        _tile_loadd(3, out + 48, padded * 4);
    }
    answers<N>(s.weights + row * (TILE / 2), TILE * 2, s.values + at, padded, TILE / STEP);
    store_answers<N>(out, padded);
}

static inline void weigh_tiles(Scratch<bf16> &s, int row, int n, long padded) {
    for (int m = row; m < row + n; m++) {
        if (s.decay[m] == 1) continue;
        float *out = s.part.values + m * padded;
        for (long i = 0; i < padded; i += LANES) store(out + i, mul(load(out + i), all(s.decay[m])));
    }
    asm volatile("" ::: "memory");
    s.tiles.rows(n);
    long at = 0;
    for (; at + 64 <= padded; at += 64) weigh_tiles<4>(s, row, at, padded);
    if (at < padded) weigh_tiles<2>(s, row, at, padded);
}

#endif

// Rows from to to: the same arithmetic for each, in tiles of rows.
template <class C> static void score_rows(Scratch<C> &s, int from, int to, long d) {
#if COTERIE_TILES
    if constexpr (sizeof(C) == 2)
        if (s.tiled) {
            for (; from < to; from += 16) score_tiles(s, from, to - from < 16 ? to - from : 16, d);
            return;
        }
#endif
    for (; from + 6 <= to; from += 6) score<6>(s, from, d);
    for (; from + 2 <= to; from += 2) score<2>(s, from, d);
    if (from < to) score<1>(s, from, d);
}

template <class C> static void weigh_rows(Scratch<C> &s, int from, int to, long padded) {
#if COTERIE_TILES
    if constexpr (sizeof(C) == 2)
        if (s.tiled) {
            for (; from < to; from += 16) weigh_tiles(s, from, to - from < 16 ? to - from : 16, padded);
            return;
        }
#endif
    for (; from + 6 <= to; from += 6) weigh_all<6>(s, from, padded);
    for (; from + 2 <= to; from += 2) weigh_all<2>(s, from, padded);
    if (from < to) weigh_all<1>(s, from, padded);
}

// total = total and part together, of one row.
static inline void merge(float &most, float &sum, float *values, float part_most, float part_sum,
                         const float *part_values, long padded) {
    float high = part_most > most ? part_most : most;
    vec a = exp2(all(most - high)), b = exp2(all(part_most - high));
    sum = first_lane(fma(all(part_sum), b, mul(all(sum), a)));
    for (long i = 0; i < padded; i += LANES)
        store(values + i, fma(load(part_values + i), b, mul(load(values + i), a)));
    most = high;
}
