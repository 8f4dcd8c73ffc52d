// The native selective scan: compiled once for each instruction set, with -DISA=<its name>.
//
// Source of the recurrence: arXiv 2312.00752, section 3.2; of the four paths: arXiv 2403.03849,
// section 3.2.
#include "kernel.h"
#include "core.h"
#include "tasks.h"
#include "scan.h"
#include "ss2d.h"

// Channels of a block, and steps of a chunk.
int EXPORT(medmamba_scan_width)(void) { return W; }
int EXPORT(medmamba_scan_chunk)(void) { return CHUNK; }
