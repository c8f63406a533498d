// Weights in GGUF's blocks, and their layout in memory.
//
// A matrix is divided into panels of 32 rows, and these into 32 columns at a time. The part of a
// GGUF block for 32 columns of one row is beside the same part of the panel's other 31 rows. So one
// vector holds two columns of LANES rows, and its sums belong to LANES different rows: nothing is
// ever added across a vector. No weight changes: the bits are the same in another order, except
// that the 6-bit scales of the K kinds are stored as bytes.
//
//   header, for each 32 columns or each 256 (K kinds): [32] half scales, and [32] half minimums
//   body, for each 32 columns:  K kinds: [32] scales, [32] minimums (Q6_K: of each 16 columns)
//                               Q5: [32] 32 high bits; Q6_K: [2][32] 16 times 2 high bits
//                               Q4, Q5, Q6: [4][32] 8 low nibbles; Q8: [16][32] 2 bytes
//                               F16, F32: [32][32] numbers, by column
//
// In 4-byte group g of nibbles, nibble t of the lower (upper) 16 bits is column 8 g + 2 t (+ 1).
// Pair 4 g + t of columns has bit 4 g + t of the high bits.

#pragma once
#include <stdlib.h>
#include "vectors.h"

// Kernels are compiled separately for each kind, pair of columns and number of rows; with the
// compiler's own vectors, which are slower anyway, once for all of these.
#if defined(MINIGPT4_AVX512) || defined(MINIGPT4_AVX2)
#define KERNEL INLINE
#define FOR_KIND(kind, f, ...)                                                                    \
    switch (kind) {                                                                               \
    case Q4_0: f(Q4_0, __VA_ARGS__); break;                                                       \
    case Q4_1: f(Q4_1, __VA_ARGS__); break;                                                       \
    case Q5_0: f(Q5_0, __VA_ARGS__); break;                                                       \
    case Q5_1: f(Q5_1, __VA_ARGS__); break;                                                       \
    case Q8_0: f(Q8_0, __VA_ARGS__); break;                                                       \
    case Q4_K: f(Q4_K, __VA_ARGS__); break;                                                       \
    case Q5_K: f(Q5_K, __VA_ARGS__); break;                                                       \
    case Q6_K: f(Q6_K, __VA_ARGS__); break;                                                       \
    }
#define FIRST_PAIRS(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7)
#define LAST_PAIRS(f) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15)
#else
#define KERNEL static __attribute__((noinline))
#define FOR_KIND(kind, f, ...) f(kind, __VA_ARGS__)
#define FIRST_PAIRS(f) for (int pair = 0; pair < 8; pair++) f(pair)
#define LAST_PAIRS(f) for (int pair = 8; pair < 16; pair++) f(pair)
#endif

enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,  // as GGUF numbers them
       Q4_K = 12, Q5_K = 13, Q6_K = 14 };
enum { BLOCK = 32, PANEL = 32, PAIRS = BLOCK / 2, SUPER = 256 };
// Unpacked: float scales (and minimums, or scales of each 16 columns), 16-bit weights.
enum { TILE = 100, TILE_MINIMUMS = 101, TILE_HALVES = 102 };
enum { TILE_BYTES = 2 * PANEL * 4 + PANEL * BLOCK * 2 };

typedef struct {
    const uint8_t *data;
    int32_t kind, rows, columns;  // rows: whole panels; columns: whole blocks
} Matrix;

INLINE int is_k(int kind) { return kind == Q4_K || kind == Q5_K || kind == Q6_K; }
INLINE int is_float(int kind) { return kind == F32 || kind == F16; }
INLINE int has_high_bits(int kind) { return kind == Q5_0 || kind == Q5_1 || kind == Q5_K; }
INLINE int has_minimums(int kind) {
    return kind == Q4_1 || kind == Q5_1 || kind == Q4_K || kind == Q5_K || kind == TILE_MINIMUMS;
}
// Does it have two scales for 32 columns?
INLINE int has_halves(int kind) { return kind == Q6_K || kind == TILE_HALVES; }
// The number that is subtracted from the unsigned codes.
INLINE int offset_of(int kind) {
    return kind == Q4_0 ? 8 : kind == Q5_0 ? 16 : kind == Q6_K ? 32 : 0;
}

