// The forward pass of a Llama- or Qwen2-style model on a CPU, straight from a GGUF file's blocks.
//
// A call takes rows: tokens (or image embeddings) of any conversations, each with its position and
// its conversation's table of key-value pages. All threads walk the same layers together and meet
// at barriers. Every number of a row is computed in one order whatever else is in the call, so a
// conversation gets the same bits alone and among others, in one chunk or in many.
//
// `native.py` compiles this file for the machine it runs on and says what the arguments are.

#include "kernels/pool.h"
#include "kernels/attention.h"

typedef struct {
    float *normed;        // [hidden_width], one row
    Activation *rounded;  // [FEW_ROWS, widest input]
    float *products;      // [4, max_rows, PANEL] or [head_width / PANEL, max_rows, PANEL]
    float *scores;        // [TOGETHER, context + PAGE]
    uint8_t *tile;        // [TILE_BLOCKS, TILE_BYTES]
} Scratch;  // a thread's own

typedef struct {
    const Model *model;
    const Batch *batch;
    int max_rows;
    float *x, *q, *attended;      // [max_rows, .], shared by the threads
    Activation *rounded, *inner;  // likewise
    int32_t *runs, run_count;     // first rows of runs of at most TOGETHER of one conversation
    Scratch *scratch;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    uint64_t calls;
    int closing;
    Barrier barrier;
    atomic_int *taken;  // [phases] how much of each has been taken
} Pool;

enum { PHASES_A_LAYER = 8, OTHER_PHASES = 3, FEW_ROWS = 8 };

// --- the work of a phase --------------------------------------------------------------------------

// A phase, between two barriers, is taken in pieces by whichever thread is free: one that the
// system has put aside for a moment does not keep the others waiting for its share.
typedef struct {
    Pool *pool;
    Scratch *own;
    int phase;
} Worker;

INLINE int grab(const Worker *w, int count, int step, int *from, int *to) {
    *from = atomic_fetch_add_explicit(&w->pool->taken[w->phase], step, memory_order_relaxed);
    *to = *from + step < count ? *from + step : count;
    return *from < count;
}

static void finish(Worker *w) {
    meet(&w->pool->barrier);
    w->phase++;
}

INLINE size_t q_width(const Model *m) {
    return ((size_t)m->heads * m->head_dim + BLOCK - 1) / BLOCK * BLOCK;
}

static void rms_norm(const Model *m, const float *x, const float *weight, float *out) {
    vec squares = splat(0);
    for (int i = 0; i < m->hidden_width; i += LANES)
        squares = fma_(load(x + i), load(x + i), squares);
    const vec scale = splat(1.0f / sqrtf(sum(squares) / m->hidden + m->norm_eps));
    for (int i = 0; i < m->hidden_width; i += LANES)
        store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
}

// Rows of x -> rounded, normed before if there is a weight; of few rows every thread makes its own,
// of many each a share.
static const Activation *prepare(Worker *w, const float *x, int width, const float *norm,
                                 const int32_t *chosen, int rows) {
    const Model *m = w->pool->model;
    const int few = rows <= FEW_ROWS;
    Activation *to = few ? w->own->rounded : w->pool->rounded;
    int from = 0, end = rows;
    while (few || grab(w, rows, 4, &from, &end)) {
        for (int i = from; i < end; i++) {
            const float *row = x + (size_t)(chosen ? chosen[i] : i) * width;
            if (norm) rms_norm(m, row, norm, w->own->normed), row = w->own->normed;
            round_row(row, width, to + (size_t)i * (width / BLOCK));
        }
        if (few) return to;
    }
    finish(w);
    return to;
}

static void embed(Worker *w) {
    const Model *m = w->pool->model;
    const Batch *b = w->pool->batch;
    int from, to;
    while (grab(w, b->rows, 1, &from, &to)) {
        float *x = w->pool->x + (size_t)from * m->hidden_width;
        const int token = b->tokens[from];
        if (token >= 0) {
            unpack(&m->embedding, token, x);
            continue;
        }
        memcpy(x, b->embeds + (size_t)(-1 - token) * m->hidden, m->hidden * sizeof *x);
        memset(x + m->hidden, 0, (m->hidden_width - m->hidden) * sizeof *x);
    }
    finish(w);
}

