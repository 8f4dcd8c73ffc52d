// The scan over an image, channels last: the k paths walk the pixels through a table, form their step
// sizes from r columns, and add what they give to the pixel. Nothing is flipped, transposed or kept per
// path. A task is one example and one part of the channels; it takes the paths one after the other.

typedef struct {
    const Ss2d *s;
    int backward;
} Ss2dCall;

typedef struct {
    long example, part, first_block, blocks, all_blocks, chunks;
} Ss2dPlace;

static Ss2dPlace ss2d_place(const Ss2d *s, long task) {
    Ss2dPlace p;
    p.part = task % s->parts;
    p.example = task / s->parts;
    p.all_blocks = (s->d + W - 1) / W;
    p.first_block = p.all_blocks * p.part / s->parts;
    p.blocks = p.all_blocks * (p.part + 1) / s->parts - p.first_block;
    p.chunks = (s->l + CHUNK - 1) / CHUNK;
    return p;
}

// One block of channels on one path.
typedef struct {
    int count;      // channels, at most W
    long channel;   // the first, of d
    long parameter; // the first, of k * d
    float *boundary;
} Ss2dBlock;

static Ss2dBlock ss2d_block(const Ss2d *s, const Ss2dPlace *p, long path, long i) {
    Ss2dBlock k;
    long index = p->first_block + i;
    k.channel = index * W;
    k.count = s->d - k.channel < W ? (int)(s->d - k.channel) : W;
    k.parameter = path * s->d + k.channel;
    k.boundary = s->boundaries
                     ? s->boundaries + ((p->example * s->k + path) * p->all_blocks + index) *
                                           p->chunks * s->n * W
                     : NULL;
    return k;
}

// Vectors over the channels of each block, from and to (k, d, columns). `to` has W vectors to spare.
static void load_columns(const Ss2d *s, const Ss2dPlace *p, long path, const float *from,
                         long stride, long columns, vec *to) {
    for (long i = 0; i < p->blocks; i++) {
        Ss2dBlock k = ss2d_block(s, p, path, i);
        load_chunk(from + p->example * stride + k.parameter * columns, columns, k.count,
                   (int)columns, 0, to + i * columns);
    }
}
static void store_columns(const Ss2d *s, const Ss2dPlace *p, long path, const vec *from,
                          long columns, float *to) {
    for (long i = 0; i < p->blocks; i++) {
        Ss2dBlock k = ss2d_block(s, p, path, i);
        store_chunk(to + (p->example * s->k * s->d + k.parameter) * columns, columns, k.count,
                    (int)columns, 0, from + i * columns);
    }
}

// delta before softplus of each step: bias + weight . columns, several steps at once.
INLINE void step_sizes(int steps, long r, vec bias, const vec *weight, const float *rows,
                       long stride, vec *delta) {
    int l = 0;
    for (; l + 8 <= steps; l += 8) {
        vec sum[8];
        UNROLL
        for (int j = 0; j < 8; j++) sum[j] = bias;
        for (long c = 0; c < r; c++) {
            vec w = weight[c];
            UNROLL
            for (int j = 0; j < 8; j++) sum[j] += w * rows[(l + j) * stride + c];
        }
        UNROLL
        for (int j = 0; j < 8; j++) delta[l + j] = sum[j];
    }
    for (; l < steps; l++) {
        vec sum = bias;
        for (long c = 0; c < r; c++) sum += weight[c] * rows[l * stride + c];
        delta[l] = sum;
    }
}

// Columns of the step size's projection that are taken at once: eight sums are then under way.
#define COLUMNS (W / 4)

