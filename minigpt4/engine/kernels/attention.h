// Rotary positions, pages of keys and values, and attention over them.

#pragma once
#include "model.h"

// Rotates a head's pairs of numbers by their position's angles. A pair is two neighbours (Llama's
// GGUF files), or a number and the one half a head further on (Qwen2's).
static void rotate(const Model *m, float *head, int position) {
    const int count = m->head_dim / 2, step = m->rope_halves ? 1 : 2;
    const int other = m->rope_halves ? count : 1;
    const float *c = m->cosines + (size_t)position * count;
    const float *s = m->sines + (size_t)position * count;
    for (int i = 0; i < count; i++) {
        float *x = head + step * i;
        const float a = x[0], b = x[other];
        x[0] = a * c[i] - b * s[i];
        x[other] = a * s[i] + b * c[i];
    }
}

// A page's keys are [head_width, PAGE], so that a vector holds one number of several keys; its
// values are [PAGE, head_width]. Numbers of 16 bits are floats. Those of 8 bits are integers; the
// scales of each key's or value's blocks follow a page's numbers: [head_width / BLOCK, PAGE] or
// [PAGE, head_width / BLOCK] floats of 16 bits.
INLINE size_t page_bytes(const Model *m) {
    const size_t numbers = (size_t)PAGE * m->head_width;
    return m->kv_bits == 8 ? numbers + numbers / BLOCK * sizeof(half) : numbers * sizeof(half);
}

INLINE uint8_t *kv_page(const Model *m, const Batch *b, int row, int position, int layer, int value,
                        int kv_head) {
    const int page = b->tables[(size_t)b->table_rows[row] * b->table_width + position / PAGE];
    const size_t place = (((size_t)page * m->layers + layer) * 2 + value) * m->kv_heads + kv_head;
    return b->pages + place * page_bytes(m);
}

INLINE half *page_scales(const Model *m, uint8_t *page) {
    return (half *)(page + (size_t)PAGE * m->head_width);
}

// Writes BLOCK numbers as integers from -127 to 127, `stride` apart. Returns their scale, which is
// not finite if a number is not.
static half keep_block(const float *x, int8_t *to, int stride) {
    float most = 0;
    for (int i = 0; i < BLOCK; i++) {
        const float size = fabsf(x[i]);
        if (size > most || size != size) most = size;
    }
    const half kept = to_half(most / 127);
    const float scale = from_half(kept), inverse = scale > 0 ? 1 / scale : 0;
    for (int i = 0; i < BLOCK; i++) {
        const float n = rintf(x[i] * inverse);
        to[i * stride] = (int8_t)(n < 127 ? n > -127 ? n : -127 : 127);
    }
    return kept;
}

static void keep(const Model *m, const Batch *b, int row, int layer, int value, int kv_head,
                 const float *x) {
    const int position = b->positions[row], place = position % PAGE;
    const int width = m->head_width, blocks = width / BLOCK;
    uint8_t *page = kv_page(m, b, row, position, layer, value, kv_head);
    half *to = (half *)page;
    if (m->kv_bits == 8) {
        half *scales = page_scales(m, page);
        for (int i = 0; i < blocks; i++) {
            const int first = i * BLOCK;
            int8_t *block = (int8_t *)page + (value ? place * width + first : first * PAGE + place);
            scales[value ? place * blocks + i : i * PAGE + place] =
                keep_block(x + first, block, value ? 1 : PAGE);
        }
    } else if (value) {
        for (int i = 0; i < width; i += LANES) store_half(to + place * width + i, load(x + i));
    } else {
        for (int i = 0; i < m->head_dim; i++) to[i * PAGE + place] = to_half(x[i]);
    }
}

// Queries that share keys and values. `step` 0: several heads of one row; 1: one head of
// consecutive rows. Query i is at q + i * q_stride and attends to positions up to first + i *
// step.
typedef struct {
    const float *q;
    float *out;
    size_t q_stride, out_stride;
    int row, kv_head, first, step;
} Queries;

enum { TOGETHER = LANES / 2, SPAN = PAGE / LANES };

// LANES numbers of a page from the i-th on, those of 8 bits without their scale.
INLINE vec load_kept(const uint8_t *page, size_t i, int bits) {
    return bits == 8 ? load_signed8((const int8_t *)page + i) : load_half((const half *)page + i);
}

