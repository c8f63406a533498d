// A Llama's forward pass on a CPU, straight from a GGUF file's blocks of 4 and 8 bits.
//
// A call takes rows: tokens (or image embeddings) of any conversations, each with its position and
// its conversation's table of key-value pages. All threads walk the same layers together and meet
// at barriers. Every number of a row is computed in one order whatever else is in the call, so a
// conversation gets the same bits alone and among others, in one chunk or in many.
//
// `native.py` compiles this file for the machine it runs on and says what the arguments are.

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#endif

// --- vectors ------------------------------------------------------------------------------------

#define INLINE static inline __attribute__((always_inline))
typedef uint16_t half;  // IEEE 754 binary16, as bits

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
typedef __m256 vec;
INLINE vec splat(float x) { return _mm256_set1_ps(x); }
INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vec v) { _mm256_storeu_ps(p, v); }
INLINE vec fma_(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec load_half(const half *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE void store_half(half *p, vec v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE float sum(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float from_half(half h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
INLINE half to_half(float x) { return (half)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE vec greater(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec divide(vec a, vec b) { return _mm256_div_ps(a, b); }
// e^x to 2 units in the last place: 2^n times a polynomial (Cephes) for the rest, |rest| < 0.35.
INLINE vec exp_(vec x) {
    x = _mm256_min_ps(_mm256_max_ps(x, splat(-87)), splat(88));
    const vec n = _mm256_round_ps(mul(x, splat(1.44269504f)),
                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec r = fma_(n, splat(-0.693359375f), x);
    r = fma_(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = fma_(p, r, splat(1.3981999507e-3f));
    p = fma_(p, r, splat(8.3334519073e-3f));
    p = fma_(p, r, splat(4.1665795894e-2f));
    p = fma_(p, r, splat(1.6666665459e-1f));
    p = fma_(p, r, splat(5.0000001201e-1f));
    p = fma_(p, mul(r, r), _mm256_add_ps(r, splat(1)));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}
#else  // plain C, for the compiler to vectorise as it can
#define LANES 8
typedef struct { float x[LANES]; } vec;
#define EACH(body) do { vec r; for (int i = 0; i < LANES; i++) r.x[i] = (body); return r; } while (0)
INLINE float from_half(half h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
INLINE vec splat(float x) { EACH(x); }
INLINE vec load(const float *p) { EACH(p[i]); }
INLINE void store(float *p, vec v) { memcpy(p, v.x, sizeof v.x); }
INLINE vec fma_(vec a, vec b, vec c) { EACH(a.x[i] * b.x[i] + c.x[i]); }
INLINE vec mul(vec a, vec b) { EACH(a.x[i] * b.x[i]); }
INLINE vec load_half(const half *p) { EACH(from_half(p[i])); }
INLINE void store_half(half *p, vec v) {
    for (int i = 0; i < LANES; i++) { _Float16 f = (_Float16)v.x[i]; memcpy(p + i, &f, 2); }
}
INLINE float sum(vec v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v.x[i];
    return s;
}
INLINE half to_half(float x) { _Float16 f = (_Float16)x; half h; memcpy(&h, &f, 2); return h; }
INLINE vec greater(vec a, vec b) { EACH(fmaxf(a.x[i], b.x[i])); }
INLINE vec divide(vec a, vec b) { EACH(a.x[i] / b.x[i]); }
INLINE vec exp_(vec a) { EACH(expf(a.x[i])); }
#endif

// --- the model ----------------------------------------------------------------------------------

// A matrix's weights lie in panels of 8 rows, and in a panel in blocks of 32 columns: 8 scales (one
// for each row), for Q4_1 8 minimums, then the weights, four columns of each of the 8 rows in turn.
// A vector of 32 bytes thus meets four columns of the input, and its 8 sums are the 8 rows'.
enum { Q4_1 = 3, Q8_0 = 8, BLOCK = 32, PANEL = 8, PAGE = 16 };  // types as GGUF numbers them

typedef struct {
    const uint8_t *data;
    int32_t type, rows, columns;
} Matrix;

typedef struct {
    const float *attention_norm, *mlp_norm;
    Matrix q, k, v, o, gate, up, down;
} Layer;

typedef struct {
    int32_t hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary, context;
    float norm_eps;
    const float *final_norm, *cosines, *sines;  // [context, head_dim / 2]
    Matrix embedding, head;
    const Layer *layer;
} Model;

typedef struct {
    int32_t rows, logit_rows, table_width;
    const int32_t *tokens;      // [rows]; below 0: row -1 - token of `embeds`
    const float *embeds;        // [., hidden]
    const int32_t *positions;   // [rows]
    const int32_t *table_rows;  // [rows] which row of `tables`
    const int32_t *tables;      // [., table_width] pages of a conversation, in order
    const int32_t *wanted;      // [logit_rows] rows whose logits are asked for
    half *pages;                // [page, layer, key or value, kv_head, PAGE * head_dim]
    float *logits;              // [logit_rows, vocabulary]
} Batch;

// --- products with a matrix of blocks -----------------------------------------------------------

// What is multiplied with weights becomes two rows of 8-bit numbers, in blocks of 32 with a scale
// each: the rounded numbers, and what the rounding left over. One row alone changes every 30th of
// nano's likeliest tokens (docs/log.md).
enum { PARTS = 2 };

typedef struct {
    int8_t *codes;  // [rows, PARTS, columns]
    float *scales;  // [rows, PARTS, columns / BLOCK]
    float *sums;    // [rows, PARTS, columns / BLOCK], of the rounded numbers
} Rounded;

// Rounds 32 numbers that stand at `column` of `row`.
INLINE void round_block(const float *x, int columns, const Rounded *to, int row, int column) {
    float rest[BLOCK];
    memcpy(rest, x, sizeof rest);
    for (int part = 0; part < PARTS; part++) {
        const size_t place = ((size_t)row * PARTS + part) * columns + column;
        float highest = 0;
        for (int i = 0; i < BLOCK; i++) highest = fmaxf(highest, fabsf(rest[i]));
        const float scale = highest / 127.0f, inverse = highest > 0 ? 127.0f / highest : 0;
        int32_t count = 0;
        for (int i = 0; i < BLOCK; i++) {
            const float code = rintf(rest[i] * inverse);
            to->codes[place + i] = (int8_t)(int32_t)code;
            rest[i] -= code * scale;
            count += (int32_t)code;
        }
        to->scales[place / BLOCK] = scale;
        to->sums[place / BLOCK] = scale * (float)count;
    }
}

INLINE void round_row(const float *x, int columns, const Rounded *to, int row) {
    for (int column = 0; column < columns; column += BLOCK)
        round_block(x + column, columns, to, row, column);
}

INLINE int panel_block_bytes(int type) { return type == Q4_1 ? 32 + 128 : 16 + 256; }

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
// sums += the 8 lanes' products of four unsigned and four signed bytes each.
INLINE __m256i dot4(__m256i sums, __m256i bytes, __m256i x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, bytes, x);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, bytes, x);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, x),
                                                    _mm256_set1_epi16(1)));
#endif
}

// The same for nibbles, of which 8 products each fit 16 bits: widened once, by `widen`.
INLINE __m256i dot4_small(__m256i sums, __m256i nibbles, __m256i x) {
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    return dot4(sums, nibbles, x);
#else
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(nibbles, x));
#endif
}

INLINE __m256i widen(__m256i sums) {
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    return sums;
#else
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#endif
}

INLINE __m256i four(const int8_t *p) {
    int32_t bytes;
    memcpy(&bytes, p, 4);
    return _mm256_set1_epi32(bytes);
}

// out[i][r] = row r of the panel at p . input row (first + i), for `count` rows; `count` and `type`
// are constants.
INLINE void panel_times(int type, int count, const uint8_t *p, int columns, const Rounded *x,
                        int first, float *out, int out_stride) {
    enum { MOST = 2 * PARTS };
    const int blocks = columns / BLOCK, parts = count * PARTS;
    const int8_t *codes = x->codes + (size_t)first * PARTS * columns;
    const float *scales = x->scales + (size_t)first * PARTS * blocks;
    const float *sums = x->sums + (size_t)first * PARTS * blocks;
    __m256 total[MOST];
    for (int i = 0; i < parts; i++) total[i] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++, p += panel_block_bytes(type), codes += BLOCK) {
        const vec scale = load_half((const half *)p);
        __m256i dots[MOST];
        for (int i = 0; i < parts; i++) dots[i] = _mm256_setzero_si256();
        if (type == Q4_1) {
            const vec minimum = load_half((const half *)(p + 16));
            const __m256i low_bits = _mm256_set1_epi8(15);
            for (int j = 0; j < 4; j++) {
                const __m256i w = _mm256_loadu_si256((const __m256i *)(p + 32 + 32 * j));
                const __m256i low = _mm256_and_si256(w, low_bits);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), low_bits);
                for (int i = 0; i < parts; i++) {
                    const int8_t *c = codes + (size_t)i * columns + 4 * j;
                    dots[i] = dot4_small(dots[i], low, four(c));
                    dots[i] = dot4_small(dots[i], high, four(c + 16));
                }
            }
            for (int i = 0; i < parts; i++) {
                const vec d = _mm256_cvtepi32_ps(widen(dots[i]));
                total[i] = fma_(d, mul(scale, splat(scales[i * blocks + b])), total[i]);
                total[i] = fma_(minimum, splat(sums[i * blocks + b]), total[i]);
            }
        } else {
            for (int j = 0; j < 8; j++) {
                const __m256i w = _mm256_loadu_si256((const __m256i *)(p + 16 + 32 * j));
                const __m256i size = _mm256_abs_epi8(w);
                for (int i = 0; i < parts; i++)
                    dots[i] = dot4(dots[i], size,
                                   _mm256_sign_epi8(four(codes + (size_t)i * columns + 4 * j), w));
            }
            for (int i = 0; i < parts; i++) {
                const vec d = _mm256_cvtepi32_ps(dots[i]);
                total[i] = fma_(d, mul(scale, splat(scales[i * blocks + b])), total[i]);
            }
        }
    }
    for (int i = 0; i < count; i++)
        store(out + (size_t)i * out_stride,
              _mm256_add_ps(total[i * PARTS], total[i * PARTS + 1]));
}
#else
INLINE void panel_times(int type, int count, const uint8_t *p, int columns, const Rounded *x,
                        int first, float *out, int out_stride) {
    const int blocks = columns / BLOCK;
    for (int i = 0; i < count; i++, out += out_stride) {
        float total[PARTS][PANEL] = {{0}};
        for (int part = 0; part < PARTS; part++) {
            const size_t row = (size_t)(first + i) * PARTS + part;
            const uint8_t *q = p;
            for (int b = 0; b < blocks; b++, q += panel_block_bytes(type)) {
                const int8_t *codes = x->codes + row * columns + b * BLOCK;
                const float scale = x->scales[row * blocks + b], plus = x->sums[row * blocks + b];
                const half *scales = (const half *)q;
                int32_t dots[PANEL] = {0};
                for (int j = 0; j < (type == Q4_1 ? 4 : 8); j++)
                    for (int r = 0; r < PANEL; r++)
                        for (int t = 0; t < 4; t++) {
                            const int place = 32 * j + 4 * r + t, k = 4 * j + t;
                            if (type == Q4_1)
                                dots[r] += (q[32 + place] & 15) * codes[k] +
                                           (q[32 + place] >> 4) * codes[k + 16];
                            else
                                dots[r] += (int8_t)q[16 + place] * codes[k];
                        }
                for (int r = 0; r < PANEL; r++) {
                    total[part][r] += (float)dots[r] * (from_half(scales[r]) * scale);
                    if (type == Q4_1) total[part][r] += from_half(scales[PANEL + r]) * plus;
                }
            }
        }
        for (int r = 0; r < PANEL; r++) out[r] = total[0][r] + total[1][r];
    }
}
#endif

INLINE void panel_times_rows(int type, const uint8_t *p, int columns, const Rounded *x, int rows,
                             float *out, int out_stride) {
    int i = 0;
    for (; i + 2 <= rows; i += 2)
        panel_times(type, 2, p, columns, x, i, out + (size_t)i * out_stride, out_stride);
    for (; i < rows; i++)
        panel_times(type, 1, p, columns, x, i, out + (size_t)i * out_stride, out_stride);
}

// out[i][r] = row (first + r) of m . x[i], r < PANEL.
static void multiply(const Matrix *m, int first, const Rounded *x, int rows, float *out,
                     int out_stride) {
    const size_t blocks = (size_t)(first / PANEL) * (m->columns / BLOCK);
    const uint8_t *p = m->data + blocks * panel_block_bytes(m->type);
    if (m->type == Q4_1) panel_times_rows(Q4_1, p, m->columns, x, rows, out, out_stride);
    else panel_times_rows(Q8_0, p, m->columns, x, rows, out, out_stride);
}

// One row's weights.
static void unpack(const Matrix *m, int row, float *out) {
    const int blocks = m->columns / BLOCK, r = row % PANEL;
    const uint8_t *p = m->data + (size_t)(row / PANEL) * blocks * panel_block_bytes(m->type);
    for (int b = 0; b < blocks; b++, p += panel_block_bytes(m->type), out += BLOCK) {
        const float scale = from_half(((const half *)p)[r]);
        for (int k = 0; k < BLOCK; k++) {
            if (m->type == Q4_1) {
                const uint8_t byte = p[32 + 32 * (k % 16 / 4) + 4 * r + k % 4];
                out[k] = scale * (k < 16 ? byte & 15 : byte >> 4) + from_half(((const half *)p)[PANEL + r]);
            } else {
                out[k] = scale * (int8_t)p[16 + 32 * (k / 4) + 4 * r + k % 4];
            }
        }
    }
}

// --- the parts of a layer -----------------------------------------------------------------------

static void rms_norm(const Model *m, const float *x, const float *weight, float *out) {
    vec squares = splat(0);
    for (int i = 0; i < m->hidden; i += LANES) squares = fma_(load(x + i), load(x + i), squares);
    const vec scale = splat(1.0f / sqrtf(sum(squares) / m->hidden + m->norm_eps));
    for (int i = 0; i < m->hidden; i += LANES)
        store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
}

// Turns the pairs (x[2i], x[2i+1]), as GGUF orders a head's numbers.
static void rotate(const Model *m, float *head, int position) {
    const float *c = m->cosines + (size_t)position * (m->head_dim / 2);
    const float *s = m->sines + (size_t)position * (m->head_dim / 2);
    for (int i = 0; i < m->head_dim / 2; i++) {
        const float a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * c[i] - b * s[i];
        head[2 * i + 1] = a * s[i] + b * c[i];
    }
}

// A page's keys are [head_dim, PAGE], so that a vector holds one number of several keys; its values
// are [PAGE, head_dim].
INLINE half *kv_page(const Model *m, const Batch *b, int row, int position, int layer, int value,
                     int kv_head) {
    const int page = b->tables[(size_t)b->table_rows[row] * b->table_width + position / PAGE];
    const size_t place = (((size_t)page * m->layers + layer) * 2 + value) * m->kv_heads + kv_head;
    return b->pages + place * PAGE * m->head_dim;
}

static void keep(const Model *m, const Batch *b, int row, int layer, int value, int kv_head,
                 const float *x) {
    const int position = b->positions[row], place = position % PAGE;
    half *to = kv_page(m, b, row, position, layer, value, kv_head);
    if (value)
        for (int i = 0; i < m->head_dim; i += LANES)
            store_half(to + place * m->head_dim + i, load(x + i));
    else
        for (int i = 0; i < m->head_dim; i++) to[i * PAGE + place] = to_half(x[i]);
}

enum { MAX_HEAD_DIM = 256, TOGETHER = 4, SPAN = PAGE / LANES };

// One head of `count` rows that follow each other in one conversation (`count` is a constant):
// softmax(q . keys) . values over the positions up to each row's own. `scores` [count, context].
INLINE void attend(int count, const Model *m, const Batch *b, int row, int layer, int head,
                   const float *q, int q_stride, float *out, float *scores) {
    const int first = b->positions[row], last = first + count - 1, dim = m->head_dim;
    const int kv_head = head / (m->heads / m->kv_heads), width = m->context + PAGE;
    const float scale = 1.0f / sqrtf((float)dim);
    vec highest[TOGETHER], total[TOGETHER];
    for (int i = 0; i < count; i++) highest[i] = splat(-INFINITY), total[i] = splat(0);

    for (int start = 0; start <= last; start += PAGE) {
        const half *keys = kv_page(m, b, row, start, layer, 0, kv_head);
        vec dots[TOGETHER][SPAN];
        for (int i = 0; i < count; i++)
            for (int c = 0; c < SPAN; c++) dots[i][c] = splat(0);
        for (int d = 0; d < dim; d++) {
            vec k[SPAN];
            for (int c = 0; c < SPAN; c++) k[c] = load_half(keys + d * PAGE + c * LANES);
            for (int i = 0; i < count; i++) {
                const vec x = splat(q[(size_t)i * q_stride + d]);
                for (int c = 0; c < SPAN; c++) dots[i][c] = fma_(x, k[c], dots[i][c]);
            }
        }
        for (int i = 0; i < count; i++) {
            float *to = scores + (size_t)i * width + start;
            for (int c = 0; c < SPAN; c++) store(to + c * LANES, mul(dots[i][c], splat(scale)));
            for (int t = start; t < start + PAGE; t++)
                if (t > first + i) to[t - start] = -INFINITY;  // not yet, for this row
            for (int c = 0; c < SPAN; c++) highest[i] = greater(highest[i], load(to + c * LANES));
        }
    }

    for (int i = 0; i < count; i++) {
        float parts[LANES], top = -INFINITY;
        store(parts, highest[i]);
        for (int c = 0; c < LANES; c++) top = fmaxf(top, parts[c]);
        float *s = scores + (size_t)i * width;
        for (int t = 0; t <= last; t += LANES) {
            float weights[LANES];
            store(weights, exp_(fma_(splat(-1), splat(top), load(s + t))));
            for (int c = 0; c < LANES; c++)
                if (t + c > first + i) weights[c] = 0;
            store(s + t, load(weights));
            total[i] = fma_(splat(1), load(weights), total[i]);
        }
    }

    for (int d = 0; d < dim; d += 2 * LANES) {
        vec mixed[TOGETHER][2];
        for (int i = 0; i < count; i++) mixed[i][0] = mixed[i][1] = splat(0);
        for (int start = 0; start <= last; start += PAGE) {
            const half *v = kv_page(m, b, row, start, layer, 1, kv_head) + d;
            for (int t = start; t <= last && t < start + PAGE; t++, v += dim) {
                const vec v0 = load_half(v), v1 = load_half(v + LANES);
                for (int i = 0; i < count; i++) {
                    const vec w = splat(scores[(size_t)i * width + t]);
                    mixed[i][0] = fma_(w, v0, mixed[i][0]);
                    mixed[i][1] = fma_(w, v1, mixed[i][1]);
                }
            }
        }
        for (int i = 0; i < count; i++) {
            const vec share = splat(1.0f / sum(total[i]));
            store(out + (size_t)i * dim + d, mul(mixed[i][0], share));
            store(out + (size_t)i * dim + d + LANES, mul(mixed[i][1], share));
        }
    }
}

// --- threads ------------------------------------------------------------------------------------

typedef struct {
    float *normed;     // [hidden], one row
    Rounded rounded;   // [max_rows, hidden]
    float *products;   // [2, max_rows, BLOCK], of a few panels
    float *scores;     // [TOGETHER, context + PAGE]
} Scratch;  // a thread's own

typedef struct {
    int threads;
    const Model *model;
    const Batch *batch;
    float *x, *qkv;               // [max_rows, .], shared by the threads
    Rounded attended, h;          // likewise
    int32_t *runs, run_count;     // first rows of runs of TOGETHER or 1 of one conversation
    Scratch *scratch;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    uint64_t calls;
    int closing;
    atomic_int arrived, phase;
    atomic_int *taken;  // [phases] how much of each has been taken
} Pool;

enum { PHASES_A_LAYER = 6 };

// All threads meet; they look for one another a while, then let others run.
static void barrier(Pool *pool) {
    const int phase = atomic_load_explicit(&pool->phase, memory_order_acquire);
    if (atomic_fetch_add(&pool->arrived, 1) == pool->threads - 1) {
        atomic_store(&pool->arrived, 0);
        atomic_store_explicit(&pool->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&pool->phase, memory_order_acquire) == phase; spins++) {
        if (spins > 4000) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

// The work of a phase, between two barriers, is taken in pieces by whichever thread is free: one
// that the system has put aside for a moment does not keep the others waiting for its share.
typedef struct {
    Pool *pool;
    int id, phase;
} Worker;

INLINE int grab(const Worker *w, int count, int step, int *from, int *to) {
    *from = atomic_fetch_add_explicit(&w->pool->taken[w->phase], step, memory_order_relaxed);
    *to = *from + step < count ? *from + step : count;
    return *from < count;
}

INLINE void finish(Worker *w) {
    barrier(w->pool);
    w->phase++;
}

// x[rows] normed and rounded, for this thread.
static void norm_rows(const Model *m, Scratch *own, const float *x, const int32_t *chosen, int rows,
                      const float *weight) {
    for (int i = 0; i < rows; i++) {
        rms_norm(m, x + (size_t)(chosen ? chosen[i] : i) * m->hidden, weight, own->normed);
        round_row(own->normed, m->hidden, &own->rounded, i);
    }
}

// x[i][n...] += w . input, and the end of the phase.
static void add_product(Worker *worker, const Matrix *w, const Rounded *input, int rows) {
    Pool *pool = worker->pool;
    float *out = pool->scratch[worker->id].products;
    int from, to;
    while (grab(worker, w->rows, 4 * PANEL, &from, &to))
        for (int n = from; n < to; n += PANEL) {
            multiply(w, n, input, rows, out, PANEL);
            for (int i = 0; i < rows; i++)
                for (int r = 0; r < PANEL; r++)
                    pool->x[(size_t)i * w->rows + n + r] += out[i * PANEL + r];
        }
    finish(worker);
}

static void walk(Pool *pool, int id) {
    const Model *m = pool->model;
    const Batch *b = pool->batch;
    Scratch *own = &pool->scratch[id];
    Worker me = {pool, id, 0};
    const int rows = b->rows, hidden = m->hidden, inner = m->intermediate;
    const int logit_rows = b->logit_rows;  // the batch is gone after the last barrier
    const int q_width = m->heads * m->head_dim, kv_width = m->kv_heads * m->head_dim;
    const int qkv_width = q_width + 2 * kv_width, all_heads = m->heads + 2 * m->kv_heads;
    int from, to;

    while (grab(&me, rows, 1, &from, &to)) {
        float *x = pool->x + (size_t)from * hidden;
        const int token = b->tokens[from];
        if (token >= 0) unpack(&m->embedding, token, x);
        else memcpy(x, b->embeds + (size_t)(-1 - token) * hidden, hidden * sizeof *x);
    }
    finish(&me);

    for (int l = 0; l < m->layers; l++) {
        const Layer *layer = &m->layer[l];

        norm_rows(m, own, pool->x, NULL, rows, layer->attention_norm);
        while (grab(&me, qkv_width, 8 * PANEL, &from, &to))
            for (int n = from; n < to; n += PANEL) {
                const Matrix *w = &layer->q;
                int first = n;
                if (first >= q_width) w = &layer->k, first -= q_width;
                if (w == &layer->k && first >= kv_width) w = &layer->v, first -= kv_width;
                multiply(w, first, &own->rounded, rows, pool->qkv + n, qkv_width);
            }
        finish(&me);

        // Queries and keys are turned to their positions, keys and values kept.
        while (grab(&me, rows * all_heads, all_heads, &from, &to))
            for (int u = from; u < to; u++) {
                const int i = u / all_heads, head = u % all_heads, kv = head - m->heads;
                float *x = pool->qkv + (size_t)i * qkv_width + head * m->head_dim;
                if (kv < m->kv_heads) rotate(m, x, b->positions[i]);
                if (kv >= 0) keep(m, b, i, l, kv >= m->kv_heads, kv % m->kv_heads, x);
            }
        finish(&me);

        // One head of a run of rows at a time; a head's runs in turn, for they read the same pages.
        while (grab(&me, pool->run_count * m->heads, 1, &from, &to)) {
            const int run = from % pool->run_count, head = from / pool->run_count;
            const int first = pool->runs[run], count = pool->runs[run + 1] - first;
            const float *q = pool->qkv + (size_t)first * qkv_width + head * m->head_dim;
            float mixed[TOGETHER * MAX_HEAD_DIM];
            if (count == TOGETHER)
                attend(TOGETHER, m, b, first, l, head, q, qkv_width, mixed, own->scores);
            else
                attend(1, m, b, first, l, head, q, qkv_width, mixed, own->scores);
            for (int k = 0; k < count * m->head_dim; k += BLOCK) {
                const int row = first + k / m->head_dim;
                round_block(mixed + k, q_width, &pool->attended, row,
                            head * m->head_dim + k % m->head_dim);
            }
        }
        finish(&me);

        add_product(&me, &layer->o, &pool->attended, rows);

        norm_rows(m, own, pool->x, NULL, rows, layer->mlp_norm);
        while (grab(&me, inner, BLOCK, &from, &to)) {
            float *gate = own->products, *up = gate + (size_t)rows * BLOCK;
            for (int k = 0; k < BLOCK; k += PANEL) {
                multiply(&layer->gate, from + k, &own->rounded, rows, gate + k, BLOCK);
                multiply(&layer->up, from + k, &own->rounded, rows, up + k, BLOCK);
            }
            for (int i = 0; i < rows; i++) {
                for (int k = i * BLOCK; k < (i + 1) * BLOCK; k += LANES) {
                    const vec g = load(gate + k);
                    const vec silu = divide(g, fma_(splat(1), exp_(mul(g, splat(-1))), splat(1)));
                    store(gate + k, mul(silu, load(up + k)));
                }
                round_block(gate + i * BLOCK, inner, &pool->h, i, from);
            }
        }
        finish(&me);

        add_product(&me, &layer->down, &pool->h, rows);
    }

    if (logit_rows == 0) return;
    norm_rows(m, own, pool->x, b->wanted, logit_rows, m->final_norm);
    while (grab(&me, m->vocabulary, 16 * PANEL, &from, &to))
        for (int n = from; n < to; n += PANEL)
            multiply(&m->head, n, &own->rounded, logit_rows, b->logits + n, m->vocabulary);
    finish(&me);
}

typedef struct {
    Pool *pool;
    int id;
} Start;

static void *work(void *argument) {
    const Start start = *(Start *)argument;
    free(argument);
    Pool *pool = start.pool;
    uint64_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&pool->mutex);
        while (pool->calls == seen && !pool->closing) pthread_cond_wait(&pool->wake, &pool->mutex);
        seen = pool->calls;
        const int closing = pool->closing;
        pthread_mutex_unlock(&pool->mutex);
        if (closing) return NULL;
        walk(pool, start.id);
    }
}

// --- what Python calls --------------------------------------------------------------------------

static int make_rounded(Rounded *r, size_t rows, size_t columns) {
    const size_t count = rows * PARTS * columns;
    r->codes = malloc(count);
    r->scales = malloc(count / BLOCK * sizeof(float));
    r->sums = malloc(count / BLOCK * sizeof(float));
    return r->codes && r->scales && r->sums;
}

static void free_rounded(Rounded *r) {
    free(r->codes);
    free(r->scales);
    free(r->sums);
}

void minigpt4_close(Pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pool->closing = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 1; pool->workers && i < pool->threads; i++)
        if (pool->workers[i]) pthread_join(pool->workers[i], NULL);
    for (int i = 0; pool->scratch && i < pool->threads; i++) {
        free(pool->scratch[i].normed);
        free_rounded(&pool->scratch[i].rounded);
        free(pool->scratch[i].products);
        free(pool->scratch[i].scores);
    }
    free(pool->x);
    free(pool->qkv);
    free(pool->runs);
    free(pool->taken);
    free_rounded(&pool->attended);
    free_rounded(&pool->h);
    free(pool->scratch);
    free(pool->workers);
    free(pool);
}