// One head of queries, keys or values of all rows: turned to their positions, keys and values kept.
static void project_head(Worker *w, int l, int head, const Activation *x) {
    const Model *m = w->pool->model;
    const Batch *b = w->pool->batch;
    const Layer *layer = &m->layer[l];
    const int kv = head - m->heads, value = kv >= m->kv_heads, own = kv < 0 ? head : kv % m->kv_heads;
    const Matrix *matrix = kv < 0 ? &layer->q : value ? &layer->v : &layer->k;
    const float *bias = kv < 0 ? layer->q_bias : value ? layer->v_bias : layer->k_bias;
    const int width = m->head_width, panels = width / PANEL;
    for (int p = 0; p < panels; p++)
        multiply(matrix, own * panels + p, x, b->rows,
                 w->own->products + (size_t)p * b->rows * PANEL, w->own->tile);
    for (int i = 0; i < b->rows; i++) {
        float out[MAX_HEAD_WIDTH];
        for (int d = 0; d < width; d++) {
            out[d] = w->own->products[((size_t)(d / PANEL) * b->rows + i) * PANEL + d % PANEL];
            if (bias) out[d] += bias[own * width + d];
        }
        if (!value) rotate(m, out, b->positions[i]);
        if (kv >= 0) keep(m, b, i, l, value, own, out);
        else memcpy(w->pool->q + ((size_t)i * m->heads + head) * width, out, width * sizeof *out);
    }
}

static void project(Worker *w, int l) {
    const Model *m = w->pool->model;
    const Activation *x = prepare(w, w->pool->x, m->hidden_width, m->layer[l].attention_norm, NULL,
                                  w->pool->batch->rows);
    int from, to;
    while (grab(w, m->heads + 2 * m->kv_heads, 1, &from, &to)) project_head(w, l, from, x);
    finish(w);
}

// Query heads from `head` on that share keys and values, of one run of rows.
static void attend_run(Worker *w, int l, int run, int head, int heads) {
    const Model *m = w->pool->model;
    const int row = w->pool->runs[run], count = w->pool->runs[run + 1] - row;
    float mixed[TOGETHER * MAX_HEAD_WIDTH];
    Queries queries = {.out = mixed, .out_stride = m->head_width, .row = row,
                       .kv_head = head / (m->heads / m->kv_heads),
                       .first = w->pool->batch->positions[row]};
    // Of one row its heads go together, of several rows one head after another.
    const int together = count == 1 ? TOGETHER : 1;
    for (const int end = head + heads; head < end; head += together) {
        const int n = count > 1 ? count : end - head < together ? end - head : together;
        queries.q = w->pool->q + ((size_t)row * m->heads + head) * m->head_width;
        queries.q_stride = (size_t)(count > 1 ? m->heads : 1) * m->head_width;
        queries.step = count > 1;
        attend_all(m, w->pool->batch, l, queries, n, w->own->scores);
        for (int i = 0; i < n; i++) {
            float *out = w->pool->attended + (count > 1 ? row + i : row) * q_width(m);
            memcpy(out + (count > 1 ? head : head + i) * m->head_dim, mixed + i * m->head_width,
                   m->head_dim * sizeof *out);
        }
    }
}

static void attend_phase(Worker *w, int l) {
    const Pool *pool = w->pool;
    const Model *m = pool->model;
    const int group = m->heads / m->kv_heads, tasks = pool->run_count * m->kv_heads;
    // The heads that share keys are one task where there are tasks enough for all threads.
    const int heads = tasks >= 2 * pool->barrier.threads ? group : 1, parts = m->heads / heads;
    int from, to;
    while (grab(w, pool->run_count * parts, 1, &from, &to))
        attend_run(w, l, from % pool->run_count, from / pool->run_count * heads, heads);
    finish(w);
}

// x += matrix . input
static void add_product(Worker *w, const Matrix *matrix, const Activation *input) {
    Pool *pool = w->pool;
    const int rows = pool->batch->rows, width = pool->model->hidden_width;
    int from, to;
    while (grab(w, matrix->rows / PANEL, 1, &from, &to)) {
        multiply(matrix, from, input, rows, w->own->products, w->own->tile);
        for (int i = 0; i < rows; i++) {
            float *x = pool->x + (size_t)i * width + from * PANEL;
            for (int r = 0; r < PANEL; r += LANES)
                store(x + r, add(load(x + r), load(w->own->products + i * PANEL + r)));
        }
    }
    finish(w);
}

