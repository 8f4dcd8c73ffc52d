// The scan in the layout of mamba-ssm: time is the last dimension, so tiles are transposed on the way
// in and out. A task is one example, one group, and one part of the group's channels.

// W channels by W steps at p, as one vector per step; absent ones are zero.
INLINE void load_tile(const float *p, long stride, int channels, int steps, vec *tile) {
    for (int i = 0; i < W; i++)
        tile[i] = i < channels ? load(p + i * stride, steps) : broadcast(0.f);
    transpose(tile);
}
INLINE void store_tile(float *p, long stride, int channels, int steps, const vec *tile) {
    vec rows[W];
    memcpy(rows, tile, sizeof rows);
    transpose(rows);
    for (int i = 0; i < channels; i++) store(p + i * stride, rows[i], steps);
}
// All steps of a chunk of W channels, and a hint for the processor that those `next` floats away will be
// wanted: rows so far apart are more than it foresees. Kept out of line: inlined, these made the kernel
// ten times larger.
static __attribute__((noinline)) void load_chunk(const float *p, long stride, int channels,
                                                 int steps, long next, vec *chunk) {
    if (next)
        for (int i = 0; i < channels; i++)
            for (int s = 0; s < steps; s += 16) __builtin_prefetch(p + i * stride + s + next);
    for (int s = 0; s < steps; s += W) {
        if (channels == W && steps - s >= W)
            load_tile(p + s, stride, W, W, chunk + s);
        else
            load_tile(p + s, stride, channels, steps - s < W ? steps - s : W, chunk + s);
    }
}
static __attribute__((noinline)) void store_chunk(float *p, long stride, int channels, int steps,
                                                  long next, const vec *chunk) {
    if (next)
        for (int i = 0; i < channels; i++)
            for (int s = 0; s < steps; s += 16) __builtin_prefetch(p + i * stride + s + next, 1);
    for (int s = 0; s < steps; s += W) {
        if (channels == W && steps - s >= W)
            store_tile(p + s, stride, W, W, chunk + s);
        else
            store_tile(p + s, stride, channels, steps - s < W ? steps - s : W, chunk + s);
    }
}
// (n, l) to one row of n per step.
static __attribute__((noinline)) void load_rows(const float *p, long stride, long n, int steps,
                                                float *rows, long row_stride) {
    vec chunk[CHUNK];
    for (long n0 = 0; n0 < n; n0 += W) {
        int states = n - n0 < W ? (int)(n - n0) : W;
        load_chunk(p + n0 * stride, stride, states, steps, 0, chunk);
        for (int l = 0; l < steps; l++) store(rows + l * row_stride + n0, chunk[l], states);
    }
}

// The sums over lanes of one row of n vectors per step, to (n, l).
static __attribute__((noinline)) void store_rows(float *p, long stride, long n, int steps,
                                                 const vec *rows) {
    for (long n0 = 0; n0 < n; n0 += W) {
        vec chunk[CHUNK];
        for (int l = 0; l < steps; l++) chunk[l] = row_sums(rows, l, n0);
        store_chunk(p + n0 * stride, stride, n - n0 < W ? (int)(n - n0) : W, steps, 0, chunk);
    }
}

typedef struct {
    const Scan *s;
    int backward;
} ScanCall;

// One task's place in the arrays.
typedef struct {
    long example, group, part, channels, first_block, blocks, chunks;
} ScanPlace;

static ScanPlace scan_place(const Scan *s, long task) {
    ScanPlace p;
    p.part = task % s->parts;
    p.group = task / s->parts % s->g;
    p.example = task / s->parts / s->g;
    p.channels = s->d / s->g;
    long all = (p.channels + W - 1) / W;
    p.first_block = all * p.part / s->parts;
    p.blocks = all * (p.part + 1) / s->parts - p.first_block;
    p.chunks = (s->l + CHUNK - 1) / CHUNK;
    return p;
}

