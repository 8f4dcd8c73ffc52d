// The recurrence on one tile: W channels (lanes) times at most CHUNK steps.
//
//     h_t = exp(delta_t A) h_{t-1} + drive_t B_t        y_t = C_t . h_t + D u_t
//
// with drive = delta u. States are taken a few at a time, so that they stay in registers while time
// runs innermost. The forward pass keeps the state at the start of each tile alone; the backward pass
// computes the states inside a tile again from it.
//
// B and C of a step are scalars that all channels share, at row[n] and row[n + C_offset]; where they
// are constant in time they are vectors of the channels instead.
#include "vector.h"

#define CHUNK 32

#define STATES 4 // that are kept in registers at once

// exp(delta A) is computed as 2^(delta A log2(e)). A is kept finite: -inf times a step of 0 is no number.
static void to_base_two(vec *A, long count) {
    for (long i = 0; i < count; i++) A[i] = at_least(broadcast(-FLT_MAX), A[i] * LOG2_E);
}

typedef struct {
    int steps, n;              // steps of this tile, states
    const vec *delta, *drive;  // (steps)
    const float *rows;         // B and C of each step
    long row_stride, C_offset; // in floats
    const vec *B, *C;          // (n) where constant in time, else NULL
    const vec *A;              // (n), times log2(e)
} Tile;

INLINE void forward_states(const int count, const int constant_B, const int constant_C,
                           const Tile *t, int n0, vec *h, vec *y) {
    vec state[count], A[count];
    UNROLL
    for (int i = 0; i < count; i++) {
        state[i] = h[n0 + i];
        A[i] = t->A[n0 + i];
    }
    for (int l = 0; l < t->steps; l++) {
        vec delta = t->delta[l], drive = t->drive[l], sum = y[l];
        const float *row = t->rows + l * t->row_stride + n0;
        UNROLL
        for (int i = 0; i < count; i++) {
            vec B = constant_B ? t->B[n0 + i] : broadcast(row[i]);
            vec C = constant_C ? t->C[n0 + i] : broadcast(row[t->C_offset + i]);
            state[i] = exp2_vec(delta * A[i]) * state[i] + drive * B;
            sum += state[i] * C;
        }
        y[l] = sum;
    }
    UNROLL
    for (int i = 0; i < count; i++) h[n0 + i] = state[i];
}

// y[l] += C_l . h_l, and h moves on to the end of the tile.
INLINE void forward_tile(const int constant_B, const int constant_C, const Tile *t, vec *h,
                         vec *y) {
    int n0 = 0;
    for (; n0 + STATES <= t->n; n0 += STATES)
        forward_states(STATES, constant_B, constant_C, t, n0, h, y);
    for (; n0 < t->n; n0++) forward_states(1, constant_B, constant_C, t, n0, h, y);
}

// What the backward pass of a tile adds to. The gradient of a shared B or C is summed over all tiles
// of a group lane by lane, and over lanes only at the end (sum_lanes).
typedef struct {
    vec *state;           // (n) gradient of h at the end of the tile; leaves as that at its start
    vec *drive;           // (steps) written: sum over n of grad h_t B_t
    vec *decay;           // (steps) written: sum over n of grad a_t a_t A, with A times log2(e)
    vec *A;               // (n)
    vec *B_rows, *C_rows; // of shared B and C: see row_at
    vec *B, *C;           // (n) of constant ones
} TileGradient;

// What is summed over lanes at the end is kept as one row of vectors per step, cut into groups of four
// vectors that lie CHUNK groups apart: a pass over four states then touches memory in one piece. Rows
// of n vectors one after the other put all steps of a pass into the same few sets of the cache.
INLINE long row_at(int l, long n) { return (n / 4 * CHUNK + l) * 4 + n % 4; }
INLINE long rows_size(long n) { return (n + W - 1) / W * W * CHUNK; }
// The sums over lanes of n0 .. n0 + W - 1 at step l.
INLINE vec row_sums(const vec *rows, int l, long n0) {
    return sum_lanes(rows + row_at(l, n0), 4 * CHUNK);
}