// silu(gate . x) * (up . x), rounded
static void gate(Worker *w, const Layer *layer) {
    Pool *pool = w->pool;
    const Model *m = pool->model;
    const int rows = pool->batch->rows, blocks = m->inner_width / BLOCK;
    const Activation *input = prepare(w, pool->x, m->hidden_width, layer->mlp_norm, NULL, rows);
    float *gates = w->own->products, *ups = gates + (size_t)rows * PANEL;
    int from, to;
    while (grab(w, blocks, 1, &from, &to)) {
        multiply(&layer->gate, from, input, rows, gates, w->own->tile);
        multiply(&layer->up, from, input, rows, ups, w->own->tile);
        for (int k = 0; k < rows * PANEL; k += LANES) {
            const vec g = load(gates + k);
            const vec silu = divide(g, add(exp_(mul(g, splat(-1))), splat(1)));
            store(gates + k, mul(silu, load(ups + k)));
        }
        for (int i = 0; i < rows; i++)
            round_block(gates + i * PANEL, pool->inner + (size_t)i * blocks + from);
    }
    finish(w);
}

static void write_logits(Worker *w, int rows) {
    const Model *m = w->pool->model;
    const Batch *b = w->pool->batch;
    const Activation *input =
        prepare(w, w->pool->x, m->hidden_width, m->final_norm, b->wanted, rows);
    int from, to;
    while (grab(w, m->head.rows / PANEL, 4, &from, &to))
        for (int n = from; n < to; n++) {
            multiply(&m->head, n, input, rows, w->own->products, w->own->tile);
            const int first = n * PANEL, rest = m->vocabulary - first;
            for (int i = 0; i < rows && rest > 0; i++)
                memcpy(b->logits + (size_t)i * m->vocabulary + first, w->own->products + i * PANEL,
                       (rest < PANEL ? rest : PANEL) * sizeof(float));
        }
    finish(w);
}

static void walk(Pool *pool, int id) {
    const Model *m = pool->model;
    const int rows = pool->batch->rows;
    const int logit_rows = pool->batch->logit_rows;  // the batch is gone after the last barrier
    Worker me = {pool, &pool->scratch[id], 0};
    embed(&me);
    for (int l = 0; l < m->layers; l++) {
        const Layer *layer = &m->layer[l];
        project(&me, l);
        attend_phase(&me, l);
        add_product(&me, &layer->o,
                    prepare(&me, pool->attended, q_width(m), NULL, NULL, rows));
        gate(&me, layer);
        add_product(&me, &layer->down, pool->inner);
    }
    if (logit_rows) write_logits(&me, logit_rows);
}

// --- threads ------------------------------------------------------------------------------------

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

// Bytes that a matrix takes.
size_t minigpt4_matrix_bytes(const Matrix *m) {
    const size_t panels = m->rows / PANEL;
    if (m->kind == F32) return panels * panel_bytes(F32, m->columns);
    if (m->kind == F16) return panels * panel_bytes(F16, m->columns);
    return panels * panel_bytes(m->kind, m->columns);
}

// `rows` rows in GGUF's order, of `file_columns` weights, -> rows of m from `to` on.
void minigpt4_pack(const Matrix *m, const uint8_t *from, int file_columns, int to, int rows) {
    pack(m, from, file_columns, to, rows);
}

// Row `row` of m as floats [columns].
void minigpt4_unpack(const Matrix *m, int row, float *out) { unpack(m, row, out); }

// out [rows, matrix rows] = x [rows, columns] . m: what the layers compute, for tests.
int minigpt4_multiply(const Matrix *m, const float *x, int rows, float *out) {
    const int blocks = m->columns / BLOCK;
    Activation *rounded = malloc((size_t)rows * blocks * sizeof *rounded);
    float *products = malloc((size_t)rows * PANEL * sizeof *products);
    uint8_t *tile = malloc(TILE_BLOCKS * TILE_BYTES);
    const int good = rounded && products && tile;
    for (int i = 0; good && i < rows; i++)
        round_row(x + (size_t)i * m->columns, m->columns, rounded + (size_t)i * blocks);
    for (int n = 0; good && n < m->rows / PANEL; n++) {
        multiply(m, n, rounded, rows, products, tile);
        for (int i = 0; i < rows; i++)
            memcpy(out + (size_t)i * m->rows + n * PANEL, products + i * PANEL,
                   PANEL * sizeof *out);
    }
    free(rounded);
    free(products);
    free(tile);
    return good;
}

