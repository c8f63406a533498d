// The forward pass of a Llama- or Qwen2-style model on a CPU, straight from a GGUF file's blocks.
//
// A call takes rows: tokens (or image embeddings) of any conversations, each with its position and
// its conversation's table of key-value pages. All threads go through the layers together and meet
// at barriers. A row's sums are always computed in the same order, so a conversation gets the same
// bits alone or with others, in one chunk or in many.
//
// `native.py` compiles this file for the machine it runs on and says what the arguments are.

#include "kernels/pool.h"
#include "kernels/attention.h"
#include "kernels/quantize.h"

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
    int32_t *runs;                // first rows of runs of at most TOGETHER of one conversation
    Scratch *scratch;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    uint32_t calls;
    int closing, threads;
    Phase *phases;
    atomic_int rows, logit_rows, run_count;  // of the call: a late thread must not read `batch`
    Bell bell;  // rung whenever a phase is complete
} Pool;

enum { PHASES_A_LAYER = 8, OTHER_PHASES = 3, FEW_ROWS = 8 };

// --- the work of a phase --------------------------------------------------------------------------

// Free threads take a phase in pieces, and it is complete when its pieces are done, by whichever
// thread: none waits for a thread that the system has suspended between two pieces. Such a thread
// may resume after the call; it then gets no piece, and touches nothing else.
typedef struct {
    Pool *pool;
    Scratch *own;
    uint32_t call;
    int phase;
} Worker;

// The next piece of the phase, `step` of `count` items; notes that the one before, [*from, *to), is
// done. 0 once all pieces are, and the next phase begins.
static int next(Worker *w, int count, int step, int *from, int *to) {
    Phase *phase = &w->pool->phases[w->phase];
    if (*to > *from && complete(phase, *to - *from, count)) ring(&w->pool->bell);
    if (take(phase, w->call, count, step, from)) {
        *to = *from + step < count ? *from + step : count;
        return 1;
    }
    if (w->pool->threads > 1) await(phase, w->call, count, &w->pool->bell);
    w->phase++;
    return 0;
}

INLINE size_t q_width(const Model *m) {
    return ((size_t)m->heads * m->head_dim + BLOCK - 1) / BLOCK * BLOCK;
}

static void rms_norm(const Model *m, const float *x, const float *weight, float *out) {
    vec squares = splat(0);
    for (int i = 0; i < m->hidden_width; i += LANES)
        squares = fma_(load(x + i), load(x + i), squares);
    const float scale = 1.0f / sqrtf(sum(squares) / m->hidden + m->norm_eps);
    for (int i = 0; i < m->hidden_width; i += LANES)
        store(out + i, load(x + i) * scale * load(weight + i));
}

// The input of a product: rows of x, normalized if there is a norm, then rounded.
typedef struct {
    const float *x, *norm;
    int width, rows, chosen;  // chosen: only the rows whose logits are wanted
    const Activation *rounded;
} Input;

static void prepare_rows(const Worker *w, const Input *input, int from, int to,
                         Activation *rounded) {
    const int32_t *chosen = input->chosen ? w->pool->batch->wanted : NULL;
    const int width = input->width;
    for (int i = from; i < to; i++) {
        const float *row = input->x + (size_t)(chosen ? chosen[i] : i) * width;
        if (input->norm)
            rms_norm(w->pool->model, row, input->norm, w->own->normed), row = w->own->normed;
        round_row(row, width, rounded + (size_t)i * (width / BLOCK));
    }
}

// Many rows are prepared in a phase of their own, by all threads.
static void share_preparation(Worker *w, Input *input) {
    if (input->rows <= FEW_ROWS) return;
    for (int from = 0, to = 0; next(w, input->rows, 4, &from, &to);)
        prepare_rows(w, input, from, to, w->pool->rounded);
    input->rounded = w->pool->rounded;
}

// Few rows are prepared by every thread that has taken a piece of the product.
INLINE const Activation *prepared(const Worker *w, Input *input) {
    if (!input->rounded) {
        prepare_rows(w, input, 0, input->rows, w->own->rounded);
        input->rounded = w->own->rounded;
    }
    return input->rounded;
}