// GGUF's blocks, row by row, -> panels (see Matrix); both of the same size.
void minigpt4_panels(const uint8_t *from, uint8_t *to, int rows, int columns, int type) {
    const int blocks = columns / BLOCK, size = type == Q4_1 ? 20 : 34, header = size % 16;
    for (int row = 0; row < rows; row++)
        for (int b = 0; b < blocks; b++, from += size) {
            uint8_t *panel = to + ((size_t)(row / PANEL) * blocks + b) * PANEL * size;
            for (int h = 0; h < header / 2; h++)
                memcpy(panel + 2 * (h * PANEL + row % PANEL), from + 2 * h, 2);
            panel += PANEL * header;
            for (int w = 0; w < (size - header) / 4; w++)
                memcpy(panel + 4 * (w * PANEL + row % PANEL), from + header + 4 * w, 4);
        }
}

// A pool of threads for calls of at most `max_rows` rows; NULL without the memory for it.
Pool *minigpt4_open(const Model *m, int threads, int max_rows) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->threads = threads;
    pool->model = m;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    const size_t rows = max_rows, q_width = (size_t)m->heads * m->head_dim;
    const size_t qkv_width = q_width + 2 * (size_t)m->kv_heads * m->head_dim;
    pool->workers = calloc(threads, sizeof *pool->workers);
    pool->scratch = calloc(threads, sizeof *pool->scratch);
    pool->x = malloc(rows * m->hidden * sizeof(float));
    pool->qkv = malloc(rows * qkv_width * sizeof(float));
    pool->runs = malloc((rows + 1) * sizeof(int32_t));
    pool->taken = malloc((PHASES_A_LAYER * m->layers + 2) * sizeof(atomic_int));
    int good = make_rounded(&pool->attended, rows, q_width) &
               make_rounded(&pool->h, rows, m->intermediate);
    good = good && pool->workers && pool->scratch && pool->x && pool->qkv && pool->runs &&
           pool->taken;
    for (int i = 0; good && i < threads; i++) {
        Scratch *own = &pool->scratch[i];
        own->normed = malloc(m->hidden * sizeof(float));
        own->products = malloc(2 * rows * BLOCK * sizeof(float));
        own->scores = malloc(TOGETHER * (size_t)(m->context + PAGE) * sizeof(float));
        good = make_rounded(&own->rounded, rows, m->hidden) && own->normed && own->products &&
               own->scores;
    }
    for (int i = 1; good && i < threads; i++) {
        Start *start = malloc(sizeof *start);
        if (start) *start = (Start){pool, i};
        good = start && pthread_create(&pool->workers[i], NULL, work, start) == 0;
    }
    if (good) return pool;
    minigpt4_close(pool);
    return NULL;
}

// Rows TOGETHER by TOGETHER where they follow each other in one conversation, else one by one.
static void find_runs(Pool *pool, const Batch *b) {
    pool->run_count = 0;
    for (int i = 0; i < b->rows;) {
        int count = 1;
        while (count < TOGETHER && i + count < b->rows &&
               b->table_rows[i + count] == b->table_rows[i] &&
               b->positions[i + count] == b->positions[i] + count)
            count++;
        pool->runs[pool->run_count++] = i;
        i += count == TOGETHER ? TOGETHER : 1;
    }
    pool->runs[pool->run_count] = b->rows;
}

void minigpt4_forward(Pool *pool, const Batch *batch) {
    find_runs(pool, batch);
    for (int i = 0; i < PHASES_A_LAYER * pool->model->layers + 2; i++)
        atomic_store_explicit(&pool->taken[i], 0, memory_order_relaxed);
    pthread_mutex_lock(&pool->mutex);
    pool->batch = batch;
    pool->calls++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    walk(pool, 0);
}