// What the tiles of one block of channels share.
typedef struct {
    int count;    // channels, at most W
    long channel; // the first, of all d
    long row;     // the first, of all b * d
    vec bias, D;
    float *boundary; // the state at each chunk's start is boundary + chunk * n * W
} ScanBlock;

static ScanBlock scan_block(const Scan *s, const ScanPlace *p, long i) {
    ScanBlock k;
    long index = p->first_block + i, left = p->channels - index * W;
    k.count = left < W ? (int)left : W;
    k.channel = p->group * p->channels + index * W;
    k.row = p->example * s->d + k.channel;
    const float *bias = s->delta_bias, *D = s->D;
    k.bias =
        bias ? load(bias + p->example * s->delta_bias_stride + k.channel, k.count) : broadcast(0.f);
    k.D = D ? load(D + p->example * s->D_stride + k.channel, k.count) : broadcast(0.f);
    long all = (p->channels + W - 1) / W;
    k.boundary = s->boundaries ? s->boundaries + ((p->example * s->g + p->group) * all + index) *
                                                     p->chunks * s->n * W
                               : NULL;
    return k;
}

// Vectors over the channels of each block, from and to (d, n). `to` has W vectors to spare.
static void load_states(const Scan *s, const ScanPlace *p, const float *from, vec *to) {
    for (long i = 0; i < p->blocks; i++) {
        ScanBlock k = scan_block(s, p, i);
        load_chunk(from + k.channel * s->n, s->n, k.count, (int)s->n, 0, to + i * s->n);
    }
}
static void store_states(const Scan *s, const ScanPlace *p, const vec *from, float *to) {
    for (long i = 0; i < p->blocks; i++) {
        ScanBlock k = scan_block(s, p, i);
        store_chunk(to + k.row * s->n, s->n, k.count, (int)s->n, 0, from + i * s->n);
    }
}

INLINE void scan_forward(const int constant_B, const int constant_C, const Scan *s,
                         const ScanPlace *p, char *scratch) {
    const long n = s->n, shared = (p->example * s->g + p->group) * n * s->l;
    const long states = p->blocks * n + W;
    vec *A = take(&scratch, states, sizeof(vec)), *h = take(&scratch, states, sizeof(vec));
    vec *B = take(&scratch, states, sizeof(vec)), *C = take(&scratch, states, sizeof(vec));
    float *rows = take(&scratch, CHUNK * 2 * n, sizeof(float));
    load_states(s, p, s->A + p->example * s->A_stride, A);
    to_base_two(A, p->blocks * n);
    if (constant_B) load_states(s, p, s->B, B);
    if (constant_C) load_states(s, p, s->C, C);
    memset(h, 0, sizeof(vec) * p->blocks * n);
    for (long chunk = 0; chunk < p->chunks; chunk++) {
        long l0 = chunk * CHUNK;
        int steps = s->l - l0 < CHUNK ? (int)(s->l - l0) : CHUNK;
        long next = chunk + 1 < p->chunks ? CHUNK : 0;
        if (!constant_B) load_rows(s->B + shared + l0, s->l, n, steps, rows, 2 * n);
        if (!constant_C) load_rows(s->C + shared + l0, s->l, n, steps, rows + n, 2 * n);
        for (long i = 0; i < p->blocks; i++) {
            ScanBlock k = scan_block(s, p, i);
            vec delta[CHUNK], drive[CHUNK], y[CHUNK];
            load_chunk(s->u + k.row * s->l + l0, s->l, k.count, steps, next, drive);
            load_chunk(s->delta + k.row * s->l + l0, s->l, k.count, steps, next, delta);
            for (int l = 0; l < steps; l++) {
                delta[l] += k.bias;
                if (s->softplus) delta[l] = softplus_vec(delta[l], NULL);
                y[l] = s->D ? k.D * drive[l] : broadcast(0.f);
                drive[l] *= delta[l];
            }
            if (k.boundary) {
                memcpy(k.boundary + chunk * n * W, h + i * n, sizeof(vec) * n);
                if (next) want_to_write(k.boundary + (chunk + 1) * n * W, n);
            }
            Tile tile = {steps, (int)n, delta,     drive,     rows,
                         2 * n, n,      B + i * n, C + i * n, A + i * n};
            forward_tile(constant_B, constant_C, &tile, h + i * n, y);
            store_chunk(s->y + k.row * s->l + l0, s->l, k.count, steps, next, y);
        }
    }
    store_states(s, p, h, s->last_state);
}

