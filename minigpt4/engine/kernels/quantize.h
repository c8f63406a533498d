// Floats -> GGUF's blocks. For each block, many scales (and minimums) are tried: the rounding with
// the least weighted squared error is kept, with the scale that fits its codes best.
//
// A weight's error counts in proportion to its size plus the root mean square of its part of the
// row, since a large weight affects an output more.

#pragma once
#include "blocks.h"

enum { HALF_BLOCK = 16, ROUNDINGS = 20, REFINEMENTS = 2 };

INLINE int clamp(int n, int low, int high) { return n < low ? low : n > high ? high : n; }

static void importances(const float *x, int count, float *weights) {
    float squares = 0;
    for (int i = 0; i < count; i++) squares += x[i] * x[i];
    const float root = sqrtf(squares / count);
    for (int i = 0; i < count; i++) weights[i] = root + fabsf(x[i]);
}

// x is approximately scale * code + minimum.
typedef struct {
    float scale, minimum, error;
} Line;

// The data for fits of 32 numbers that do not depend on their codes.
typedef struct {
    const float *x, *weights;
    float low, high, w, wx, wxx;  // w: the sum of the weights; wx: of weight times x ...
    int most;                     // the highest code
} Block;

static Block block_of(const float *x, const float *weights, int most) {
    Block b = {.x = x, .weights = weights, .low = x[0], .high = x[0], .most = most};
    vec w = splat(0), wx = w, wxx = w;
    for (int i = 0; i < BLOCK; i += LANES) {
        const vec product = load(weights + i) * load(x + i);
        w += load(weights + i);
        wx += product;
        wxx = fma_(product, load(x + i), wxx);
    }
    for (int i = 1; i < BLOCK; i++) {
        b.low = x[i] < b.low ? x[i] : b.low;
        b.high = x[i] > b.high ? x[i] : b.high;
    }
    b.w = sum(w), b.wx = sum(wx), b.wxx = sum(wxx);
    return b;
}

INLINE vec codes_for(const Block *b, int i, float inverse, float minimum) {
    const vec scaled = (load(b->x + i) - minimum) * inverse;
    return smaller(greater(nearest(scaled), splat(0)), splat(b->most));
}

// Round with one line, and fit the best line to the codes. no_plus: the minimum is at most 0.
static Line refit(const Block *b, float inverse, float minimum, int no_plus) {
    vec wq_ = splat(0), wqq_ = wq_, wqx_ = wq_;
    for (int i = 0; i < BLOCK; i += LANES) {
        const vec q = codes_for(b, i, inverse, minimum), weighted = load(b->weights + i) * q;
        wq_ += weighted;
        wqq_ = fma_(weighted, q, wqq_);
        wqx_ = fma_(weighted, load(b->x + i), wqx_);
    }
    const float wq = sum(wq_), wqq = sum(wqq_), wqx = sum(wqx_);
    const float determinant = b->w * wqq - wq * wq;
    Line line = {0, 0, b->wxx};
    if (determinant > 0) {
        line.scale = (b->w * wqx - wq * b->wx) / determinant;
        line.minimum = (wqq * b->wx - wq * wqx) / determinant;
    }
    if ((determinant <= 0 || (no_plus && line.minimum > 0)) && wqq > 0) {
        line.scale = wqx / wqq;
        line.minimum = 0;
    }
    const float s = line.scale, m = line.minimum;
    line.error = b->wxx + s * s * wqq + m * m * b->w + 2 * (s * m * wq - s * wqx - m * b->wx);
    return line;
}

static Line fit_line(const Block *b, int no_plus) {
    const float low = no_plus && b->low > 0 ? 0 : b->low, range = b->high - low;
    if (!(range > 0)) return (Line){0, low, 0};
    Line best = {0, 0, INFINITY};
    for (int i = 0; i <= ROUNDINGS; i++) {
        const Line line = refit(b, (b->most + 0.1f * (i - ROUNDINGS / 2)) / range, low, no_plus);
        if (line.scale > 0 && line.error < best.error) best = line;
    }
    for (int i = 0; i < REFINEMENTS && best.scale > 0; i++) {
        const Line line = refit(b, 1 / best.scale, best.minimum, no_plus);
        if (!(line.scale > 0 && line.error < best.error)) break;
        best = line;
    }
    return best.scale > 0 ? best : (Line){range / b->most, low, 0};
}

