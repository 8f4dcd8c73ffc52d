// Vectors of one instruction set, and exp2, softplus and transposes on them.
//
// A vector is as wide as the registers of the instruction set: gcc spills everything to the stack
// when it is wider (measured 4.6 times slower). Lanes are channels; lane i of one vector never meets
// lane j, except in the transposes and in sum_lanes.
//
// NaN in gives NaN out: every comparison below lets a NaN pass. Denormals count as zero, because the
// entry points switch the processor to that mode where it has one (x86).
#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__)
#define W 8
#else // SSE2, NEON
#define W 4
#endif

typedef float vec __attribute__((vector_size(4 * W), aligned(4 * W)));
typedef float vec_in_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), aligned(4 * W)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LOG2_E 1.44269504088896340736f
#define LN_2 0.693147180559945309417f

INLINE vec broadcast(float x) { return x - (vec){0}; }
INLINE vec blend(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

// The larger (smaller) of bound and x; x where x is NaN.
INLINE vec at_least(vec bound, vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)bound, (__m256)x);
#elif defined(__SSE2__)
    return (vec)_mm_max_ps((__m128)bound, (__m128)x);
#else
    return blend(x < bound, bound, x);
#endif
}
INLINE vec at_most(vec bound, vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
    return (vec)_mm256_min_ps((__m256)bound, (__m256)x);
#elif defined(__SSE2__)
    return (vec)_mm_min_ps((__m128)bound, (__m128)x);
#else
    return blend(x > bound, bound, x);
#endif
}

// 2^x with a relative error of 1.2e-7: x = k + f with f in [-1/2, 1/2], times a polynomial for 2^f
// (minimax of degree 5 whose constant is exactly 1, so that exp2(0) is 1).
INLINE vec exp2_vec(vec x) {
#if defined(__AVX512F__)
    vec k = (vec)_mm512_roundscale_ps((__m512)x, 8);
#else
    // 2^k is built from bits, for k from -127 (zero) to 128 (infinity). Adding 1.5 * 2^23 + 127
    // leaves k + 127 in the low bits.
    x = at_most(broadcast(128.f), at_least(broadcast(-127.f), x));
    vec biased = x + broadcast(12583039.f), k = biased - broadcast(12583039.f);
#endif
    vec f = x - k;
    vec p = broadcast(0.001326472731307149f) * f + broadcast(0.009671512991189957f);
    p = p * f + broadcast(0.05550733581185341f);
    p = p * f + broadcast(0.24022242426872253f);
    p = p * f + broadcast(0.6931470036506653f);
    p = p * f + broadcast(1.f);
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)k); // 0 at -inf, inf at inf, although f is NaN
#else
    return p * (vec)((ivec)biased << 23);
#endif
}

// softplus(x) = ln(1 + e^x), and its derivative sigmoid(x) where asked for. As max(x, 0) +
// 2 atanh(e / (2 + e)) with e = exp(-|x|), so that small step sizes keep their relative accuracy.
INLINE vec softplus_vec(vec x, vec *sigmoid) {
    vec e = exp2_vec(blend(x < 0.f, x, -x) * LOG2_E), s;
    if (sigmoid) { // both quotients, e / (2 + e) and 1 / (1 + e), from one division
        vec one = e + 1.f, two = e + 2.f, r = broadcast(1.f) / (one * two);
        s = e * one * r;
        r *= two;
        *sigmoid = blend(x < 0.f, e * r, r);
    } else {
        s = e / (e + 2.f);
    }
    vec q = s * s;
    vec p = broadcast(0.2441306859254837f) * q + broadcast(0.21393251419067383f);
    p = p * q + broadcast(0.2862072288990021f);
    p = p * q + broadcast(0.3999869227409363f);
    p = p * q + broadcast(0.6666668057441711f);
    p = p * q + broadcast(2.f);
    return p * s + at_least(broadcast(0.f), x);
}

#if W == 16
#define STAGES 4
#define LOW_HALVES (ivec){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define HIGH_HALVES (ivec){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#elif W == 8
#define STAGES 3
#define LOW_HALVES (ivec){0, 8, 1, 9, 2, 10, 3, 11}
#define HIGH_HALVES (ivec){4, 12, 5, 13, 6, 14, 7, 15}
#else
#define STAGES 2
#define LOW_HALVES (ivec){0, 4, 1, 5}
#define HIGH_HALVES (ivec){2, 6, 3, 7}
#endif

#if defined(__clang__)
#if W == 16
#define ZIP_LOW(a, b)                                                                              \
    __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b)                                                                             \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif W == 8
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif
#else
#define ZIP_LOW(a, b) __builtin_shuffle(a, b, LOW_HALVES)
#define ZIP_HIGH(a, b) __builtin_shuffle(a, b, HIGH_HALVES)
#endif

// Transpose W x W in place: log2(W) rounds that interleave vector i with vector i + W/2.
INLINE void transpose(vec *rows) {
    vec other[W];
    UNROLL
    for (int stage = 0; stage < STAGES; stage++) {
        vec *from = stage & 1 ? other : rows, *to = stage & 1 ? rows : other;
        UNROLL
        for (int i = 0; i < W / 2; i++) {
            to[2 * i] = ZIP_LOW(from[i], from[i + W / 2]);
            to[2 * i + 1] = ZIP_HIGH(from[i], from[i + W / 2]);
        }
    }
    if (STAGES & 1) memcpy(rows, other, sizeof other);
}

// Lane i of the result is the sum over the lanes of v[i], for v in groups of four vectors that lie
// `stride` vectors apart. Each round adds the interleaved halves of vectors i and i + half, which
// leaves half as many vectors.
INLINE vec sum_lanes(const vec *v, long stride) {
    vec sums[W];
    UNROLL
    for (int i = 0; i < W; i++) sums[i] = v[i / 4 * stride + i % 4];
    UNROLL
    for (int half = W / 2; half >= 1; half /= 2) {
        UNROLL
        for (int i = 0; i < half; i++)
            sums[i] = ZIP_LOW(sums[i], sums[i + half]) + ZIP_HIGH(sums[i], sums[i + half]);
    }
    return sums[0];
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Lane i is chosen if i < count.
INLINE __m256i first_lanes(int count) {
    return (__m256i)((ivec){0, 1, 2, 3, 4, 5, 6, 7} < ((ivec){0} + count));
}
#endif
// The first `count` floats at p; the other lanes are zero.
INLINE vec load(const float *p, int count) {
    if (count == W) return *(const vec_in_memory *)p;
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif defined(__AVX2__)
    return (vec)_mm256_maskload_ps(p, first_lanes(count));
#else
    vec v = {0};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
#endif
}
INLINE void store(float *p, vec v, int count) {
    if (count == W) {
        *(vec_in_memory *)p = v;
        return;
    }
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
#else
    for (int i = 0; i < count; i++) p[i] = v[i];
#endif
}

// Processor mode in which denormals count as zero; returns the mode before.
INLINE unsigned flush_denormals(void) {
#if defined(__x86_64__)
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
#else
    return 0;
#endif
}
INLINE void restore_mode(unsigned mode) {
#if defined(__x86_64__)
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}
