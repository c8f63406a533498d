// Vectors of floats and of pairs of 16-bit integers: AVX-512, AVX2, or the compiler's own vectors
// (GNU C) for every other processor. LANES floats fit a `vec`; an `ivec` holds a 32-bit integer, or
// two 16-bit ones, in each lane. Defining MINIGPT4_PLAIN chooses the compiler's own.

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
typedef uint16_t half;  // IEEE 754 binary16, as bits

#if !defined(MINIGPT4_PLAIN) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__F16C__)
#define MINIGPT4_AVX512
#elif !defined(MINIGPT4_PLAIN) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MINIGPT4_AVX2
#endif
#if defined(MINIGPT4_AVX512) || defined(MINIGPT4_AVX2)
#include <immintrin.h>
#endif

// Operators of the compiler's vectors are the processor's own instructions.
#if defined(MINIGPT4_AVX512)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t uvec16 __attribute__((vector_size(4 * LANES)));
INLINE vec splat(float x) { return x - (vec){0}; }  // -0 stays -0
INLINE vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec magnitude(vec a) { return (vec)((ivec)a & INT32_MAX); }

INLINE ivec iload(const void *p) { ivec v; memcpy(&v, p, sizeof v); return v; }
INLINE void istore(void *p, ivec v) { memcpy(p, &v, sizeof v); }
INLINE ivec isplat(int32_t x) { return (ivec){0} + x; }
INLINE ivec isplat16(int16_t x) { return (ivec)((uvec16){0} + (uint16_t)x); }
INLINE ivec isub16(ivec a, ivec b) { return (ivec)((uvec16)a - (uvec16)b); }
INLINE ivec right16(ivec a, int n) { return (ivec)((uvec16)a >> n); }
INLINE ivec left16(ivec a, int n) { return (ivec)((uvec16)a << n); }
INLINE vec to_floats(ivec a) { return __builtin_convertvector(a, vec); }

#if defined(MINIGPT4_AVX512)
INLINE vec fma_(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec greater(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec nearest(vec a) { return _mm512_roundscale_ps(a, 0); }
INLINE float sum(vec v) { return _mm512_reduce_add_ps(v); }
INLINE float highest_of(vec v) { return _mm512_reduce_max_ps(v); }
INLINE vec load_half(const half *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE void store_half(half *p, vec v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vec times_power_of_2(vec a, vec n) { return _mm512_scalef_ps(a, n); }
INLINE vec load_unsigned8(const uint8_t *p) {
    return to_floats((ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE vec load_signed8(const int8_t *p) {
    return to_floats((ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE ivec load_signed8_as16(const int8_t *p) {
    return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}
// Adds to each lane of `sums` its two products of 16-bit integers.
INLINE ivec dot2(ivec sums, ivec a, ivec b) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    return sums + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
// Rounds to 16-bit integers.
INLINE void store_rounded(int16_t *p, vec a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
}

#elif defined(MINIGPT4_AVX2)
INLINE vec fma_(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec greater(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec nearest(vec a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE float sum(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float highest_of(vec v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
INLINE vec load_half(const half *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE void store_half(half *p, vec v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vec times_power_of_2(vec a, vec n) {
    return (vec)((ivec)a + ((ivec)_mm256_cvtps_epi32(n) << 23));
}
INLINE vec load_unsigned8(const uint8_t *p) {
    return to_floats((ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vec load_signed8(const int8_t *p) {
    return to_floats((ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE ivec load_signed8_as16(const int8_t *p) {
    return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
}
INLINE ivec dot2(ivec sums, ivec a, ivec b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (ivec)_mm256_dpwssd_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif defined(__AVXVNNI__)
    return (ivec)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
    return sums + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
INLINE void store_rounded(int16_t *p, vec a) {
    const __m256i n = _mm256_cvtps_epi32(a);
    const __m128i low = _mm256_castsi256_si128(n), high = _mm256_extracti128_si256(n, 1);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi32(low, high));
}

#else
#define EACH(type, body) \
    do { type r; for (int i = 0; i < LANES; i++) r[i] = (body); return r; } while (0)
INLINE float half_to_float(half h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
INLINE vec fma_(vec a, vec b, vec c) { return a * b + c; }
INLINE vec greater(vec a, vec b) { EACH(vec, a[i] > b[i] ? a[i] : b[i]); }
INLINE vec smaller(vec a, vec b) { EACH(vec, a[i] < b[i] ? a[i] : b[i]); }
INLINE vec nearest(vec a) { EACH(vec, rintf(a[i])); }
INLINE float sum(vec v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
INLINE float highest_of(vec v) {
    float highest = v[0];
    for (int i = 1; i < LANES; i++) highest = v[i] > highest ? v[i] : highest;
    return highest;
}
INLINE vec load_half(const half *p) { EACH(vec, half_to_float(p[i])); }
INLINE void store_half(half *p, vec v) {
    for (int i = 0; i < LANES; i++) { _Float16 f = (_Float16)v[i]; memcpy(p + i, &f, 2); }
}
INLINE vec times_power_of_2(vec a, vec n) { EACH(vec, ldexpf(a[i], (int)n[i])); }
INLINE vec load_unsigned8(const uint8_t *p) { EACH(vec, p[i]); }
INLINE vec load_signed8(const int8_t *p) { EACH(vec, p[i]); }
INLINE ivec load_signed8_as16(const int8_t *p) {
    uvec16 v;
    for (int i = 0; i < 2 * LANES; i++) v[i] = (uint16_t)(int16_t)p[i];
    return (ivec)v;
}
// Each lane's lower and upper half, sign-extended (shifting left as unsigned: no overflow).
INLINE ivec lower(ivec a) { return (ivec)((uvec)a << 16) >> 16; }
INLINE ivec upper(ivec a) { return a >> 16; }
INLINE ivec dot2(ivec sums, ivec a, ivec b) {
    return sums + lower(a) * lower(b) + upper(a) * upper(b);
}
INLINE void store_rounded(int16_t *p, vec a) {
    for (int i = 0; i < LANES; i++) {
        const float x = rintf(a[i]);  // not a number: 0
        p[i] = x > -32768 && x < 32767 ? (int16_t)x : x >= 32767 ? 32767 : x < 0 ? -32768 : 0;
    }
}
#endif

// Two neighbouring 16-bit integers, in every lane.
INLINE ivec splat_pair(const int16_t *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return isplat(pair);
}

INLINE half to_half(float x) {
#if defined(MINIGPT4_AVX512) || defined(MINIGPT4_AVX2)
    return (half)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    _Float16 f = (_Float16)x;
    half h;
    memcpy(&h, &f, 2);
    return h;
#endif
}

INLINE float from_half(half h) {
#if defined(MINIGPT4_AVX512) || defined(MINIGPT4_AVX2)
    return _cvtsh_ss(h);
#else
    return half_to_float(h);
#endif
}

// e^x to 2 units in the last place: 2^n times a polynomial (Cephes) for the rest, |rest| < 0.35.
INLINE vec exp_(vec x) {
    x = smaller(greater(x, splat(-87)), splat(88));
    const vec n = nearest(x * 1.44269504f);
    vec r = fma_(n, splat(-0.693359375f), x);
    r = fma_(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = fma_(p, r, splat(1.3981999507e-3f));
    p = fma_(p, r, splat(8.3334519073e-3f));
    p = fma_(p, r, splat(4.1665795894e-2f));
    p = fma_(p, r, splat(1.6666665459e-1f));
    p = fma_(p, r, splat(5.0000001201e-1f));
    return times_power_of_2(fma_(p, r * r, r + 1.0f), n);
}