// Gradients of columns c0 .. c0 + count - 1 at the steps of a chunk: of the weight, and of the columns
// themselves (r, CHUNK), which sum over channels; for them a vector holds W steps of one channel.
INLINE void column_gradients(const int count, int steps, int channels, long r, long c0,
                             const vec *to_delta, const vec *by_channel, const float *weight,
                             const float *rows, long stride, vec *grad_weight,
                             float *grad_columns) {
    vec of_weight[count], of_column[count][CHUNK / W];
    UNROLL
    for (int c = 0; c < count; c++) {
        of_weight[c] = broadcast(0.f);
        UNROLL
        for (int s = 0; s < CHUNK / W; s++)
            of_column[c][s] = load(grad_columns + (c0 + c) * CHUNK + s * W, W);
    }
    for (int l = 0; l < steps; l++) {
        UNROLL
        for (int c = 0; c < count; c++) of_weight[c] += to_delta[l] * rows[l * stride + c0 + c];
    }
    for (int i = 0; i < channels; i++) {
        UNROLL
        for (int c = 0; c < count; c++) {
            UNROLL
            for (int s = 0; s < CHUNK / W; s++)
                of_column[c][s] += by_channel[s * W + i] * weight[i * r + c0 + c];
        }
    }
    UNROLL
    for (int c = 0; c < count; c++) {
        grad_weight[c0 + c] += of_weight[c];
        UNROLL
        for (int s = 0; s < CHUNK / W; s++)
            store(grad_columns + (c0 + c) * CHUNK + s * W, of_column[c][s], W);
    }
}
static void projection_gradients(int steps, int channels, long r, const vec *to_delta,
                                 const float *weight, const float *rows, long stride,
                                 vec *grad_weight, float *grad_columns) {
    vec by_channel[CHUNK];
    for (int s = 0; s < CHUNK; s += W) {
        memcpy(by_channel + s, to_delta + s, sizeof(vec) * W);
        transpose(by_channel + s);
    }
    long c = 0;
    for (; c + COLUMNS <= r; c += COLUMNS)
        column_gradients(COLUMNS, steps, channels, r, c, to_delta, by_channel, weight, rows, stride,
                         grad_weight, grad_columns);
    for (; c < r; c++)
        column_gradients(1, steps, channels, r, c, to_delta, by_channel, weight, rows, stride,
                         grad_weight, grad_columns);
}

// The sums over lanes of n vectors of step l.
INLINE void store_sums(const vec *rows, int l, long n, float *sums) {
    for (long n0 = 0; n0 < n; n0 += W)
        store(sums + n0, row_sums(rows, l, n0), n - n0 < W ? (int)(n - n0) : W);
}

static void ss2d_forward(const Ss2d *s, const Ss2dPlace *p, char *scratch) {
    const long n = s->n, r = s->r, columns = r + 2 * n, d = s->d;
    vec *A = take(&scratch, p->blocks * n + W, sizeof(vec)),
        *h = take(&scratch, p->blocks * n, sizeof(vec));
    vec *weight = take(&scratch, p->blocks * r + W, sizeof(vec));
    float *rows = take(&scratch, CHUNK * columns, sizeof(float));
    const float *x = s->x + p->example * s->l * d;
    float *y = s->y + p->example * s->l * d;
    for (long path = 0; path < s->k; path++) {
        const int32_t *order = s->order + path * s->l;
        const float *projected = s->projected + (p->example * s->l * s->k + path) * columns;
        load_columns(s, p, path, s->A, s->A_stride, n, A);
        to_base_two(A, p->blocks * n);
        load_columns(s, p, path, s->dt_weight, s->dt_weight_stride, r, weight);
        memset(h, 0, sizeof(vec) * p->blocks * n);
        for (long chunk = 0; chunk < p->chunks; chunk++) {
            const int32_t *at = order + chunk * CHUNK;
            int steps = s->l - chunk * CHUNK < CHUNK ? (int)(s->l - chunk * CHUNK) : CHUNK;
            long left = s->l - chunk * CHUNK;
            for (int l = 0; l < steps; l++) {
                memcpy(rows + l * columns, projected + at[l] * s->k * columns,
                       sizeof(float) * columns);
                if (l + CHUNK < left)
                    for (long c = 0; c < columns + 15; c += 16)
                        __builtin_prefetch(projected + at[l + CHUNK] * s->k * columns + c, 0);
            }
            for (long i = 0; i < p->blocks; i++) {
                Ss2dBlock k = ss2d_block(s, p, path, i);
                vec delta[CHUNK], drive[CHUNK], sum[CHUNK];
                vec bias = load(s->dt_bias + p->example * s->dt_bias_stride + k.parameter, k.count);
                vec D = load(s->D + p->example * s->D_stride + k.parameter, k.count);
                step_sizes(steps, r, bias, weight + i * r, rows, columns, delta);
                for (int l = 0; l < steps; l++) {
                    vec pixel = load(x + at[l] * d + k.channel, k.count);
                    if (l + CHUNK < left) {
                        __builtin_prefetch(x + at[l + CHUNK] * d + k.channel, 0);
                        __builtin_prefetch(y + at[l + CHUNK] * d + k.channel, 1);
                    }
                    delta[l] = softplus_vec(delta[l], NULL);
                    drive[l] = delta[l] * pixel;
                    sum[l] = D * pixel;
                    if (path) sum[l] += load(y + at[l] * d + k.channel, k.count);
                }
                if (k.boundary) {
                    memcpy(k.boundary + chunk * n * W, h + i * n, sizeof(vec) * n);
                    if (CHUNK < left) want_to_write(k.boundary + (chunk + 1) * n * W, n);
                }
                Tile tile = {steps,   (int)n, delta, drive, rows + r,
                             columns, n,      NULL,  NULL,  A + i * n};
                forward_tile(0, 0, &tile, h + i * n, sum);
                for (int l = 0; l < steps; l++) store(y + at[l] * d + k.channel, sum[l], k.count);
            }
        }
    }
}

