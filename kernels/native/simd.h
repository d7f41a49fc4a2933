// Vectors of fp32 and the numbers they are loaded from, for AVX-512, AVX2 and machines of which nothing is known.
// This is the only file that asks which instructions there are.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define COTERIE_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define COTERIE_AVX2 1
#include <immintrin.h>
#endif

// total / parts, rounded up.
static inline long share(long total, long parts) { return (total + parts - 1) / parts; }

struct bf16 {
    uint16_t bits;
};

static inline float widen(float value) { return value; }

static inline float widen(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline void narrow(float value, float &out) { out = value; }

// Rounds to the nearest, ties to even, as torch does. NaN stays NaN.
static inline void narrow(float value, bf16 &out) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t(value == value ? rounded : 0x7fc0);
}

#if COTERIE_AVX512

constexpr int LANES = 16;
struct vec {
    __m512 v;
};

static inline __mmask16 first(long n) { return __mmask16(n >= 16 ? 0xffff : (1u << n) - 1); }
static inline vec zeros() { return {_mm512_setzero_ps()}; }
static inline vec all(float value) { return {_mm512_set1_ps(value)}; }
static inline vec widened(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
static inline vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
static inline vec load(const bf16 *p) { return widened(_mm256_loadu_si256((const __m256i *)p)); }
// The first n lanes, the others 0; nothing behind them is read.
static inline vec load_part(const float *p, long n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
static inline vec load_part(const bf16 *p, long n) { return widened(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline __m256i narrowed(vec a) {
    __m512i bits = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
static inline void store(float *p, vec a) { _mm512_storeu_ps(p, a.v); }
static inline void store(bf16 *p, vec a) { _mm256_storeu_si256((__m256i *)p, narrowed(a)); }
static inline void store_part(float *p, vec a, long n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
static inline void store_part(bf16 *p, vec a, long n) { _mm256_mask_storeu_epi16(p, first(n), narrowed(a)); }
static inline vec add(vec a, vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline vec sub(vec a, vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline vec mul(vec a, vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline vec div(vec a, vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline vec larger(vec a, vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where one is NaN
static inline vec smaller(vec a, vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline vec fma(vec a, vec b, vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
static inline vec keep(vec a, long n) { return {_mm512_maskz_mov_ps(first(n), a.v)}; }  // the other lanes 0

// The sum of all lanes: halves, quarters, pairs. Every sum in this folder has this order.
static inline float sum(vec a) {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

// out[i] = sum(a[i]) of sixteen vectors at once, in the same order.
static inline void sums16(const vec *a, float *out) {
    __m512 h[8], q[4], p[2];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {  // q[i] will hold a[i], a[4 + i], a[8 + i], a[12 + i], four lanes each
            __m512 x = a[8 * j + i].v, y = a[8 * j + 4 + i].v;
            h[2 * i + j] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
        }
    for (int i = 0; i < 4; i++)
        q[i] = _mm512_add_ps(_mm512_shuffle_f32x4(h[2 * i], h[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(h[2 * i], h[2 * i + 1], 0xdd));
    for (int i = 0; i < 2; i++)
        p[i] = _mm512_add_ps(_mm512_shuffle_ps(q[2 * i], q[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(q[2 * i], q[2 * i + 1], 0xee));
    __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(p[0], p[1], 0x88), _mm512_shuffle_ps(p[0], p[1], 0xdd));
    _mm512_storeu_ps(out, sums);
}

#elif COTERIE_AVX2

constexpr int LANES = 8;
struct vec {
    __m256 v;
};

template <class T> static inline vec load_part(const T *p, long n);
static inline vec zeros() { return {_mm256_setzero_ps()}; }
static inline vec all(float value) { return {_mm256_set1_ps(value)}; }
static inline vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
static inline vec load(const bf16 *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
static inline void store(float *p, vec a) { _mm256_storeu_ps(p, a.v); }
static inline vec add(vec a, vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline vec sub(vec a, vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline vec mul(vec a, vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline vec div(vec a, vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline vec larger(vec a, vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline vec smaller(vec a, vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline vec fma(vec a, vec b, vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline float sum(vec a) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

#else  // vectors that GCC and Clang lower to whatever the machine has

constexpr int LANES = 8;
struct vec {
    float v __attribute__((vector_size(32)));
};

template <class T> static inline vec load_part(const T *p, long n);
static inline vec all(float value) {
    vec a;
    for (int i = 0; i < LANES; i++) a.v[i] = value;
    return a;
}
static inline vec zeros() { return all(0.0f); }
static inline vec load(const float *p) {
    vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
static inline vec load(const bf16 *p) {
    vec a;
    for (int i = 0; i < LANES; i++) a.v[i] = widen(p[i]);
    return a;
}
static inline void store(float *p, vec a) { memcpy(p, &a, sizeof a); }
static inline vec add(vec a, vec b) { return {a.v + b.v}; }
static inline vec sub(vec a, vec b) { return {a.v - b.v}; }
static inline vec mul(vec a, vec b) { return {a.v * b.v}; }
static inline vec div(vec a, vec b) { return {a.v / b.v}; }
static inline vec larger(vec a, vec b) {
    for (int i = 0; i < LANES; i++) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
static inline vec smaller(vec a, vec b) {
    for (int i = 0; i < LANES; i++) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
static inline vec fma(vec a, vec b, vec c) {
#ifdef __FP_FAST_FMAF
    for (int i = 0; i < LANES; i++) a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return a;
#else
    return {a.v * b.v + c.v};
#endif
}
static inline float sum(vec a) {
    float q[4];
    for (int i = 0; i < 4; i++) q[i] = a.v[i] + a.v[i + 4];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

#endif

#if !COTERIE_AVX512

template <class T> static inline vec load_part(const T *p, long n) {
    T part[LANES] = {};
    memcpy(part, p, size_t(n < LANES ? n : LANES) * sizeof(T));
    return load(part);
}
static inline void store(bf16 *p, vec a) {
    float wide[LANES];
    store(wide, a);
    for (int i = 0; i < LANES; i++) narrow(wide[i], p[i]);
}
template <class T> static inline void store_part(T *p, vec a, long n) {
    T part[LANES];
    store(part, a);
    memcpy(p, part, size_t(n < LANES ? n : LANES) * sizeof(T));
}
static inline vec keep(vec a, long n) {
    float all[LANES];
    store(all, a);
    return load_part(all, n);
}
static inline void sums16(const vec *a, float *out) {
    for (int i = 0; i < 16; i++) out[i] = sum(a[i]);
}

#endif
