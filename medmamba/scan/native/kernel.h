// The interface of the kernel: plain C, arrays of float32 in C order. library.py mirrors the structs.
//
// Letters as in the Python code: b batch, l time, d channels, g groups that share B and C, n state,
// k paths, r rank of the step size's projection. A *_stride is what lies between the parameters of
// two examples, in floats: 0 where all examples share them. NULL stands for an absent array.
// Gradients of parameters are written per example, never summed over the batch.
//
// Every result is the same for any number of threads. `parts` splits the channels of a task over
// threads; gradients that sum over channels are then written once per part. It changes the rounding of
// those, so callers derive it from shapes alone; a part has at least one block.
//
// Channels are computed in blocks of as many as a vector holds (width), and time in chunks; backward
// needs the state at the start of each chunk, which forward keeps in `boundaries`, as it likes it.
#include <stddef.h>
#include <stdint.h>

enum { DONE, NO_MEMORY, BAD_ORDER }; // what the functions return

typedef struct {
    const float *u, *delta;       // (b, d, l)
    const float *A;               // (d, n)
    const float *B, *C;           // (b, g, n, l), or (d, n) where constant
    const float *D, *delta_bias;  // (d)
    float *y;                     // (b, d, l)
    float *last_state;            // (b, d, n)
    float *boundaries;            // (b, g, blocks, chunks, n, width): forward writes it if not NULL
    const float *grad_y;          // (b, d, l)
    const float *grad_last_state; // (b, d, n)
    float *grad_u, *grad_delta;   // (b, d, l)
    float *grad_A;                // (b, d, n)
    float *grad_B, *grad_C;       // (parts, b, g, n, l), or (b, d, n) where constant
    float *grad_D, *grad_delta_bias; // (b, d)
    int64_t b, d, l, g, n;
    int64_t A_stride, D_stride, delta_bias_stride;
    int64_t softplus, B_is_constant, C_is_constant;
    int64_t parts, threads;
} Scan;

// The scan over an image along k paths, which `order` gives as positions: path i visits
// order[i * l], order[i * l + 1], ... Each path visits every position once. A row of `projected` is
// the step size's r columns, B and C of one path; delta = softplus(dt_weight . columns + dt_bias).
typedef struct {
    const float *x;         // (b, l, d)
    const float *projected; // (b, l, k, r + 2n)
    const float *dt_weight; // (k, d, r)
    const float *dt_bias;   // (k, d)
    const float *A;         // (k, d, n)
    const float *D;         // (k, d)
    const int32_t *order;   // (k, l)
    float *y;               // (b, l, d)
    float *boundaries;      // (b, k, blocks, chunks, n, width): forward writes it if not NULL
    const float *grad_y;    // (b, l, d)
    float *grad_x;          // (b, l, d)
    float *grad_projected;  // (parts, b, l, k, r + 2n)
    float *grad_dt_weight;  // (b, k, d, r)
    float *grad_dt_bias;    // (b, k, d)
    float *grad_A;          // (b, k, d, n)
    float *grad_D;          // (b, k, d)
    int64_t b, l, d, k, n, r;
    int64_t dt_weight_stride, dt_bias_stride, A_stride, D_stride;
    int64_t parts, threads;
} Ss2d;

// One set of symbols per instruction set: medmamba_scan_forward_avx512 and so on.
#define JOIN_AGAIN(name, isa) name##_##isa
#define JOIN(name, isa) JOIN_AGAIN(name, isa)
#define EXPORT(name) __attribute__((visibility("default"))) JOIN(name, ISA)