static void embed_row(const Worker *w, int row) {
    const Model *m = w->pool->model;
    const Batch *b = w->pool->batch;
    float *x = w->pool->x + (size_t)row * m->hidden_width;
    const int token = b->tokens[row];
    if (token >= 0) {
        minigpt4_unpack(&m->embedding, token, x);
        return;
    }
    memcpy(x, b->embeds + (size_t)(-1 - token) * m->hidden, m->hidden * sizeof *x);
    memset(x + m->hidden, 0, (m->hidden_width - m->hidden) * sizeof *x);
}

static void embed(Worker *w) {
    const int rows = w->pool->rows;
    for (int from = 0, to = 0; next(w, rows, 1, &from, &to);) embed_row(w, from);
}

// One head of queries, keys or values of all rows. Queries and keys are rotated by their positions;
// keys and values are stored.
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
    Input input = {w->pool->x, m->layer[l].attention_norm, m->hidden_width, w->pool->rows, 0, NULL};
    share_preparation(w, &input);
    const int heads = m->heads + 2 * m->kv_heads;
    for (int from = 0, to = 0; next(w, heads, 1, &from, &to);)
        project_head(w, l, from, prepared(w, &input));
}

// Attention of one run of rows, for query heads from `head` on that share keys and values.
static void attend_run(Worker *w, int l, int run, int head, int heads) {
    const Model *m = w->pool->model;
    const int row = w->pool->runs[run], count = w->pool->runs[run + 1] - row;
    float mixed[TOGETHER * MAX_HEAD_WIDTH];
    Queries queries = {.out = mixed, .out_stride = m->head_width, .row = row,
                       .kv_head = head / (m->heads / m->kv_heads),
                       .first = w->pool->batch->positions[row]};
    // One row: its heads together. Several rows: together, one head after another.
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
    const int runs = pool->run_count, group = m->heads / m->kv_heads;
    // Heads that share keys are one piece, if this makes enough pieces for all threads.
    const int heads = runs * m->kv_heads >= 2 * pool->threads ? group : 1;
    const int pieces = runs * (m->heads / heads);
    for (int from = 0, to = 0; next(w, pieces, 1, &from, &to);)
        attend_run(w, l, from % runs, from / runs * heads, heads);
}

// x += matrix . input
static void add_product(Worker *w, const Matrix *matrix, Input *input) {
    Pool *pool = w->pool;
    const int width = pool->model->hidden_width, panels = matrix->rows / PANEL;
    for (int from = 0, to = 0; next(w, panels, 1, &from, &to);) {
        multiply(matrix, from, prepared(w, input), input->rows, w->own->products, w->own->tile);
        for (int i = 0; i < input->rows; i++) {
            float *x = pool->x + (size_t)i * width + from * PANEL;
            for (int r = 0; r < PANEL; r += LANES)
                store(x + r, load(x + r) + load(w->own->products + i * PANEL + r));
        }
    }
}

// 32 columns of silu(gate . x) * (up . x), rounded
static void gate_block(const Worker *w, const Layer *layer, int block, const Activation *input,
                       int rows) {
    const int blocks = w->pool->model->inner_width / BLOCK;
    float *gates = w->own->products, *ups = gates + (size_t)rows * PANEL;
    multiply(&layer->gate, block, input, rows, gates, w->own->tile);
    multiply(&layer->up, block, input, rows, ups, w->own->tile);
    for (int k = 0; k < rows * PANEL; k += LANES) {
        const vec g = load(gates + k);
        const vec silu = g / (exp_(-g) + 1.0f);
        store(gates + k, silu * load(ups + k));
    }
    for (int i = 0; i < rows; i++)
        round_block(gates + i * PANEL, w->pool->inner + (size_t)i * blocks + block);
}

static void gate(Worker *w, const Layer *layer) {
    const Model *m = w->pool->model;
    Input input = {w->pool->x, layer->mlp_norm, m->hidden_width, w->pool->rows, 0, NULL};
    share_preparation(w, &input);
    const int blocks = m->inner_width / BLOCK;
    for (int from = 0, to = 0; next(w, blocks, 1, &from, &to);)
        gate_block(w, layer, from, prepared(w, &input), input.rows);
}

static void write_panel(const Worker *w, int panel, const Activation *input, int rows) {
    const Model *m = w->pool->model;
    const int first = panel * PANEL, rest = m->vocabulary - first;
    multiply(&m->head, panel, input, rows, w->own->products, w->own->tile);
    for (int i = 0; i < rows && rest > 0; i++)
        memcpy(w->pool->batch->logits + (size_t)i * m->vocabulary + first,
               w->own->products + i * PANEL, (rest < PANEL ? rest : PANEL) * sizeof(float));
}