INLINE int header_bytes(int kind) {
    if (is_float(kind) || kind >= TILE) return 0;
    return has_minimums(kind) ? 4 * PANEL : 2 * PANEL;
}
INLINE int scale_bytes(int kind) { return is_k(kind) ? 2 * PANEL : 0; }
INLINE int high_bytes(int kind) {
    return has_high_bits(kind) ? 4 * PANEL : kind == Q6_K ? 8 * PANEL : 0;
}
INLINE int body_bytes(int kind) {
    if (kind >= TILE) return TILE_BYTES;
    if (is_float(kind)) return BLOCK * PANEL * (kind == F32 ? 4 : 2);
    const int low = kind == Q8_0 ? BLOCK * PANEL : BLOCK * PANEL / 2;
    return scale_bytes(kind) + high_bytes(kind) + low;
}
INLINE int blocks_a_header(int kind) { return is_k(kind) ? SUPER / BLOCK : 1; }
INLINE size_t group_bytes(int kind) {
    return header_bytes(kind) + (size_t)blocks_a_header(kind) * body_bytes(kind);
}
INLINE size_t panel_bytes(int kind, int columns) {
    return (size_t)columns / BLOCK / blocks_a_header(kind) * group_bytes(kind);
}

// Pointers to 32 columns of a panel.
typedef struct {
    const uint8_t *header, *body;
} Place;

INLINE Place place_of(int kind, const uint8_t *panel, int block) {
    const int n = blocks_a_header(kind);
    const uint8_t *header = panel + block / n * group_bytes(kind);
    return (Place){header, header + header_bytes(kind) + block % n * body_bytes(kind)};
}

// Column pair `pair` (a constant) of LANES rows from `row` on, as 16-bit codes.
KERNEL ivec codes_of(int kind, const uint8_t *body, int row, int pair) {
    if (kind >= TILE) return iload(body + 8 * PANEL + (pair * PANEL + row) * 4);
    if (kind == Q8_0) return load_signed8_as16((const int8_t *)body + (pair * PANEL + row) * 2);
    const uint8_t *high = body + scale_bytes(kind) + row * 4;
    const int t = pair % 4;
    ivec codes = iload(high + high_bytes(kind) + pair / 4 * PANEL * 4);
    codes = t == 3 ? right16(codes, 12) : right16(codes, 4 * t) & isplat16(15);
    if (has_high_bits(kind)) {
        const ivec bits = iload(high);
        const ivec moved = pair > 4 ? right16(bits, pair - 4) : left16(bits, 4 - pair);
        codes |= moved & isplat16(16);
    } else if (kind == Q6_K) {
        const int place = 2 * (pair % 8);
        const ivec bits = iload(high + pair / 8 * PANEL * 4);
        const ivec moved = place > 4 ? right16(bits, place - 4) : left16(bits, 4 - place);
        codes |= moved & isplat16(48);
    }
    return codes;
}

// For LANES rows: the scale, and the minimum or the scale of the last 16 columns.
typedef struct {
    vec first, second;
} Scales;

INLINE Scales scales_of(int kind, Place place, int row) {
    if (kind >= TILE) {
        const float *scales = (const float *)place.body + row;
        return (Scales){load(scales), load(scales + PANEL)};
    }
    const half *header = (const half *)place.header + row;
    const vec scale = load_half(header);
    if (kind == Q6_K) {
        const int8_t *each = (const int8_t *)place.body + row;
        return (Scales){scale * load_signed8(each), scale * load_signed8(each + PANEL)};
    }
    const vec minimum = has_minimums(kind) ? load_half(header + PANEL) : scale;
    if (!is_k(kind)) return (Scales){scale, minimum};
    const uint8_t *each = place.body + row;
    return (Scales){scale * load_unsigned8(each), -(minimum * load_unsigned8(each + PANEL))};
}

// One panel's blocks from `first` on -> a tile.
KERNEL void fill_tile(int kind, const uint8_t *panel, int first, int count, uint8_t *tile) {
    for (int b = 0; b < count; b++, tile += TILE_BYTES) {
        const Place place = place_of(kind, panel, first + b);
        for (int row = 0; row < PANEL; row += LANES) {
            const Scales scales = scales_of(kind, place, row);
            store((float *)tile + row, scales.first);
            store((float *)tile + PANEL + row, scales.second);
#define COPY(pair)                                                                                \
    {                                                                                             \
        ivec codes = codes_of(kind, place.body, row, pair);                                       \
        if (offset_of(kind)) codes = isub16(codes, isplat16(offset_of(kind)));                    \
        istore(tile + 8 * PANEL + ((pair) * PANEL + row) * 4, codes);                             \
    }
            FIRST_PAIRS(COPY)
            LAST_PAIRS(COPY)
#undef COPY
        }
    }
}