static float error_of(const Block *b, float scale, float minimum) {
    const float inverse = scale ? 1 / scale : 0;
    vec error = splat(0);
    for (int i = 0; i < BLOCK; i += LANES) {
        const vec q = codes_for(b, i, inverse, minimum);
        const vec off = fma_(q, splat(scale), splat(minimum)) - load(b->x + i);
        error = fma_(off * off, load(b->weights + i), error);
    }
    return sum(error);
}

static void code_block(const Block *b, float scale, float minimum, uint8_t *codes) {
    float numbers[BLOCK];
    for (int i = 0; i < BLOCK; i += LANES)
        store(numbers + i, codes_for(b, i, scale ? 1 / scale : 0, minimum));
    for (int i = 0; i < BLOCK; i++) codes[i] = (uint8_t)numbers[i];
}

static void quantize_q4_1(const float *x, uint8_t *out) {
    float weights[BLOCK];
    uint8_t codes[BLOCK];
    importances(x, BLOCK, weights);
    const Block block = block_of(x, weights, 15);
    const Line line = fit_line(&block, 0);
    const half header[2] = {to_half(line.scale), to_half(line.minimum)};
    code_block(&block, from_half(header[0]), from_half(header[1]), codes);
    memcpy(out, header, sizeof header);
    for (int i = 0; i < 16; i++) out[4 + i] = codes[i] | codes[16 + i] << 4;
}

// The integer steps of scale and minimum next to the fitted ones that have the least error.
static void choose_steps(const Block *b, const Line *line, float scale, float minimum,
                         uint8_t *steps) {
    const int s = scale ? (int)rintf(line->scale / scale) : 0;
    const int m = minimum ? (int)rintf(-line->minimum / minimum) : 0;
    float least = INFINITY;
    for (int i = s - 1; i <= s + 1; i++) {
        for (int k = m - 1; k <= m + 1; k++) {
            if (i != clamp(i, 0, 63) || k != clamp(k, 0, 63)) continue;
            const float error = error_of(b, scale * i, -minimum * k);
            if (error < least) least = error, steps[0] = i, steps[1] = k;
        }
    }
}

static void quantize_q4_k(const float *x, uint8_t *out) {
    enum { PARTS = SUPER / BLOCK };
    float weights[SUPER];
    Block blocks[PARTS];
    Line lines[PARTS];
    float scale = 0, minimum = 0;
    importances(x, SUPER, weights);
    for (int i = 0; i < PARTS; i++) {
        blocks[i] = block_of(x + i * BLOCK, weights + i * BLOCK, 15);
        lines[i] = fit_line(&blocks[i], 1);
        scale = lines[i].scale > scale ? lines[i].scale : scale;
        minimum = -lines[i].minimum > minimum ? -lines[i].minimum : minimum;
    }
    const half header[2] = {to_half(scale / 63), to_half(minimum / 63)};
    memset(out, 0, 16);
    memcpy(out, header, sizeof header);
    uint8_t *packed = out + 4, *low = out + 16, codes[PARTS][BLOCK];
    for (int i = 0; i < PARTS; i++) {
        uint8_t steps[2] = {0, 0};
        choose_steps(&blocks[i], &lines[i], from_half(header[0]), from_half(header[1]), steps);
        code_block(&blocks[i], from_half(header[0]) * steps[0], -from_half(header[1]) * steps[1],
                   codes[i]);
        for (int side = 0; side < 2; side++) {
            if (i < 4) packed[i + 4 * side] |= steps[side];
            else {
                packed[i + 4] |= (steps[side] & 15) << 4 * side;
                packed[i - 4 + 4 * side] |= steps[side] >> 4 << 6;
            }
        }
    }
    for (int i = 0; i < PARTS; i += 2)
        for (int k = 0; k < BLOCK; k++) low[i / 2 * BLOCK + k] = codes[i][k] | codes[i + 1][k] << 4;
}