void minigpt4_close(Pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pool->closing = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 1; pool->workers && i < pool->barrier.threads; i++)
        if (pool->workers[i]) pthread_join(pool->workers[i], NULL);
    for (int i = 0; pool->scratch && i < pool->barrier.threads; i++) {
        free(pool->scratch[i].normed);
        free(pool->scratch[i].rounded);
        free(pool->scratch[i].products);
        free(pool->scratch[i].scores);
        free(pool->scratch[i].tile);
    }
    void *const buffers[] = {pool->x, pool->q, pool->attended, pool->rounded, pool->inner,
                             pool->runs, pool->taken, pool->scratch, pool->workers};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}

static int make_buffers(Pool *pool, const Model *m) {
    const size_t rows = pool->max_rows, threads = pool->barrier.threads;
    const size_t hidden = m->hidden_width, widest = q_width(m) > hidden ? q_width(m) : hidden;
    const size_t panels = m->head_width / PANEL > 2 ? m->head_width / PANEL : 2;
    pool->workers = calloc(threads, sizeof *pool->workers);
    pool->scratch = calloc(threads, sizeof *pool->scratch);
    pool->x = calloc(rows * m->hidden_width, sizeof(float));
    pool->q = calloc(rows * m->heads * m->head_width, sizeof(float));
    pool->attended = calloc(rows * q_width(m), sizeof(float));
    pool->rounded = calloc(rows * widest / BLOCK, sizeof(Activation));
    pool->inner = calloc(rows * m->inner_width / BLOCK, sizeof(Activation));
    pool->runs = calloc(rows + 1, sizeof(int32_t));
    pool->taken = calloc(PHASES_A_LAYER * (size_t)m->layers + OTHER_PHASES, sizeof(atomic_int));
    int good = pool->workers && pool->scratch && pool->x && pool->q && pool->attended &&
               pool->rounded && pool->inner && pool->runs && pool->taken;
    for (size_t i = 0; good && i < threads; i++) {
        Scratch *own = &pool->scratch[i];
        own->normed = calloc(m->hidden_width, sizeof(float));
        own->rounded = calloc(FEW_ROWS * widest / BLOCK, sizeof(Activation));
        own->products = calloc(panels * rows * PANEL, sizeof(float));
        own->scores = calloc(TOGETHER * ((size_t)m->context + PAGE), sizeof(float));
        own->tile = aligned_alloc(64, TILE_BLOCKS * TILE_BYTES);
        good = own->normed && own->rounded && own->products && own->scores && own->tile;
    }
    return good;
}

// A pool of threads for calls of at most `max_rows` rows; NULL without the memory for it.
Pool *minigpt4_open(const Model *m, int threads, int max_rows) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->barrier.threads = threads;
    pool->max_rows = max_rows;
    pool->model = m;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    int good = make_buffers(pool, m);
    for (int i = 1; good && i < threads; i++) {
        Start *start = malloc(sizeof *start);
        good = start != NULL;
        if (good) *start = (Start){pool, i};
        if (good && pthread_create(&pool->workers[i], NULL, work, start)) {
            pool->workers[i] = 0;
            free(start);
            good = 0;
        }
    }
    if (good) return pool;
    minigpt4_close(pool);
    return NULL;
}

// Rows that follow each other in one conversation are taken together.
static void find_runs(Pool *pool, const Batch *b) {
    pool->run_count = 0;
    for (int i = 0, count; i < b->rows; i += count) {
        for (count = 1; count < TOGETHER && i + count < b->rows; count++)
            if (b->table_rows[i + count] != b->table_rows[i] ||
                b->positions[i + count] != b->positions[i] + count)
                break;
        pool->runs[pool->run_count++] = i;
    }
    pool->runs[pool->run_count] = b->rows;
}

// 0, or 1 where a number of the batch points outside of what it is about: nothing is computed then.
int minigpt4_forward(Pool *pool, const Batch *batch) {
    if (!is_sound(pool->model, batch, pool->max_rows)) return 1;
    find_runs(pool, batch);
    for (int i = 0; i < PHASES_A_LAYER * pool->model->layers + OTHER_PHASES; i++)
        atomic_store_explicit(&pool->taken[i], 0, memory_order_relaxed);
    pthread_mutex_lock(&pool->mutex);
    pool->batch = batch;
    pool->calls++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    walk(pool, 0);
    return 0;
}
