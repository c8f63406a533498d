// Products of rows of numbers with a matrix of blocks.
//
// The numbers are rounded to 16 bits, in blocks of 32 with a scale each. Sums of products of
// integers are exact, so their order does not matter. Floats are added block by block from the
// first column on, by every kernel. So a row's results are the same whatever other rows are in the
// call.

#pragma once
#include "blocks.h"

typedef struct {
    int16_t codes[BLOCK];
    float scale, plus;  // plus: scale times the sum of all codes
    int32_t sums[2];    // sums of the first and the last 16 codes
} Activation;

enum { MOST_CODE = 32767, SMALLEST_EXPONENT = -100 };

INLINE void round_block(const float *x, Activation *to) {
    vec most = magnitude(load(x));
    for (int i = LANES; i < BLOCK; i += LANES) most = greater(most, magnitude(load(x + i)));
    const float highest = highest_of(most);
    const float inverse = highest > 1e-30f ? MOST_CODE / highest : 0;
    for (int i = 0; i < BLOCK; i += LANES) store_rounded(to->codes + i, load(x + i) * inverse);
    for (int side = 0; side < 2; side++) {
        int32_t count = 0;
        for (int i = 0; i < BLOCK / 2; i++) count += to->codes[side * BLOCK / 2 + i];
        to->sums[side] = count;
    }
    to->scale = highest / MOST_CODE;
    to->plus = to->scale * (float)(to->sums[0] + to->sums[1]);
}

INLINE void round_row(const float *x, int columns, Activation *to) {
    for (int column = 0; column < columns; column += BLOCK) round_block(x + column, to++);
}

enum { VECTORS = 2, MOST_ROWS = 4, VECTORS_A_PANEL = PANEL / LANES };

// Scales the sums of a block's products and adds them to the totals.
INLINE void add_scaled(int kind, int count, const ivec dots[VECTORS][MOST_ROWS],
                       const Scales scales[VECTORS], const Activation *const x[MOST_ROWS], int part,
                       vec total[MOST_ROWS][VECTORS_A_PANEL], int first) {
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        const int32_t sum = has_halves(kind) ? x[i]->sums[part] : x[i]->sums[0] + x[i]->sums[1];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            ivec dot = dots[v][i];
            if (offset_of(kind)) dot -= offset_of(kind) * sum;
            const vec own = part ? scales[v].second : scales[v].first;
            vec *to = &total[i][first + v];
            *to = fma_(to_floats(dot), own * x[i]->scale, *to);
            if (has_minimums(kind)) *to = fma_(scales[v].second, splat(x[i]->plus), *to);
        }
    }
}

// out[i][r] (+)= row r of the panel . x[i], i < count, r < PANEL, over `blocks` of its columns.
// `kind` and `count` are constants; `stride` blocks lie between the rows of x.
KERNEL void panel_times(int kind, int count, const uint8_t *panel, int blocks, const Activation *x,
                        int stride, float *out, int go_on) {
    vec total[MOST_ROWS][VECTORS_A_PANEL];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS_A_PANEL; v++)
            total[i][v] = go_on ? load(out + i * PANEL + v * LANES) : splat(0);
    for (int b = 0; b < blocks; b++, x++) {
        const Place place = place_of(kind, panel, b);
        const Activation *const each[MOST_ROWS] = {x, x + stride, x + 2 * stride, x + 3 * stride};
#pragma GCC unroll 1
        for (int first = 0; first < VECTORS_A_PANEL; first += VECTORS) {
            Scales scales[VECTORS];
            ivec dots[VECTORS][MOST_ROWS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                scales[v] = scales_of(kind, place, (first + v) * LANES);
#pragma GCC unroll 4
                for (int i = 0; i < MOST_ROWS; i++) dots[v][i] = (ivec){0};
            }
#define STEP(pair)                                                                                \
    {                                                                                             \
        const ivec w0 = codes_of(kind, place.body, first * LANES, pair);                          \
        const ivec w1 = codes_of(kind, place.body, (first + 1) * LANES, pair);                    \
        _Pragma("GCC unroll 4") for (int i = 0; i < count; i++) {                                 \
            const ivec numbers = splat_pair(each[i]->codes + 2 * pair);                           \
            dots[0][i] = dot2(dots[0][i], w0, numbers);                                           \
            dots[1][i] = dot2(dots[1][i], w1, numbers);                                           \
        }                                                                                         \
    }
            FIRST_PAIRS(STEP)
            if (has_halves(kind)) {
                add_scaled(kind, count, dots, scales, each, 0, total, first);
#pragma GCC unroll 4
                for (int i = 0; i < MOST_ROWS; i++) dots[0][i] = dots[1][i] = (ivec){0};
            }
            LAST_PAIRS(STEP)
            add_scaled(kind, count, dots, scales, each, has_halves(kind), total, first);
#undef STEP
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS_A_PANEL; v++) store(out + i * PANEL + v * LANES, total[i][v]);
}

