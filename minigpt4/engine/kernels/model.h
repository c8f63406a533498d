// A Llama- or Qwen2-style model, and the input of one call. `kernels/build.py` has the same
// structures.

#pragma once
#include "products.h"

enum { PAGE = 16, MAX_HEAD_WIDTH = 256 };

typedef struct {
    const float *attention_norm, *mlp_norm;     // [hidden_width]
    const float *q_bias, *k_bias, *v_bias;      // [heads, head_width] or NULL
    Matrix q, k, v, o, gate, up, down;          // a head has head_width rows of q, k and v
} Layer;

// Widths are sizes rounded up to whole blocks; the padding is 0.
typedef struct {
    int32_t hidden, hidden_width, layers, heads, kv_heads, head_dim, head_width, inner_width;
    int32_t vocabulary, context, rope_halves, kv_bits;
    float norm_eps;
    const float *final_norm, *cosines, *sines;  // [hidden_width]; [context, head_dim / 2]
    Matrix embedding, head;
    const Layer *layer;
} Model;

typedef struct {
    int32_t rows, logit_rows, embed_rows, conversations, table_width, page_count;
    const int32_t *tokens;      // [rows]; below 0: row -1 - token of `embeds`
    const float *embeds;        // [embed_rows, hidden]
    const int32_t *positions;   // [rows]
    const int32_t *table_rows;  // [rows] each row's row of `tables`
    const int32_t *tables;      // [conversations, table_width] pages of a conversation, in order
    const int32_t *wanted;      // [logit_rows] rows whose logits are wanted
    uint8_t *pages;             // [page_count, layers, key or value, kv_heads, page_bytes]
    float *logits;              // [logit_rows, vocabulary]
} Batch;

INLINE int within(int32_t n, int32_t end) { return n >= 0 && n < end; }

// Is every index of a batch in its range?
static int is_sound(const Model *m, const Batch *b, int max_rows) {
    if (b->rows < 1 || b->rows > max_rows || !within(b->logit_rows, b->rows + 1)) return 0;
    for (int i = 0; i < b->rows; i++) {
        const int token = b->tokens[i], position = b->positions[i];
        if (token >= 0 ? token >= m->vocabulary : -(token + 1) >= b->embed_rows) return 0;
        if (!within(position, m->context) || position / PAGE >= b->table_width) return 0;
        if (!within(b->table_rows[i], b->conversations)) return 0;
        const int32_t *table = b->tables + (size_t)b->table_rows[i] * b->table_width;
        for (int page = 0; page <= position / PAGE; page++)
            if (!within(table[page], b->page_count)) return 0;
    }
    for (int i = 0; i < b->logit_rows; i++)
        if (!within(b->wanted[i], b->rows)) return 0;
    return 1;
}
