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
    half *pages;                // [page, layer, key or value, kv_head, PAGE, head_dim]
    float *logits;              // [logit_rows, vocabulary]
} Batch;

// --- products with a matrix of blocks -----------------------------------------------------------

// What is multiplied with weights is rounded to 8 bits, in blocks of 32 numbers with one scale.
typedef struct {
    int8_t *codes;  // [rows, columns]
    float *scales;  // [rows, columns / BLOCK]
    float *sums;    // [rows, columns / BLOCK], of the rounded numbers
} Rounded;

INLINE void round_block(const float *x, int8_t *codes, float *scale, float *total) {
    float highest = 0;
    for (int i = 0; i < BLOCK; i++) highest = fmaxf(highest, fabsf(x[i]));
    const float inverse = highest > 0 ? 127.0f / highest : 0;
    int32_t count = 0;
    for (int i = 0; i < BLOCK; i++) {
        const int32_t code = (int32_t)rintf(x[i] * inverse);
        codes[i] = (int8_t)code;
        count += code;
    }
    *scale = highest / 127.0f;
    *total = *scale * (float)count;
}

INLINE void round_row(const float *x, int columns, const Rounded *to, int row) {
    const int blocks = columns / BLOCK;
    for (int b = 0; b < blocks; b++)
        round_block(x + b * BLOCK, to->codes + (size_t)row * columns + b * BLOCK,
                    to->scales + (size_t)row * blocks + b, to->sums + (size_t)row * blocks + b);
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

// out[i][r] = row r of the panel at p . input row (first + i); `count` and `type` are constants.
INLINE void panel_times(int type, int count, const uint8_t *p, int columns, const Rounded *x,
                        int first, float *out, int out_stride) {
    enum { MOST = 4 };
    const int blocks = columns / BLOCK;
    const int8_t *codes = x->codes + (size_t)first * columns;
    const float *scales = x->scales + (size_t)first * blocks;
    const float *sums = x->sums + (size_t)first * blocks;
    __m256 total[MOST];
    for (int i = 0; i < count; i++) total[i] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++, p += panel_block_bytes(type), codes += BLOCK) {
        const vec scale = load_half((const half *)p);
        __m256i dots[MOST];
        for (int i = 0; i < count; i++) dots[i] = _mm256_setzero_si256();
        if (type == Q4_1) {
            const vec minimum = load_half((const half *)(p + 16));
            const __m256i low_bits = _mm256_set1_epi8(15);
            for (int j = 0; j < 4; j++) {
                const __m256i w = _mm256_loadu_si256((const __m256i *)(p + 32 + 32 * j));
                const __m256i low = _mm256_and_si256(w, low_bits);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), low_bits);
                for (int i = 0; i < count; i++) {
                    const int8_t *c = codes + (size_t)i * columns + 4 * j;
                    dots[i] = dot4_small(dots[i], low, four(c));
                    dots[i] = dot4_small(dots[i], high, four(c + 16));
                }
            }
            for (int i = 0; i < count; i++) {
                const vec d = _mm256_cvtepi32_ps(widen(dots[i]));
                total[i] = fma_(d, mul(scale, splat(scales[i * blocks + b])), total[i]);
                total[i] = fma_(minimum, splat(sums[i * blocks + b]), total[i]);
            }
        } else {
            for (int j = 0; j < 8; j++) {
                const __m256i w = _mm256_loadu_si256((const __m256i *)(p + 16 + 32 * j));
                const __m256i size = _mm256_abs_epi8(w);
                for (int i = 0; i < count; i++)
                    dots[i] = dot4(dots[i], size,
                                   _mm256_sign_epi8(four(codes + (size_t)i * columns + 4 * j), w));
            }
            for (int i = 0; i < count; i++) {
                const vec d = _mm256_cvtepi32_ps(dots[i]);
                total[i] = fma_(d, mul(scale, splat(scales[i * blocks + b])), total[i]);
            }
        }
    }
    for (int i = 0; i < count; i++) store(out + (size_t)i * out_stride, total[i]);
}
#else
INLINE void panel_times(int type, int count, const uint8_t *p, int columns, const Rounded *x,
                        int first, float *out, int out_stride) {
    const int blocks = columns / BLOCK;
    for (int i = 0; i < count; i++, first++, out += out_stride) {
        float total[PANEL] = {0};
        const uint8_t *q = p;
        for (int b = 0; b < blocks; b++, q += panel_block_bytes(type)) {
            const int8_t *codes = x->codes + (size_t)first * columns + b * BLOCK;
            const float scale = x->scales[(size_t)first * blocks + b];
            const float plus = x->sums[(size_t)first * blocks + b];
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
                total[r] += (float)dots[r] * (from_half(scales[r]) * scale);
                if (type == Q4_1) total[r] += from_half(scales[PANEL + r]) * plus;
            }
        }
        memcpy(out, total, sizeof total);
    }
}
#endif