#define panel_times_rows(kind, panel, blocks, x, stride, rows, out, go_on)                        \
    do {                                                                                          \
        int i = 0;                                                                                \
        for (; i + 4 <= rows; i += 4)                                                             \
            panel_times(kind, 4, panel, blocks, x + (size_t)i * stride, stride, out + i * PANEL,  \
                        go_on);                                                                   \
        for (; i + 2 <= rows; i += 2)                                                             \
            panel_times(kind, 2, panel, blocks, x + (size_t)i * stride, stride, out + i * PANEL,  \
                        go_on);                                                                   \
        if (i < rows)                                                                             \
            panel_times(kind, 1, panel, blocks, x + (size_t)i * stride, stride, out + i * PANEL,  \
                        go_on);                                                                   \
    } while (0)

// The same for F16 and F32: products of floats, in the order of the columns.
INLINE void panel_times_floats(int kind, const uint8_t *panel, int blocks, const Activation *x,
                               float *out) {
    for (int v = 0; v < PANEL; v += LANES) {
        vec total = splat(0);
        for (int b = 0; b < blocks; b++) {
            vec dot = splat(0);
            for (int c = 0; c < BLOCK; c++) {
                const size_t place = (size_t)(b * BLOCK + c) * PANEL + v;
                const vec w = kind == F32 ? load((const float *)panel + place)
                                          : load_half((const half *)panel + place);
                dot = fma_(w, splat((float)x[b].codes[c]), dot);
            }
            total = fma_(dot, splat(x[b].scale), total);
        }
        store(out + v, total);
    }
}

// With more rows than this, a panel is unpacked once for all of them, TILE_BLOCKS blocks at a time.
enum { TILE_BLOCKS = 32 };
#if defined(MINIGPT4_AVX512) || defined(MINIGPT4_AVX2)
enum { DIRECT_ROWS = 8 };
#else
enum { DIRECT_ROWS = 0 };
#endif

static void multiply_unpacked(const Matrix *m, const uint8_t *panel, const Activation *x, int rows,
                              float *out, uint8_t *tile) {
    const int blocks = m->columns / BLOCK;
    for (int first = 0; first < blocks; first += TILE_BLOCKS) {
        const int count = blocks - first < TILE_BLOCKS ? blocks - first : TILE_BLOCKS;
        FOR_KIND(m->kind, fill_tile, panel, first, count, tile);
        const Activation *from = x + first;
        if (has_halves(m->kind))
            panel_times_rows(TILE_HALVES, tile, count, from, blocks, rows, out, first > 0);
        else if (has_minimums(m->kind))
            panel_times_rows(TILE_MINIMUMS, tile, count, from, blocks, rows, out, first > 0);
        else
            panel_times_rows(TILE, tile, count, from, blocks, rows, out, first > 0);
    }
}

// out[i][r] = row r of a panel of m . x[i], i < rows, r < PANEL; `tile`: TILE_BLOCKS * TILE_BYTES.
static void multiply(const Matrix *m, int number, const Activation *x, int rows, float *out,
                     uint8_t *tile) {
    const int blocks = m->columns / BLOCK;
    const uint8_t *panel = m->data + number * panel_bytes(m->kind, m->columns);
    if (is_float(m->kind))
        for (int i = 0; i < rows; i++, x += blocks, out += PANEL) {
            if (m->kind == F32) panel_times_floats(F32, panel, blocks, x, out);
            else panel_times_floats(F16, panel, blocks, x, out);
        }
    else if (rows > DIRECT_ROWS) multiply_unpacked(m, panel, x, rows, out, tile);
#if defined(MINIGPT4_AVX512) || defined(MINIGPT4_AVX2)
    else FOR_KIND(m->kind, panel_times_rows, panel, blocks, x, blocks, rows, out, 0);
#endif
}

// Row `row` of m as floats [columns].
void minigpt4_unpack(const Matrix *m, int row, float *out) {
    const uint8_t *panel = m->data + row / PANEL * panel_bytes(m->kind, m->columns);
    if (is_float(m->kind)) unpack_floats(m->kind, panel, m->columns, row % PANEL, out);
    else FOR_KIND(m->kind, unpack_row, panel, m->columns, row % PANEL, out);
}

// `rows` rows in GGUF's order, of `file_columns` weights, -> row `to` of m and the following.
void minigpt4_pack(const Matrix *m, const uint8_t *from, int file_columns, int to, int rows) {
    const int size = m->kind == F32 ? 4 : 2;
    for (int row = to; row < to + rows; row++) {
        uint8_t *panel = (uint8_t *)m->data + row / PANEL * panel_bytes(m->kind, m->columns);
        if (is_float(m->kind)) {
            pack_floats(size, from, file_columns, panel, row % PANEL);
            from += (size_t)file_columns * size;
        } else {
            FOR_KIND(m->kind, pack_row, from, m->columns, panel, row % PANEL);
            from += (size_t)m->columns / BLOCK / blocks_a_header(m->kind) * file_bytes(m->kind);
        }
    }
}