// scores[i][t] = q[i] . key[t] / sqrt(head_dim), and each query's highest score.
INLINE void score(int count, int bits, const Model *m, const Batch *b, int layer, const Queries *own,
                  float *scores, int width, float *highest) {
    const int last = own->first + (count - 1) * own->step;
    const float scale = 1.0f / sqrtf((float)m->head_dim);
    vec most[TOGETHER];
    for (int i = 0; i < count; i++) most[i] = splat(-INFINITY);
    for (int start = 0; start <= last; start += PAGE) {
        uint8_t *keys = kv_page(m, b, own->row, start, layer, 0, own->kv_head);
        const half *scales = page_scales(m, keys);
        vec dots[TOGETHER][SPAN], block_scales[SPAN];
        for (int i = 0; i < count; i++)
            for (int c = 0; c < SPAN; c++) dots[i][c] = splat(0);
        for (int d = 0; d < m->head_dim; d++) {
            vec k[SPAN];
            if (bits == 8 && d % BLOCK == 0)
                for (int c = 0; c < SPAN; c++)
                    block_scales[c] = load_half(scales + d / BLOCK * PAGE + c * LANES);
            for (int c = 0; c < SPAN; c++) {
                k[c] = load_kept(keys, d * PAGE + c * LANES, bits);
                if (bits == 8) k[c] *= block_scales[c];
            }
            for (int i = 0; i < count; i++) {
                const vec x = splat(own->q[i * own->q_stride + d]);
                for (int c = 0; c < SPAN; c++) dots[i][c] = fma_(x, k[c], dots[i][c]);
            }
        }
        for (int i = 0; i < count; i++) {
            float *to = scores + (size_t)i * width + start;
            for (int c = 0; c < SPAN; c++) store(to + c * LANES, dots[i][c] * scale);
            for (int t = own->first + i * own->step + 1; t < start + PAGE; t++)
                if (t >= start) to[t - start] = -INFINITY;  // not yet, for this query
            for (int c = 0; c < SPAN; c++) most[i] = greater(most[i], load(to + c * LANES));
        }
    }
    for (int i = 0; i < count; i++) highest[i] = highest_of(most[i]);
}

// scores -> e^(score - highest), 0 at positions that a query does not attend to. Returns their sum.
INLINE float weigh(float *scores, float highest, int limit, int last) {
    vec total = splat(0);
    for (int t = 0; t <= last; t += LANES) {
        vec weights = exp_(load(scores + t) - highest);
        store(scores + t, weights);
        if (t + LANES - 1 > limit) {
            for (int c = 0; c < LANES; c++)
                if (t + c > limit) scores[t + c] = 0;
            weights = load(scores + t);
        }
        total += weights;
    }
    return sum(total);
}

// softmax(q . keys) . values for `count` queries. `count` and `bits` are constants.
INLINE void attend(int count, int bits, const Model *m, const Batch *b, int layer, const Queries *own,
                   float *scores) {
    const int last = own->first + (count - 1) * own->step, width = m->context + PAGE;
    const int dim = m->head_width;
    float highest[TOGETHER], shares[TOGETHER];
    score(count, bits, m, b, layer, own, scores, width, highest);
    for (int i = 0; i < count; i++)
        shares[i] = 1.0f / weigh(scores + (size_t)i * width, highest[i],
                                 own->first + i * own->step, last);
    for (int d = 0; d < dim; d += 2 * LANES) {
        vec mixed[TOGETHER][2];
        for (int i = 0; i < count; i++) mixed[i][0] = mixed[i][1] = splat(0);
        for (int start = 0; start <= last; start += PAGE) {
            uint8_t *v = kv_page(m, b, own->row, start, layer, 1, own->kv_head);
            const half *scales = page_scales(m, v);
            for (int t = start; t <= last && t < start + PAGE; t++) {
                const size_t at = (size_t)(t - start) * dim + d;
                vec v0 = load_kept(v, at, bits), v1 = load_kept(v, at + LANES, bits);
                if (bits == 8) {  // 2 * LANES are a block, or half of one
                    const float scale = from_half(scales[at / BLOCK]);
                    v0 *= scale, v1 *= scale;
                }
                for (int i = 0; i < count; i++) {
                    const vec w = splat(scores[(size_t)i * width + t]);
                    mixed[i][0] = fma_(w, v0, mixed[i][0]);
                    mixed[i][1] = fma_(w, v1, mixed[i][1]);
                }
            }
        }
        for (int i = 0; i < count; i++) {
            store(own->out + i * own->out_stride + d, mixed[i][0] * shares[i]);
            store(own->out + i * own->out_stride + d + LANES, mixed[i][1] * shares[i]);
        }
    }
}

// The same for any number of queries, as many together as the registers allow.
INLINE void attend_some(int bits, const Model *m, const Batch *b, int layer, Queries own, int count,
                        float *scores) {
    while (count > 0) {
        const int n = count >= TOGETHER ? TOGETHER : count >= 4 ? 4 : count >= 2 ? 2 : 1;
        if (n == TOGETHER) attend(TOGETHER, bits, m, b, layer, &own, scores);
        else if (n == 4) attend(4, bits, m, b, layer, &own, scores);
        else if (n == 2) attend(2, bits, m, b, layer, &own, scores);
        else attend(1, bits, m, b, layer, &own, scores);
        count -= n;
        own.q += n * own.q_stride;
        own.out += n * own.out_stride;
        own.first += n * own.step;
        own.row += n * own.step;
    }
}

static void attend_all(const Model *m, const Batch *b, int layer, Queries own, int count,
                       float *scores) {
    if (m->kv_bits == 8) attend_some(8, m, b, layer, own, count, scores);
    else attend_some(16, m, b, layer, own, count, scores);
}