INLINE void panel_times_rows(int type, const uint8_t *p, int columns, const Rounded *x, int rows,
                             float *out, int out_stride) {
    int i = 0;
    for (; i + 4 <= rows; i += 4)
        panel_times(type, 4, p, columns, x, i, out + (size_t)i * out_stride, out_stride);
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

INLINE half *kv_page(const Model *m, const Batch *b, int row, int position, int layer, int value,
                     int kv_head) {
    const int page = b->tables[(size_t)b->table_rows[row] * b->table_width + position / PAGE];
    const size_t place = (((size_t)page * m->layers + layer) * 2 + value) * m->kv_heads + kv_head;
    return b->pages + place * PAGE * m->head_dim;
}

static void keep(const Model *m, const Batch *b, int row, int layer, int value, int kv_head,
                 const float *x) {
    const int position = b->positions[row];
    half *to = kv_page(m, b, row, position, layer, value, kv_head);
    to += (position % PAGE) * m->head_dim;
    for (int i = 0; i < m->head_dim; i += LANES) store_half(to + i, load(x + i));
}

enum { MAX_HEAD_DIM = 256 };

// One row's one head: softmax(q . keys) . values over the positions up to the row's own.
static void attend(const Model *m, const Batch *b, int row, int layer, int head, const float *q,
                   float *out, float *scores) {
    const int last = b->positions[row], kv_head = head / (m->heads / m->kv_heads);
    const float scale = 1.0f / sqrtf((float)m->head_dim);
    float highest = -INFINITY;
    for (int start = 0; start <= last; start += PAGE) {
        const half *k = kv_page(m, b, row, start, layer, 0, kv_head);
        for (int t = start; t <= last && t < start + PAGE; t++, k += m->head_dim) {
            vec dot = splat(0);
            for (int i = 0; i < m->head_dim; i += LANES)
                dot = fma_(load(q + i), load_half(k + i), dot);
            scores[t] = sum(dot) * scale;
            if (scores[t] > highest) highest = scores[t];
        }
    }
    float total = 0;
    for (int t = 0; t <= last; t++) total += scores[t] = expf(scores[t] - highest);
    vec mixed[MAX_HEAD_DIM / LANES];
    for (int i = 0; i < m->head_dim / LANES; i++) mixed[i] = splat(0);
    for (int start = 0; start <= last; start += PAGE) {
        const half *v = kv_page(m, b, row, start, layer, 1, kv_head);
        for (int t = start; t <= last && t < start + PAGE; t++, v += m->head_dim)
            for (int i = 0; i < m->head_dim / LANES; i++)
                mixed[i] = fma_(splat(scores[t]), load_half(v + i * LANES), mixed[i]);
    }
    for (int i = 0; i < m->head_dim / LANES; i++)
        store(out + i * LANES, mul(mixed[i], splat(1.0f / total)));
}

// --- threads ------------------------------------------------------------------------------------

typedef struct {
    float *normed;     // [hidden], one row
    Rounded rounded;   // [max_rows, hidden]
    float *products;   // [2, max_rows, BLOCK], of a few panels
    float *scores;     // [context]
} Scratch;  // a thread's own

typedef struct {
    int threads;
    const Model *model;
    const Batch *batch;
    float *x, *qkv;               // [max_rows, .], shared by the threads
    Rounded attended, h;          // likewise
    Scratch *scratch;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    uint64_t calls;
    int closing;
    atomic_int arrived, phase;
} Pool;

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

// Thread `id`'s part of `count` things, in whole steps.
INLINE void share(const Pool *pool, int id, int count, int step, int *from, int *to) {
    const int steps = count / step;
    *from = (int)((int64_t)steps * id / pool->threads) * step;
    *to = (int)((int64_t)steps * (id + 1) / pool->threads) * step;
}

// x[rows] normed and rounded, for this thread.
static void norm_rows(const Model *m, Scratch *own, const float *x, const int32_t *chosen, int rows,
                      const float *weight) {
    for (int i = 0; i < rows; i++) {
        rms_norm(m, x + (size_t)(chosen ? chosen[i] : i) * m->hidden, weight, own->normed);
        round_row(own->normed, m->hidden, &own->rounded, i);
    }
}

// x[i][n...] += w . input, over this thread's part of w's rows.
static void add_product(Pool *pool, int id, const Matrix *w, const Rounded *input, int rows) {
    float *out = pool->scratch[id].products;
    int from, to;
    share(pool, id, w->rows, PANEL, &from, &to);
    for (int n = from; n < to; n += PANEL) {
        multiply(w, n, input, rows, out, PANEL);
        for (int i = 0; i < rows; i++)
            for (int r = 0; r < PANEL; r++)
                pool->x[(size_t)i * w->rows + n + r] += out[i * PANEL + r];
    }
}

static void walk(Pool *pool, int id) {
    const Model *m = pool->model;
    const Batch *b = pool->batch;
    Scratch *own = &pool->scratch[id];
    const int rows = b->rows, hidden = m->hidden, inner = m->intermediate;
    const int logit_rows = b->logit_rows;  // the batch is gone after the last barrier
    const int q_width = m->heads * m->head_dim, kv_width = m->kv_heads * m->head_dim;
    const int qkv_width = q_width + 2 * kv_width, all_heads = m->heads + 2 * m->kv_heads;
    int from, to;

    share(pool, id, rows, 1, &from, &to);
    for (int i = from; i < to; i++) {
        float *x = pool->x + (size_t)i * hidden;
        if (b->tokens[i] >= 0) unpack(&m->embedding, b->tokens[i], x);
        else memcpy(x, b->embeds + (size_t)(-1 - b->tokens[i]) * hidden, hidden * sizeof *x);
    }
    barrier(pool);

    for (int l = 0; l < m->layers; l++) {
        const Layer *layer = &m->layer[l];

        norm_rows(m, own, pool->x, NULL, rows, layer->attention_norm);
        share(pool, id, qkv_width, PANEL, &from, &to);
        for (int n = from; n < to; n += PANEL) {
            const Matrix *w = &layer->q;
            int first = n;
            if (first >= q_width) w = &layer->k, first -= q_width;
            if (w == &layer->k && first >= kv_width) w = &layer->v, first -= kv_width;
            multiply(w, first, &own->rounded, rows, pool->qkv + n, qkv_width);
        }
        barrier(pool);

        // Queries and keys are turned to their positions, keys and values kept.
        share(pool, id, rows * all_heads, 1, &from, &to);
        for (int u = from; u < to; u++) {
            const int i = u / all_heads, head = u % all_heads, kv = head - m->heads;
            float *x = pool->qkv + (size_t)i * qkv_width + head * m->head_dim;
            if (kv < m->kv_heads) rotate(m, x, b->positions[i]);
            if (kv >= 0) keep(m, b, i, l, kv >= m->kv_heads, kv % m->kv_heads, x);
        }
        barrier(pool);

        // One head of one row at a time; a head's rows in turn, for they read the same pages.
        share(pool, id, rows * m->heads, 1, &from, &to);
        for (int u = from; u < to; u++) {
            const int i = u % rows, head = u / rows;
            float mixed[MAX_HEAD_DIM];
            attend(m, b, i, l, head, pool->qkv + (size_t)i * qkv_width + head * m->head_dim, mixed,
                   own->scores);
            const size_t place = (size_t)i * q_width + head * m->head_dim;
            for (int k = 0; k < m->head_dim; k += BLOCK)
                round_block(mixed + k, pool->attended.codes + place + k,
                            pool->attended.scales + (place + k) / BLOCK,
                            pool->attended.sums + (place + k) / BLOCK);
        }
        barrier(pool);

        add_product(pool, id, &layer->o, &pool->attended, rows);
        barrier(pool);

        norm_rows(m, own, pool->x, NULL, rows, layer->mlp_norm);
        share(pool, id, inner, BLOCK, &from, &to);
        for (int n = from; n < to; n += BLOCK) {
            float *gate = own->products, *up = gate + (size_t)rows * BLOCK;
            for (int k = 0; k < BLOCK; k += PANEL) {
                multiply(&layer->gate, n + k, &own->rounded, rows, gate + k, BLOCK);
                multiply(&layer->up, n + k, &own->rounded, rows, up + k, BLOCK);
            }
            for (int i = 0; i < rows; i++) {
                for (int k = i * BLOCK; k < (i + 1) * BLOCK; k++)
                    gate[k] = gate[k] / (1.0f + expf(-gate[k])) * up[k];
                const size_t place = (size_t)i * inner + n;
                round_block(gate + i * BLOCK, pool->h.codes + place, pool->h.scales + place / BLOCK,
                            pool->h.sums + place / BLOCK);
            }
        }
        barrier(pool);

        add_product(pool, id, &layer->down, &pool->h, rows);
        barrier(pool);
    }

    if (logit_rows == 0) return;
    norm_rows(m, own, pool->x, b->wanted, logit_rows, m->final_norm);
    share(pool, id, m->vocabulary, PANEL, &from, &to);
    for (int n = from; n < to; n += PANEL)
        multiply(&m->head, n, &own->rounded, logit_rows, b->logits + n, m->vocabulary);
    barrier(pool);
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
    r->codes = malloc(rows * columns);
    r->scales = malloc(rows * columns / BLOCK * sizeof(float));
    r->sums = malloc(rows * columns / BLOCK * sizeof(float));
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
    free_rounded(&pool->attended);
    free_rounded(&pool->h);
    free(pool->scratch);
    free(pool->workers);
    free(pool);
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
    int good = make_rounded(&pool->attended, rows, q_width) &
               make_rounded(&pool->h, rows, m->intermediate);
    good = good && pool->workers && pool->scratch && pool->x && pool->qkv;
    for (int i = 0; good && i < threads; i++) {
        Scratch *own = &pool->scratch[i];
        own->normed = malloc(m->hidden * sizeof(float));
        own->products = malloc(2 * rows * BLOCK * sizeof(float));
        own->scores = malloc(m->context * sizeof(float));
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

void minigpt4_forward(Pool *pool, const Batch *batch) {
    pthread_mutex_lock(&pool->mutex);
    pool->batch = batch;
    pool->calls++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    walk(pool, 0);
}