// The scale with which 16 codes from -32 to 31 approximate x best.
static float fit_scale(const float *x, const float *weights) {
    float widest = 0, best = 0, best_scale = 0;
    for (int i = 0; i < HALF_BLOCK; i++) widest = fabsf(x[i]) > fabsf(widest) ? x[i] : widest;
    if (!widest) return 0;
    for (int step = -9; step <= 9; step++) {
        const float inverse = -(32 + 0.1f * step) / widest;
        vec wqx_ = splat(0), wqq_ = splat(0);
        for (int i = 0; i < HALF_BLOCK; i += LANES) {
            const vec rounded = nearest(load(x + i) * inverse);
            const vec q = smaller(greater(rounded, splat(-32)), splat(31));
            const vec weighted = load(weights + i) * q;
            wqx_ = fma_(weighted, load(x + i), wqx_);
            wqq_ = fma_(weighted, q, wqq_);
        }
        const float wqx = sum(wqx_), wqq = sum(wqq_);
        if (wqq > 0 && wqx * wqx > best * wqq) best = wqx * wqx / wqq, best_scale = wqx / wqq;
    }
    return best_scale;
}

static void quantize_q6_k(const float *x, uint8_t *out) {
    enum { PARTS = SUPER / HALF_BLOCK };
    float weights[SUPER], scales[PARTS], widest = 0;
    uint8_t codes[SUPER];
    importances(x, SUPER, weights);
    for (int i = 0; i < PARTS; i++) {
        scales[i] = fit_scale(x + i * HALF_BLOCK, weights + i * HALF_BLOCK);
        widest = fabsf(scales[i]) > fabsf(widest) ? scales[i] : widest;
    }
    const half header = to_half(widest / -128);
    const float scale = from_half(header);
    for (int i = 0; i < PARTS; i++) {
        const int step = scale ? clamp((int)rintf(scales[i] / scale), -128, 127) : 0;
        out[192 + i] = (uint8_t)step;
        const float inverse = scale * step ? 1 / (scale * step) : 0;
        for (int k = i * HALF_BLOCK; k < (i + 1) * HALF_BLOCK; k++)
            codes[k] = clamp((int)rintf(x[k] * inverse), -32, 31) + 32;
    }
    memcpy(out + 208, &header, sizeof header);
    for (int side = 0; side < 2; side++) {  // 128 columns
        const uint8_t *c = codes + 128 * side;
        for (int k = 0; k < 32; k++) {
            out[64 * side + k] = (c[k] & 15) | (c[64 + k] & 15) << 4;
            out[64 * side + 32 + k] = (c[32 + k] & 15) | (c[96 + k] & 15) << 4;
            out[128 + 32 * side + k] =
                c[k] >> 4 | c[32 + k] >> 4 << 2 | c[64 + k] >> 4 << 4 | c[96 + k] >> 4 << 6;
        }
    }
}

static void quantize_q8_0(const float *x, uint8_t *out) {
    float widest = 0;
    for (int i = 0; i < BLOCK; i++) widest = fabsf(x[i]) > widest ? fabsf(x[i]) : widest;
    const half header = to_half(widest / 127);
    const float inverse = from_half(header) ? 1 / from_half(header) : 0;
    memcpy(out, &header, sizeof header);
    for (int i = 0; i < BLOCK; i++) out[2 + i] = (uint8_t)clamp((int)rintf(x[i] * inverse), -127, 127);
}

// `count` finite numbers, in whole blocks, -> blocks in GGUF's order. 1 if the kind cannot be
// written.
int minigpt4_quantize(int kind, const float *x, size_t count, uint8_t *out) {
    const int size = is_k(kind) ? SUPER : BLOCK;
    for (size_t i = 0; i < count; i += size, x += size, out += file_bytes(kind)) {
        switch (kind) {
        case Q4_1: quantize_q4_1(x, out); break;
        case Q8_0: quantize_q8_0(x, out); break;
        case Q4_K: quantize_q4_k(x, out); break;
        case Q6_K: quantize_q6_k(x, out); break;
        default: return 1;
        }
    }
    return 0;
}