INLINE void scan_backward(const int constant_B, const int constant_C, const Scan *s,
                          const ScanPlace *p, char *scratch) {
    const long n = s->n, states = p->blocks * n + W,
               shared = (p->example * s->g + p->group) * n * s->l;
    const long parted = p->part * s->b * s->g * n * s->l + shared;
    vec *A = take(&scratch, states, sizeof(vec)), *grad_h = take(&scratch, states, sizeof(vec));
    vec *B = take(&scratch, states, sizeof(vec)), *C = take(&scratch, states, sizeof(vec));
    vec *grad_A = take(&scratch, states, sizeof(vec));
    vec *grad_B = take(&scratch, states, sizeof(vec)),
        *grad_C = take(&scratch, states, sizeof(vec));
    vec *grad_D = take(&scratch, p->blocks, sizeof(vec)),
        *grad_bias = take(&scratch, p->blocks, sizeof(vec));
    vec *B_rows = take(&scratch, rows_size(n), sizeof(vec)),
        *C_rows = take(&scratch, rows_size(n), sizeof(vec));
    float *rows = take(&scratch, CHUNK * 2 * n, sizeof(float));
    load_states(s, p, s->A + p->example * s->A_stride, A);
    to_base_two(A, p->blocks * n);
    if (constant_B) load_states(s, p, s->B, B);
    if (constant_C) load_states(s, p, s->C, C);
    memset(grad_A, 0, sizeof(vec) * states);
    memset(grad_B, 0, sizeof(vec) * states);
    memset(grad_C, 0, sizeof(vec) * states);
    memset(grad_D, 0, sizeof(vec) * p->blocks);
    memset(grad_bias, 0, sizeof(vec) * p->blocks);
    if (s->grad_last_state)
        load_states(s, p, s->grad_last_state + p->example * s->d * n, grad_h);
    else
        memset(grad_h, 0, sizeof(vec) * states);
    for (long chunk = p->chunks - 1; chunk >= 0; chunk--) {
        long l0 = chunk * CHUNK;
        int steps = s->l - l0 < CHUNK ? (int)(s->l - l0) : CHUNK;
        long next = chunk ? -CHUNK : 0;
        if (!constant_B) load_rows(s->B + shared + l0, s->l, n, steps, rows, 2 * n);
        if (!constant_C) load_rows(s->C + shared + l0, s->l, n, steps, rows + n, 2 * n);
        for (long i = 0; i < p->blocks; i++) {
            ScanBlock k = scan_block(s, p, i);
            vec u[CHUNK], delta[CHUNK], drive[CHUNK], slope[CHUNK], grad_y[CHUNK], to_drive[CHUNK],
                to_decay[CHUNK];
            load_chunk(s->u + k.row * s->l + l0, s->l, k.count, steps, next, u);
            load_chunk(s->delta + k.row * s->l + l0, s->l, k.count, steps, next, delta);
            load_chunk(s->grad_y + k.row * s->l + l0, s->l, k.count, steps, next, grad_y);
            vec sum_D = broadcast(0.f), sum_bias = broadcast(0.f);
            for (int l = 0; l < steps; l++) {
                delta[l] += k.bias;
                slope[l] = broadcast(1.f);
                if (s->softplus) delta[l] = softplus_vec(delta[l], &slope[l]);
                drive[l] = delta[l] * u[l];
                sum_D += u[l] * grad_y[l];
            }
            Tile tile = {steps, (int)n, delta,     drive,     rows,
                         2 * n, n,      B + i * n, C + i * n, A + i * n};
            TileGradient g = {grad_h + i * n, to_drive, to_decay,       grad_A + i * n,
                              B_rows,         C_rows,   grad_B + i * n, grad_C + i * n};
            if (next) want_to_read(k.boundary + (chunk - 1) * n * W, n);
            const vec_in_memory *start = (const vec_in_memory *)(k.boundary + chunk * n * W);
            if (i == 0)
                backward_tile(constant_B, constant_C, 1, &tile, start, grad_y, &g);
            else
                backward_tile(constant_B, constant_C, 0, &tile, start, grad_y, &g);
            for (int l = 0; l < steps; l++) {
                vec of_delta = (to_decay[l] * LN_2 + u[l] * to_drive[l]) * slope[l];
                to_drive[l] = delta[l] * to_drive[l];
                if (s->D) to_drive[l] += k.D * grad_y[l];
                to_decay[l] = of_delta;
                sum_bias += of_delta;
            }
            grad_D[i] += sum_D;
            grad_bias[i] += sum_bias;
            store_chunk(s->grad_u + k.row * s->l + l0, s->l, k.count, steps, next, to_drive);
            store_chunk(s->grad_delta + k.row * s->l + l0, s->l, k.count, steps, next, to_decay);
        }
        if (!constant_B) store_rows(s->grad_B + parted + l0, s->l, n, steps, B_rows);
        if (!constant_C) store_rows(s->grad_C + parted + l0, s->l, n, steps, C_rows);
    }
    store_states(s, p, grad_A, s->grad_A);
    if (constant_B) store_states(s, p, grad_B, s->grad_B);
    if (constant_C) store_states(s, p, grad_C, s->grad_C);
    for (long i = 0; i < p->blocks; i++) {
        ScanBlock k = scan_block(s, p, i);
        if (s->D) store(s->grad_D + k.row, grad_D[i], k.count);
        if (s->delta_bias) store(s->grad_delta_bias + k.row, grad_bias[i], k.count);
    }
}