// A hint that the n vectors at p will be written, or read.
INLINE void want_to_write(const float *p, long n) {
    for (long i = 0; i < n * W; i += 16) __builtin_prefetch(p + i, 1);
}
INLINE void want_to_read(const float *p, long n) {
    for (long i = 0; i < n * W; i += 16) __builtin_prefetch(p + i, 0);
}

INLINE void backward_states(const int count, const int constant_B, const int constant_C,
                            const int first, const Tile *t, int n0, const vec_in_memory *start,
                            const vec *grad_y, TileGradient *g) {
    vec decays[CHUNK * count], states[(CHUNK + 1) * count];
    vec state[count], A[count];
    UNROLL
    for (int i = 0; i < count; i++) {
        states[i] = state[i] = start[n0 + i];
        A[i] = t->A[n0 + i];
    }
    for (int l = 0; l < t->steps; l++) {
        vec delta = t->delta[l], drive = t->drive[l];
        const float *row = t->rows + l * t->row_stride + n0;
        UNROLL
        for (int i = 0; i < count; i++) {
            vec B = constant_B ? t->B[n0 + i] : broadcast(row[i]);
            vec decay = exp2_vec(delta * A[i]);
            decays[l * count + i] = decay;
            states[(l + 1) * count + i] = state[i] = decay * state[i] + drive * B;
        }
    }
    // Sums over time have two levels, tile and scan: one level lost accuracy in A (measured 2.4x).
    vec grad[count], grad_A[count], grad_B[count], grad_C[count];
    UNROLL
    for (int i = 0; i < count; i++) {
        grad[i] = g->state[n0 + i];
        grad_A[i] = grad_B[i] = grad_C[i] = broadcast(0.f);
    }
    for (int l = t->steps - 1; l >= 0; l--) {
        vec delta = t->delta[l], drive = t->drive[l], grad_out = grad_y[l];
        vec sum_drive = n0 ? g->drive[l] : broadcast(0.f),
            sum_decay = n0 ? g->decay[l] : broadcast(0.f);
        const float *row = t->rows + l * t->row_stride + n0;
        vec *B_rows = g->B_rows + row_at(l, n0), *C_rows = g->C_rows + row_at(l, n0);
        UNROLL
        for (int i = 0; i < count; i++) {
            vec B = constant_B ? t->B[n0 + i] : broadcast(row[i]);
            vec C = constant_C ? t->C[n0 + i] : broadcast(row[t->C_offset + i]);
            vec of_state = grad[i] + grad_out * C;
            vec of_C = grad_out * states[(l + 1) * count + i], of_B = of_state * drive;
            if (constant_C)
                grad_C[i] += of_C;
            else
                C_rows[i] = first ? of_C : C_rows[i] + of_C;
            if (constant_B)
                grad_B[i] += of_B;
            else
                B_rows[i] = first ? of_B : B_rows[i] + of_B;
            sum_drive += of_state * B;
            grad[i] = of_state * decays[l * count + i];
            vec of_decay = grad[i] * states[l * count + i];
            sum_decay += of_decay * A[i];
            grad_A[i] += of_decay * delta;
        }
        g->drive[l] = sum_drive;
        g->decay[l] = sum_decay;
    }
    UNROLL
    for (int i = 0; i < count; i++) {
        g->state[n0 + i] = grad[i];
        g->A[n0 + i] += grad_A[i];
        if (constant_B) g->B[n0 + i] += grad_B[i];
        if (constant_C) g->C[n0 + i] += grad_C[i];
    }
}

// `first` says that nothing has been added to B_rows and C_rows yet: they are written.
INLINE void backward_tile(const int constant_B, const int constant_C, const int first,
                          const Tile *t, const vec_in_memory *start, const vec *grad_y,
                          TileGradient *g) {
    int n0 = 0;
    for (; n0 + STATES <= t->n; n0 += STATES)
        backward_states(STATES, constant_B, constant_C, first, t, n0, start, grad_y, g);
    for (; n0 < t->n; n0++)
        backward_states(1, constant_B, constant_C, first, t, n0, start, grad_y, g);
}