static void ss2d_backward(const Ss2d *s, const Ss2dPlace *p, char *scratch) {
    const long n = s->n, r = s->r, columns = r + 2 * n, d = s->d, states = p->blocks * n;
    vec *A = take(&scratch, states + W, sizeof(vec)), *grad_h = take(&scratch, states, sizeof(vec));
    vec *grad_A = take(&scratch, states + W, sizeof(vec));
    vec *weight = take(&scratch, p->blocks * r + W, sizeof(vec)),
        *grad_weight = take(&scratch, p->blocks * r + W, sizeof(vec));
    vec *grad_D = take(&scratch, p->blocks, sizeof(vec)),
        *grad_bias = take(&scratch, p->blocks, sizeof(vec));
    vec *B_rows = take(&scratch, rows_size(n), sizeof(vec)),
        *C_rows = take(&scratch, rows_size(n), sizeof(vec));
    float *rows = take(&scratch, CHUNK * columns, sizeof(float)),
          *grad_columns = take(&scratch, CHUNK * r, sizeof(float));
    const float *x = s->x + p->example * s->l * d, *grad_out = s->grad_y + p->example * s->l * d;
    float *grad_x = s->grad_x + p->example * s->l * d;
    for (long path = 0; path < s->k; path++) {
        const int32_t *order = s->order + path * s->l;
        const float *projected = s->projected + (p->example * s->l * s->k + path) * columns;
        float *grad_projected =
            s->grad_projected + ((p->part * s->b + p->example) * s->l * s->k + path) * columns;
        load_columns(s, p, path, s->A, s->A_stride, n, A);
        to_base_two(A, p->blocks * n);
        load_columns(s, p, path, s->dt_weight, s->dt_weight_stride, r, weight);
        memset(grad_h, 0, sizeof(vec) * states);
        memset(grad_A, 0, sizeof(vec) * states);
        memset(grad_weight, 0, sizeof(vec) * p->blocks * r);
        memset(grad_D, 0, sizeof(vec) * p->blocks);
        memset(grad_bias, 0, sizeof(vec) * p->blocks);
        for (long chunk = p->chunks - 1; chunk >= 0; chunk--) {
            const int32_t *at = order + chunk * CHUNK;
            int steps = s->l - chunk * CHUNK < CHUNK ? (int)(s->l - chunk * CHUNK) : CHUNK;
            for (int l = 0; l < steps; l++) {
                memcpy(rows + l * columns, projected + at[l] * s->k * columns,
                       sizeof(float) * columns);
                if (chunk)
                    for (long c = 0; c < columns + 15; c += 16) {
                        __builtin_prefetch(projected + at[l - CHUNK] * s->k * columns + c, 0);
                        __builtin_prefetch(grad_projected + at[l - CHUNK] * s->k * columns + c, 1);
                    }
            }
            memset(grad_columns, 0, sizeof(float) * CHUNK * r);
            for (long i = 0; i < p->blocks; i++) {
                Ss2dBlock k = ss2d_block(s, p, path, i);
                vec pixels[CHUNK], delta[CHUNK], drive[CHUNK], slope[CHUNK], grad_y[CHUNK],
                    to_drive[CHUNK], to_decay[CHUNK];
                vec bias = load(s->dt_bias + p->example * s->dt_bias_stride + k.parameter, k.count);
                vec D = load(s->D + p->example * s->D_stride + k.parameter, k.count);
                vec sum_D = broadcast(0.f), sum_bias = broadcast(0.f);
                step_sizes(steps, r, bias, weight + i * r, rows, columns, delta);
                for (int l = 0; l < steps; l++) {
                    pixels[l] = load(x + at[l] * d + k.channel, k.count);
                    grad_y[l] = load(grad_out + at[l] * d + k.channel, k.count);
                    if (chunk) {
                        __builtin_prefetch(x + at[l - CHUNK] * d + k.channel, 0);
                        __builtin_prefetch(grad_out + at[l - CHUNK] * d + k.channel, 0);
                        __builtin_prefetch(grad_x + at[l - CHUNK] * d + k.channel, 1);
                    }
                    delta[l] = softplus_vec(delta[l], &slope[l]);
                    drive[l] = delta[l] * pixels[l];
                    sum_D += pixels[l] * grad_y[l];
                }
                Tile tile = {steps,   (int)n, delta, drive, rows + r,
                             columns, n,      NULL,  NULL,  A + i * n};
                TileGradient g = {grad_h + i * n, to_drive, to_decay, grad_A + i * n,
                                  B_rows,         C_rows,   NULL,     NULL};
                if (chunk) want_to_read(k.boundary + (chunk - 1) * n * W, n);
                const vec_in_memory *start = (const vec_in_memory *)(k.boundary + chunk * n * W);
                if (i == 0)
                    backward_tile(0, 0, 1, &tile, start, grad_y, &g);
                else
                    backward_tile(0, 0, 0, &tile, start, grad_y, &g);
                for (int l = 0; l < steps; l++) {
                    vec of_pixel = delta[l] * to_drive[l] + D * grad_y[l];
                    to_decay[l] = (to_decay[l] * LN_2 + pixels[l] * to_drive[l]) * slope[l];
                    sum_bias += to_decay[l];
                    if (path) of_pixel += load(grad_x + at[l] * d + k.channel, k.count);
                    store(grad_x + at[l] * d + k.channel, of_pixel, k.count);
                }
                for (int l = steps; l < CHUNK; l++) to_decay[l] = broadcast(0.f);
                const float *weight_rows =
                    s->dt_weight + p->example * s->dt_weight_stride + k.parameter * r;
                projection_gradients(steps, k.count, r, to_decay, weight_rows, rows, columns,
                                     grad_weight + i * r, grad_columns);
                grad_D[i] += sum_D;
                grad_bias[i] += sum_bias;
            }
            for (int l = 0; l < steps; l++) {
                float *row = grad_projected + at[l] * s->k * columns;
                for (long c = 0; c < r; c++) row[c] = grad_columns[c * CHUNK + l];
                store_sums(B_rows, l, n, row + r);
                store_sums(C_rows, l, n, row + r + n);
            }
        }
        store_columns(s, p, path, grad_A, n, s->grad_A);
        store_columns(s, p, path, grad_weight, r, s->grad_dt_weight);
        for (long i = 0; i < p->blocks; i++) {
            Ss2dBlock k = ss2d_block(s, p, path, i);
            store(s->grad_D + p->example * s->k * d + k.parameter, grad_D[i], k.count);
            store(s->grad_dt_bias + p->example * s->k * d + k.parameter, grad_bias[i], k.count);
        }
    }
}

