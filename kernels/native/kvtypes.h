// The numbers that keys and values are kept in: from and to fp32 and bf16, rounded to nearest, ties to even.
#pragma once
#include "lanes.h"

struct fp16 {
    uint16_t bits;
};
struct fp8 {  // e4m3fn: 4 bits of exponent, 3 of fraction, no infinity, one NaN
    uint8_t bits;
};

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float magnitude(float value) { return as_float(as_bits(value) & 0x7fffffffu); }

// The exponent is moved as bits and put right by a product, which is exact for subnormal numbers too.
static inline float widen(fp16 value) {
    uint32_t most = value.bits & 0x7fffu;
    float wide = as_float(most << 13) * 0x1p112f;
    uint32_t bits = most >= 0x7c00u ? most << 13 | 0x7f800000u : as_bits(wide);
    return as_float(bits | uint32_t(value.bits & 0x8000u) << 16);
}
static inline float widen(int8_t value) { return float(value); }
static inline float widen(fp8 value) {
    uint32_t most = value.bits & 0x7fu;
    float wide = as_float(most << 20) * 0x1p120f;
    uint32_t bits = most == 0x7fu ? 0x7fc00000u : as_bits(wide);
    return as_float(bits | uint32_t(value.bits & 0x80u) << 24);
}

static inline void narrow(float value, fp16 &out) {
    float size = magnitude(value);
    uint32_t bits = as_bits(size);
    uint32_t small = uint32_t(__builtin_rintf((size < 0x1p-14f ? size : 0.0f) * 0x1p24f));
    uint32_t normal = ((bits + 0xfffu + ((bits >> 13) & 1)) - (112u << 23)) >> 13;
    uint32_t code = size < 0x1p-14f ? small : size < 65520.0f ? normal : size == size ? 0x7c00u : 0x7e00u;
    out.bits = uint16_t(code | (as_bits(value) >> 16 & 0x8000u));
}
static inline void narrow(float value, int8_t &out) {  // of -127 to 127; any number for NaN
    value = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value;
    out = int8_t(as_bits(__builtin_rintf(value) + 12582912.0f) & 0xff);
}
static inline void narrow(float value, fp8 &out) {  // of -448 to 448
    float size = magnitude(value);
    uint32_t bits = as_bits(size);
    uint32_t small = uint32_t(__builtin_rintf((size < 0x1p-6f ? size : 0.0f) * 0x1p9f));
    uint32_t normal = ((bits + 0x7ffffu + ((bits >> 20) & 1)) - (120u << 23)) >> 20;
    uint32_t code = size < 0x1p-6f ? small : size <= 464.0f ? normal : 0x7fu;
    out.bits = uint8_t(code | (as_bits(value) >> 24 & 0x80u));
}

template <class K> constexpr float LARGEST = 0;  // 0: kept as it is, without a scale
template <> constexpr float LARGEST<int8_t> = 127.0f;
template <> constexpr float LARGEST<fp8> = 448.0f;

// Writes one head's numbers; returns the scale that goes with them. Numbers too small to divide by become zeros.
template <class X, class K> static inline float keep(const X *x, K *out, long d) {
    if constexpr (LARGEST<K> == 0) {
        for (long i = 0; i < d; i++) narrow(widen(x[i]), out[i]);
        return 1;
    } else {
        float most = 0, inverse, scale;
        for (long i = 0; i < d; i++) {
            float size = magnitude(widen(x[i]));
            most = size <= most ? most : size;  // NaN, once met, stays
        }
        scale = most / LARGEST<K>;
        if (scale < 1e-30f) scale = 0;
        inverse = scale == 0 ? 0 : 1 / scale;
        for (long i = 0; i < d; i++) narrow(widen(x[i]) * inverse, out[i]);
        return scale;
    }
}

// A head's numbers in C, which holds them exactly where C is bf16. Nothing is done where they are in C already.
template <class K, class C> static inline const C *taken(const K *x, C *room, long d) {
    for (long i = 0; i < d; i++) {
        if constexpr (sizeof(C) == 2)
            room[i].bits = uint16_t(as_bits(widen(x[i])) >> 16);
        else
            room[i] = widen(x[i]);
    }
    return room;
}
template <> inline const float *taken(const float *x, float *, long) { return x; }
template <> inline const bf16 *taken(const bf16 *x, bf16 *, long) { return x; }
