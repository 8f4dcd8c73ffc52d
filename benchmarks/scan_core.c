// The kernel's own inner loop on data that stays in the processor's nearest cache: the roof that the
// fused operator is compared with. Same loops, same flags, same threads; no images, no step sizes.
#include "kernel.h"
#include "core.h"
#include "tasks.h"

// Tiles of a task, in groups that share the rows of B's and C's gradients: as many blocks of channels
// as an example has at tiny's first stage with 16 lanes. The first of a group writes, the others add.
enum { GROUPS = 32, BLOCKS = 6 };

typedef struct {
    int steps, n, backward;
} Core;

static void core_task(const void *arguments, long task, char *scratch) {
    const Core *core = arguments;
    const int n = core->n, steps = core->steps;
    vec *A = take(&scratch, n, sizeof(vec)), *h = take(&scratch, n, sizeof(vec));
    vec *start = take(&scratch, n, sizeof(vec));
    vec *grad_h = take(&scratch, n, sizeof(vec)), *grad_A = take(&scratch, n, sizeof(vec));
    vec *B_rows = take(&scratch, steps * n, sizeof(vec)),
        *C_rows = take(&scratch, steps * n, sizeof(vec));
    float *rows = take(&scratch, steps * 2 * n, sizeof(float));
    vec delta[CHUNK], drive[CHUNK], y[CHUNK], to_drive[CHUNK], to_decay[CHUNK];
    for (int i = 0; i < n; i++) {
        A[i] = broadcast(-LOG2_E * (i + 1));
        h[i] = start[i] = broadcast(0.1f);
        grad_h[i] = grad_A[i] = broadcast(0.f);
    }
    for (int l = 0; l < steps; l++) {
        delta[l] = broadcast(0.01f + 0.001f * l);
        drive[l] = broadcast(0.02f);
        y[l] = broadcast(0.f);
    }
    for (int i = 0; i < steps * 2 * n; i++) rows[i] = 0.01f * (float)((task + i) % 7);
    Tile tile = {.steps = steps,
                 .n = n,
                 .delta = delta,
                 .drive = drive,
                 .rows = rows,
                 .row_stride = 2 * n,
                 .C_offset = n,
                 .A = A};
    TileGradient gradient = {.state = grad_h,
                             .drive = to_drive,
                             .decay = to_decay,
                             .A = grad_A,
                             .B_rows = B_rows,
                             .C_rows = C_rows};
    for (int group = 0; group < GROUPS; group++)
        for (int block = 0; block < BLOCKS; block++) {
            if (!core->backward)
                forward_tile(0, 0, &tile, h, y);
            else if (block == 0)
                backward_tile(0, 0, 1, &tile, (const vec_in_memory *)start, drive, &gradient);
            else
                backward_tile(0, 0, 0, &tile, (const vec_in_memory *)start, drive, &gradient);
            // All of it counts as used, and as changed.
            __asm__ volatile(""
                             :
                             : "r"(delta), "r"(drive), "r"(y), "r"(to_drive), "r"(to_decay)
                             : "memory");
        }
}

// State updates of `tasks` tasks over `threads` threads; -1 if memory is short. The numbers come from
// outside so that the compiler cannot know them, as in the operator.
__attribute__((visibility("default"))) int64_t core_run(int64_t tasks, int64_t n, int64_t backward,
                                                        int64_t threads) {
    volatile int steps = CHUNK;
    Core core = {steps, (int)n, (int)backward};
    size_t bytes = (size_t)(5 * n + 2 * CHUNK * n) * sizeof(vec) +
                   (size_t)CHUNK * 2 * n * sizeof(float) + 8 * 64;
    if (run_tasks(core_task, &core, tasks, threads, bytes)) return -1;
    return tasks * GROUPS * BLOCKS * CHUNK * W * n;
}