static void ss2d_task(const void *arguments, long task, char *scratch) {
    const Ss2dCall *call = arguments;
    Ss2dPlace p = ss2d_place(call->s, task);
    if (call->backward)
        ss2d_backward(call->s, &p, scratch);
    else
        ss2d_forward(call->s, &p, scratch);
}

// Whether each path visits every position once; or NO_MEMORY.
static int check_order(const Ss2d *s) {
    int32_t *path_of =
        calloc((size_t)s->l, sizeof *path_of); // the last path that visited a position
    if (!path_of) return NO_MEMORY;
    int outcome = DONE;
    for (int32_t path = 1; path <= s->k && outcome == DONE; path++)
        for (const int32_t *at = s->order + (path - 1) * s->l, *end = at + s->l; at < end; at++) {
            if (*at < 0 || *at >= s->l || path_of[*at] == path) {
                outcome = BAD_ORDER;
                break;
            }
            path_of[*at] = path;
        }
    free(path_of);
    return outcome;
}

static int ss2d_run(const Ss2d *s, int backward) {
    int outcome = check_order(s);
    if (outcome != DONE) return outcome;
    Ss2dCall call = {s, backward};
    size_t blocks = (size_t)(s->d + W - 1) / W, n = (size_t)s->n, r = (size_t)s->r;
    size_t vectors = blocks * (3 * n + 2 * r + 2) + 2 * (size_t)rows_size(s->n) + 7 * W;
    return run_tasks(ss2d_task, &call, s->b * s->parts, s->threads,
                     vectors * sizeof(vec) + CHUNK * (2 * r + 2 * n) * sizeof(float) + 16 * 64);
}

int EXPORT(medmamba_ss2d_forward)(const Ss2d *s) { return ss2d_run(s, 0); }
int EXPORT(medmamba_ss2d_backward)(const Ss2d *s) { return ss2d_run(s, 1); }