static void write_logits(Worker *w, int rows) {
    const Model *m = w->pool->model;
    Input input = {w->pool->x, m->final_norm, m->hidden_width, rows, 1, NULL};
    share_preparation(w, &input);
    const int panels = m->head.rows / PANEL;
    for (int from = 0, to = 0; next(w, panels, 4, &from, &to);)
        for (int n = from; n < to; n++) write_panel(w, n, prepared(w, &input), rows);
}

static void walk(Pool *pool, int id, uint32_t call) {
    const Model *m = pool->model;
    const int rows = pool->rows, logit_rows = pool->logit_rows;
    Worker me = {pool, &pool->scratch[id], call, 0};
    embed(&me);
    for (int l = 0; l < m->layers; l++) {
        const Layer *layer = &m->layer[l];
        project(&me, l);
        attend_phase(&me, l);
        Input attended = {pool->attended, NULL, q_width(m), rows, 0, NULL};
        share_preparation(&me, &attended);
        add_product(&me, &layer->o, &attended);
        gate(&me, layer);
        Input inner = {NULL, NULL, m->inner_width, rows, 0, pool->inner};
        add_product(&me, &layer->down, &inner);
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
    uint32_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&pool->mutex);
        while (pool->calls == seen && !pool->closing) pthread_cond_wait(&pool->wake, &pool->mutex);
        seen = pool->calls;
        const int closing = pool->closing;
        pthread_mutex_unlock(&pool->mutex);
        if (closing) return NULL;
        walk(pool, start.id, seen);
    }
}

// --- what Python calls --------------------------------------------------------------------------

// The bytes of a matrix.
size_t minigpt4_matrix_bytes(const Matrix *m) {
    return m->rows / PANEL * panel_bytes(m->kind, m->columns);
}

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
    for (int i = 1; pool->workers && i < pool->threads; i++)
        if (pool->workers[i]) pthread_join(pool->workers[i], NULL);
    for (int i = 0; pool->scratch && i < pool->threads; i++) {
        free(pool->scratch[i].normed);
        free(pool->scratch[i].rounded);
        free(pool->scratch[i].products);
        free(pool->scratch[i].scores);
        free(pool->scratch[i].tile);
    }
    void *const buffers[] = {pool->x, pool->q, pool->attended, pool->rounded, pool->inner,
                             pool->runs, pool->phases, pool->scratch, pool->workers};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}

static int make_buffers(Pool *pool, const Model *m) {
    const size_t rows = pool->max_rows, threads = pool->threads;
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
    pool->phases = calloc(PHASES_A_LAYER * (size_t)m->layers + OTHER_PHASES, sizeof(Phase));
    int good = pool->workers && pool->scratch && pool->x && pool->q && pool->attended &&
               pool->rounded && pool->inner && pool->runs && pool->phases;
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

// A pool of threads for calls of at most `max_rows` rows; NULL if there is no memory for it.
Pool *minigpt4_open(const Model *m, int threads, int max_rows) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->threads = threads;
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

// Finds runs: rows that follow each other in one conversation.
static int find_runs(int32_t *runs, const Batch *b) {
    int found = 0;
    for (int i = 0, count; i < b->rows; i += count) {
        for (count = 1; count < TOGETHER && i + count < b->rows; count++)
            if (b->table_rows[i + count] != b->table_rows[i] ||
                b->positions[i + count] != b->positions[i] + count)
                break;
        runs[found++] = i;
    }
    runs[found] = b->rows;
    return found;
}

// Returns 0, or 1 if an index in the batch is out of range: then nothing is computed.
int minigpt4_forward(Pool *pool, const Batch *batch) {
    if (!is_sound(pool->model, batch, pool->max_rows)) return 1;
    pthread_mutex_lock(&pool->mutex);
    const uint32_t call = ++pool->calls;
    // First the phases: they tell a thread of the last call that it is over.
    for (int i = 0; i < PHASES_A_LAYER * pool->model->layers + OTHER_PHASES; i++)
        begin(&pool->phases[i], call);
    pool->batch = batch;
    pool->run_count = find_runs(pool->runs, batch);
    pool->rows = batch->rows;
    pool->logit_rows = batch->logit_rows;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    walk(pool, 0, call);
    return 0;
}
