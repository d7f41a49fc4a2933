// What attention asks of vectors beyond simd.h: 2^x, the largest lane, products of pairs, and two rearrangements.
//
// A word is 32 bits: one fp32 number, or two bf16 numbers whose products are summed together. Vectors of words are
// carried as vectors of fp32.
#pragma once
#include "simd.h"

typedef uint32_t word;
typedef word words __attribute__((vector_size(sizeof(vec))));

static inline words bits_of(vec a) { return (words)a.v; }
static inline vec as_vec(words a) {
    vec out;
    out.v = (decltype(out.v))a;
    return out;
}
static inline vec load_words(const word *p) { return load((const float *)p); }
static inline vec all_words(const word *p) { return all(*(const float *)p); }

static inline float first_lane(vec a) {
    float out[LANES];
    store(out, a);
    return out[0];
}

// 2^x for x up to 127, to 1 ulp or so, but only nearly 0 between -127 and -126; exactly 1 for 0, exactly 0 for -127
// and under. NaN stays NaN.
static inline vec exp2(vec x) {
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which its low bits hold
    x = larger(all(-127.0f), x);
    vec whole = add(x, magic);
    vec f = sub(x, sub(whole, magic));
    vec p = all(1.535336188319500e-4f);
    p = fma(p, f, all(1.339887440266574e-3f));
    p = fma(p, f, all(9.618437357674640e-3f));
    p = fma(p, f, all(5.550332471162809e-2f));
    p = fma(p, f, all(2.402264791363012e-1f));
    p = fma(p, f, all(6.931472028550421e-1f));
    p = fma(p, f, all(1.0f));
    return as_vec(bits_of(p) + (bits_of(whole) << 23));  // 1 times 2^-127 has no bits left
}

static inline float exp2(float x) { return first_lane(exp2(all(x))); }

// Where lanes lo <= start + i < hi keep a; the others get -inf.
static inline vec only(vec a, int start, int lo, int hi) {
    word at[LANES];
    for (int i = 0; i < LANES; i++) at[i] = word(start + i - lo);  // wraps, so that one comparison does for both ends
    words index;
    memcpy(&index, at, sizeof index);
    words keep = (words)(index < word(hi - lo));
    return as_vec((bits_of(a) & keep) | (0xff800000u & ~keep));
}

static inline float largest(vec a) {
#if COTERIE_AVX512
    return _mm512_reduce_max_ps(a.v);
#else
    float lanes[LANES], most;
    store(lanes, a);
    most = lanes[0];
    for (int i = 1; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
#endif
}

// Whether a lane is larger than `bound`.
static inline bool any_above(vec a, float bound) {
#if COTERIE_AVX512
    return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#else
    return largest(a) > bound;
#endif
}

// Two vectors in a row. What is subnormal may become 0.
static inline void store_pair(float *p, vec a, vec b) {
    store(p, a);
    store(p + LANES, b);
}
static inline void store_pair(bf16 *p, vec a, vec b) {
#if COTERIE_AVX512 && defined(__AVX512BF16__)
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
#else
    store(p, a);
    store(p + LANES, b);
#endif
}

// What a word of C holds, and sum + a * b over what it holds.
template <class C> struct Words;

template <> struct Words<float> {
    static constexpr int HELD = 1;
    static inline vec add(vec a, vec b, vec sum) { return fma(a, b, sum); }
};

template <> struct Words<bf16> {
    static constexpr int HELD = 2;
#if COTERIE_AVX512 && defined(__AVX512BF16__)
    static inline vec add(vec a, vec b, vec sum) {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
    }
#else
    static inline vec low(vec a) { return as_vec(bits_of(a) << 16); }
    static inline vec high(vec a) { return as_vec(bits_of(a) & 0xffff0000u); }
    static inline vec add(vec a, vec b, vec sum) { return fma(high(a), high(b), fma(low(a), low(b), sum)); }
#endif
};

#if COTERIE_AVX512

// out[i * stride + j] = row[j][from + i] for 16 rows of n <= 16 words; a null row is zeros.
static inline void transpose(const word *const *row, long n, word *out, long stride, long from = 0) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = row[i] ? _mm512_maskz_loadu_epi32(first(n), row[i] + from) : _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {  // a[4 j + c]: column c of each quarter, of rows 4 j to 4 j + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 4; c++) {
        __m512i lo0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), lo1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        __m512i hi0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee), hi1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        b[c] = _mm512_shuffle_i32x4(lo0, lo1, 0x88);
        b[4 + c] = _mm512_shuffle_i32x4(lo0, lo1, 0xdd);
        b[8 + c] = _mm512_shuffle_i32x4(hi0, hi1, 0x88);
        b[12 + c] = _mm512_shuffle_i32x4(hi0, hi1, 0xdd);
    }
#pragma GCC unroll 16
    for (long i = 0; i < 16; i++)
        if (i < n) _mm512_storeu_si512(out + i * stride, b[i]);
}

// out[i] holds a[i] and b[i], for n <= 32 numbers; out has room for 32 words. A null row is zeros.
static inline void interleave(const bf16 *a, const bf16 *b, long n, word *out) {
    __mmask32 part = __mmask32(n >= 32 ? ~0u : (1u << n) - 1);
    __m512i x = a ? _mm512_maskz_loadu_epi16(part, a) : _mm512_setzero_si512();
    __m512i y = b ? _mm512_maskz_loadu_epi16(part, b) : _mm512_setzero_si512();
    __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1));
    __m512i low2 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(y)), high2 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(y, 1));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(low2, 16)));
    _mm512_storeu_si512(out + 16, _mm512_or_si512(high, _mm512_slli_epi32(high2, 16)));
}

#else

static inline void transpose(const word *const *row, long n, word *out, long stride, long from = 0) {
    for (int j = 0; j < 16; j++)
        for (long i = 0; i < n; i++) out[i * stride + j] = row[j] ? row[j][from + i] : 0;
}

static inline void interleave(const bf16 *a, const bf16 *b, long n, word *out) {
    for (long i = 0; i < 32; i++)
        out[i] = i < n ? word(a ? a[i].bits : 0) | word(b ? b[i].bits : 0) << 16 : 0;
}

#endif
