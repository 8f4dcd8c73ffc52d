// Independent tasks over the threads of the OpenMP runtime that PyTorch uses.
#include <stdlib.h>

typedef void Task(const void *arguments, long task, char *scratch);

// Takes `count` objects of `size` bytes from the scratch memory, aligned for a vector.
static void *take(char **scratch, long count, size_t size) {
    char *taken = *scratch;
    *scratch += ((size_t)count * size + 63) / 64 * 64;
    return taken;
}

// The runtime's own entry: libgomp has it, and so have libomp and libiomp5. It is called by name because
// clang turns the pragma into calls that libgomp does not have.
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);

typedef struct {
    Task *task;
    const void *arguments;
    char *scratch;
    size_t bytes;
    long count, next, slots;
} Team;

static void work(void *data) {
    Team *team = data;
    char *own =
        team->scratch + (size_t)__atomic_fetch_add(&team->slots, 1, __ATOMIC_RELAXED) * team->bytes;
    unsigned mode = flush_denormals();
    for (long i; (i = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->count;)
        team->task(team->arguments, i, own);
    restore_mode(mode);
}

// Runs tasks 0 .. count - 1, each with `bytes` of scratch memory; none of them if memory is short.
// Which thread runs a task makes no difference to what it computes.
static int run_tasks(Task *task, const void *arguments, long count, long threads, size_t bytes) {
    if (threads > count) threads = count;
    if (threads < 1) threads = 1;
    bytes = (bytes + 4095) / 4096 * 4096;
    Team team = {task, arguments, aligned_alloc(4096, (size_t)threads * bytes), bytes, count, 0, 0};
    if (!team.scratch) return NO_MEMORY;
    GOMP_parallel(work, &team, (unsigned)threads, 0);
    free(team.scratch);
    return DONE;
}