static void scan_task(const void *arguments, long task, char *scratch) {
    const ScanCall *call = arguments;
    const Scan *s = call->s;
    ScanPlace p = scan_place(s, task);
    // One copy of the loops for each kind of B and C.
    switch (call->backward << 2 | (s->B_is_constant != 0) << 1 | (s->C_is_constant != 0)) {
    case 0:
        scan_forward(0, 0, s, &p, scratch);
        break;
    case 1:
        scan_forward(0, 1, s, &p, scratch);
        break;
    case 2:
        scan_forward(1, 0, s, &p, scratch);
        break;
    case 3:
        scan_forward(1, 1, s, &p, scratch);
        break;
    case 4:
        scan_backward(0, 0, s, &p, scratch);
        break;
    case 5:
        scan_backward(0, 1, s, &p, scratch);
        break;
    case 6:
        scan_backward(1, 0, s, &p, scratch);
        break;
    default:
        scan_backward(1, 1, s, &p, scratch);
    }
}

static int scan_run(const Scan *s, int backward) {
    ScanCall call = {s, backward};
    size_t blocks = (size_t)(s->d / s->g + W - 1) / W, n = (size_t)s->n;
    size_t vectors = blocks * (7 * n + 2) + 2 * (size_t)rows_size(s->n) + 7 * W;
    return run_tasks(scan_task, &call, s->b * s->g * s->parts, s->threads,
                     vectors * sizeof(vec) + CHUNK * 2 * n * sizeof(float) + 16 * 64);
}

int EXPORT(medmamba_scan_forward)(const Scan *s) { return scan_run(s, 0); }
int EXPORT(medmamba_scan_backward)(const Scan *s) { return scan_run(s, 1); }