// --- from GGUF's own order ------------------------------------------------------------------------

// A row's 32 columns, as in a GGUF file. Eight bytes are read as one number, whose lowest byte is
// the first: GGUF files are little-endian.
enum { EIGHTS = BLOCK / 8 };
#define LOW_NIBBLES 0x0f0f0f0f0f0f0f0full
#define EVEN_BYTES 0x00ff00ff00ff00ffull
typedef struct {
    half scale, minimum;     // of the header
    uint8_t scales[2];       // of the body
    uint64_t codes[EIGHTS];  // a byte a column, unsigned (Q8_0: as in the file)
} Plain;

INLINE int file_bytes(int kind) {  // of the columns of one row that share a header
    switch (kind) {
    case F32: return 4 * BLOCK;
    case F16: return 2 * BLOCK;
    case Q4_0: return 18;
    case Q4_1: return 20;
    case Q5_0: return 22;
    case Q5_1: return 24;
    case Q8_0: return 34;
    case Q4_K: return 144;
    case Q5_K: return 176;
    default: return 210;  // Q6_K
    }
}

INLINE uint64_t read_8(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

// Eight bits -> 16 or 0 in each byte.
INLINE uint64_t spread_bits(uint8_t bits) {
    const uint64_t own = bits * 0x0101010101010101ull & 0x8040201008040201ull;
    return (own + 0x7f7f7f7f7f7f7f7full & 0x8080808080808080ull) >> 3;
}

INLINE void read_32(int kind, const uint8_t *p, Plain *to) {
    memcpy(&to->scale, p, 2);
    p += 2;
    if (has_minimums(kind)) memcpy(&to->minimum, p, 2), p += 2;
    if (kind == Q8_0) {
        memcpy(to->codes, p, BLOCK);
        return;
    }
    const uint8_t *low = has_high_bits(kind) ? p + 4 : p;
    for (int g = 0; g < EIGHTS; g++) {
        to->codes[g] = read_8(low + g % 2 * 8) >> g / 2 * 4 & LOW_NIBBLES;
        if (has_high_bits(kind)) to->codes[g] |= spread_bits(p[g]);
    }
}

// Part `part` (of 8) of 256 columns of kind Q4_K or Q5_K.
INLINE void read_k(int kind, const uint8_t *p, int part, Plain *to) {
    memcpy(&to->scale, p, 2);
    memcpy(&to->minimum, p + 2, 2);
    const uint8_t *s = p + 4;  // 8 scales and 8 minimums of 6 bits
    if (part < 4) {
        to->scales[0] = s[part] & 63;
        to->scales[1] = s[part + 4] & 63;
    } else {
        to->scales[0] = (s[part + 4] & 15) | s[part - 4] >> 6 << 4;
        to->scales[1] = s[part + 4] >> 4 | s[part] >> 6 << 4;
    }
    const uint8_t *high = p + 16, *low = (kind == Q5_K ? high + 32 : high) + part / 2 * 32;
    for (int g = 0; g < EIGHTS; g++) {
        to->codes[g] = read_8(low + 8 * g) >> part % 2 * 4 & LOW_NIBBLES;
        if (kind == Q5_K)
            to->codes[g] |= (read_8(high + 8 * g) >> part & 0x0101010101010101ull) << 4;
    }
}

INLINE void read_q6_k(const uint8_t *p, int part, Plain *to) {
    const int group = part / 4, quarter = part % 4;  // of 128 columns
    const uint8_t *low = p + 64 * group + 32 * (quarter % 2), *high = p + 128 + 32 * group;
    memcpy(to->scales, p + 192 + 2 * part, 2);
    memcpy(&to->scale, p + 208, 2);
    for (int g = 0; g < EIGHTS; g++)
        to->codes[g] = (read_8(low + 8 * g) >> quarter / 2 * 4 & LOW_NIBBLES) |
                       (read_8(high + 8 * g) >> 2 * quarter & 0x0303030303030303ull) << 4;
}

// Four 16-bit numbers below 2^width -> side by side; the product's terms do not overlap.
INLINE uint32_t join(uint64_t numbers, int width) {
    const uint64_t places = 1ull << 48 | 1ull << (32 + width) | 1ull << (16 + 2 * width) |
                            1ull << 3 * width;
    return numbers * places >> 48;
}

// Eight columns -> the even ones in the lower 16 bits, the odd ones in the upper.
INLINE uint32_t join_sides(uint64_t codes, int width) {
    return join(codes & EVEN_BYTES, width) | join(codes >> 8 & EVEN_BYTES, width) << 16;
}

INLINE void write_codes(int kind, const Plain *from, uint8_t *body, int row) {
    if (kind == Q8_0) {
        for (int pair = 0; pair < PAIRS; pair++)
            memcpy(body + (pair * PANEL + row) * 2, (const uint8_t *)from->codes + 2 * pair, 2);
        return;
    }
    if (is_k(kind)) {
        body[row] = from->scales[0];
        body[PANEL + row] = from->scales[1];
    }
    uint32_t high[2] = {0, 0};
    uint8_t *place = body + scale_bytes(kind) + row * 4;
    for (int g = 0; g < EIGHTS; g++) {
        const uint32_t low = join_sides(from->codes[g] & LOW_NIBBLES, 4);
        memcpy(place + high_bytes(kind) + g * PANEL * 4, &low, 4);
        const uint64_t rest = from->codes[g] >> 4 & LOW_NIBBLES;
        if (kind == Q6_K) high[g / 2] |= join_sides(rest, 2) << g % 2 * 8;
        else if (has_high_bits(kind)) high[0] |= join_sides(rest, 1) << 4 * g;
    }
    for (int i = 0; i < high_bytes(kind) / (4 * PANEL); i++)
        memcpy(place + i * PANEL * 4, &high[i], 4);
}

KERNEL void pack_row(int kind, const uint8_t *from, int columns, uint8_t *panel, int row) {
    const int parts = blocks_a_header(kind);
    for (int first = 0; first < columns / BLOCK; first += parts, from += file_bytes(kind)) {
        for (int part = 0; part < parts; part++) {
            Plain plain;
            if (kind == Q6_K) read_q6_k(from, part, &plain);
            else if (is_k(kind)) read_k(kind, from, part, &plain);
            else read_32(kind, from, &plain);
            const Place place = place_of(kind, panel, first + part);
            memcpy((uint8_t *)place.header + 2 * row, &plain.scale, 2);
            if (has_minimums(kind))
                memcpy((uint8_t *)place.header + 2 * (PANEL + row), &plain.minimum, 2);
            write_codes(kind, &plain, (uint8_t *)place.body, row);
        }
    }
}

INLINE void pack_floats(int size, const uint8_t *from, int columns, uint8_t *panel, int row) {
    for (int c = 0; c < columns; c++) memcpy(panel + ((size_t)c * PANEL + row) * size, from + (size_t)c * size, size);
}

// One row of a panel as floats.
KERNEL void unpack_row(int kind, const uint8_t *panel, int columns, int row, float *out) {
    uint8_t tile[TILE_BYTES];
    for (int b = 0; b < columns / BLOCK; b++, out += BLOCK) {
        fill_tile(kind, panel, b, 1, tile);
        float scales[2];
        memcpy(&scales[0], tile + 4 * row, 4);
        memcpy(&scales[1], tile + 4 * (PANEL + row), 4);
        for (int c = 0; c < BLOCK; c++) {
            int16_t code;
            memcpy(&code, tile + 8 * PANEL + (c / 2 * PANEL + row) * 4 + c % 2 * 2, 2);
            const float scale = has_halves(kind) && c >= 16 ? scales[1] : scales[0];
            out[c] = scale * code + (has_minimums(kind) ? scales[1] : 0);
        }
    }
}

INLINE void unpack_floats(int kind, const uint8_t *panel, int columns, int row, float *out) {
    for (int c = 0; c < columns; c++) {
        const size_t place = (size_t)c * PANEL + row;
        if (kind == F32) memcpy(out + c, panel + 4 * place, 4);
        else out[c] = from_half(((const half *)panel)[place]);
    }
}
