// Calls one function of the scan kernel on arrays from a file, so that the kernel can run where
// Python does not: on another processor, or under a tool that watches memory.
//
//     scan_driver FUNCTION INPUT OUTPUT      exits with what the function returned
//     scan_driver sizes                      prints the vector's width and the chunk
//
// INPUT starts with one record for each field of the function's struct, in order; then come the bytes
// of the input arrays. OUTPUT is the bytes of the output arrays.
//
// The function runs twice: with each array right before a page that cannot be touched, then right
// behind one. So an access outside is caught even where no tool sees it, as in a masked load.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "kernel.h"

#define CALL(name) JOIN(name, ISA)
int CALL(medmamba_scan_width)(void);
int CALL(medmamba_scan_chunk)(void);
int CALL(medmamba_scan_forward)(const Scan *);
int CALL(medmamba_scan_backward)(const Scan *);
int CALL(medmamba_ss2d_forward)(const Ss2d *);
int CALL(medmamba_ss2d_backward)(const Ss2d *);

enum { NUMBER, INPUT, OUTPUT, MOST = 64 };

typedef struct {
    int64_t kind, value; // the number, or the array's bytes
} Field;

typedef union {
    int64_t words[MOST]; // every field of either struct is as large as one
    Scan scan;
    Ss2d ss2d;
} Arguments;

static void fail(const char *what) {
    perror(what);
    exit(99);
}

static char *guarded(size_t bytes, int at_end) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    char *all = mmap(NULL, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED || mprotect(all + page, inside, PROT_READ | PROT_WRITE)) fail("memory");
    return all + page + (at_end ? inside - bytes : 0);
}

// Runs the function on arrays of its own; what it wrote goes to `results`.
static int run(const char *function, const Field *fields, size_t count, const char *inputs,
               int at_end, char *results) {
    Arguments call = {{0}};
    for (size_t i = 0; i < count; i++) {
        size_t bytes = (size_t)fields[i].value;
        call.words[i] = fields[i].value;
        if (fields[i].kind == NUMBER) continue;
        char *array = guarded(bytes, at_end);
        call.words[i] = (intptr_t)array;
        memset(array, 0xff, bytes); // NaN, where the function writes nothing
        if (fields[i].kind != INPUT) continue;
        memcpy(array, inputs, bytes);
        inputs += bytes;
    }
    int result = 98;
    if (!strcmp(function, "scan_forward")) result = CALL(medmamba_scan_forward)(&call.scan);
    if (!strcmp(function, "scan_backward")) result = CALL(medmamba_scan_backward)(&call.scan);
    if (!strcmp(function, "ss2d_forward")) result = CALL(medmamba_ss2d_forward)(&call.ss2d);
    if (!strcmp(function, "ss2d_backward")) result = CALL(medmamba_ss2d_backward)(&call.ss2d);
    for (size_t i = 0; i < count; i++) {
        if (fields[i].kind != OUTPUT) continue;
        memcpy(results, (char *)(intptr_t)call.words[i], (size_t)fields[i].value);
        results += fields[i].value;
    }
    return result;
}

int main(int count, char **arguments) {
    if (count == 2 && !strcmp(arguments[1], "sizes")) {
        printf("%d %d\n", CALL(medmamba_scan_width)(), CALL(medmamba_scan_chunk)());
        return 0;
    }
    if (count != 4) fail("usage: scan_driver FUNCTION INPUT OUTPUT");
    const char *function = arguments[1];
    size_t num_fields =
        (strncmp(function, "scan", 4) ? sizeof(Ss2d) : sizeof(Scan)) / sizeof(int64_t);
    size_t sizes[3] = {0};
    Field fields[MOST];
    FILE *file = fopen(arguments[2], "rb");
    if (!file || fread(fields, sizeof(Field), num_fields, file) != num_fields) fail(arguments[2]);
    for (size_t i = 0; i < num_fields; i++) sizes[fields[i].kind] += (size_t)fields[i].value;
    char *inputs = malloc(sizes[INPUT]), *results = malloc(sizes[OUTPUT]),
         *again = malloc(sizes[OUTPUT]);
    if (!inputs || !results || !again) fail("memory");
    if (fread(inputs, 1, sizes[INPUT], file) != sizes[INPUT]) fail(arguments[2]);
    fclose(file);

    int result = run(function, fields, num_fields, inputs, 1, results);
    run(function, fields, num_fields, inputs, 0, again);
    if (memcmp(results, again, sizes[OUTPUT])) fail("the results depend on where the arrays are");

    file = fopen(arguments[3], "wb");
    if (!file || fwrite(results, 1, sizes[OUTPUT], file) != sizes[OUTPUT] || fclose(file))
        fail(arguments[3]);
    free(inputs);
    free(results);
    free(again);
    return result;
}
