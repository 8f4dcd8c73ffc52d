"""The selective scan's Triton kernels; imported only where triton is (``triton.py`` launches them).

Every program is one warp that holds a tile of BLOCK_D channels by BLOCK_T steps and walks the
states n one after the other. Why so:

* A recurrence over thousands of steps leaves a GPU idle if each thread walks time alone, so time
  lies across the lanes and ``tl.associative_scan`` composes the steps; blocks of time follow one
  another through a carried state.
* With the channels of a tile in one thread's registers, the sums over n (y, and the gradients of u
  and delta) and over channels (those of B and C) need no exchange between threads.
* B and C are read once for all channels of a tile, and n is a plain loop: any n, no padding. The
  walks over time load the next state's operands ahead of this one's arithmetic: they have one or
  two warps for each scheduler, which is too few to hide the latency.
* No atomics. A sum over programs goes through partial sums that ``sum_parts_kernel`` adds in a
  fixed order, one example by itself: the same bytes in every run and in every batch.

``forward_kernel`` keeps the state after each block of time, ``carry_kernel`` walks back and keeps
the gradient that enters each block from its right; with both, ``backward_kernel`` recomputes the
states of one block by itself, so that blocks of time run side by side.

Steps past l have delta = 0, which leaves state and gradient as they are. Everything is float32.
The product of the decays of up to BLOCK_T steps is formed: where delta A > 0 makes that overflow,
results are NaN that a walk step by step may keep finite.

Letters as in ``medmamba.scan.reference``; G groups, K blocks of time, S splits of a group. Layouts:
u, delta, y and their gradients (b, d, l); A (b, d, n); D, bias (b, d); B, C (b, g, n, l) or (d, n);
states, carries (b, K, n, d); all contiguous, but for the parameters' batch stride, which is 0 where
the examples share them.
"""

# Without triton the sibling triton.py is what type checkers find.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false
from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides of which no address needs to know more: one compilation serves all their values.
PLAIN_NUMBERS = [
    "n", "groups", "blocks", "splits", "A_batch", "D_batch", "bias_batch", "B_groups", "C_groups",
]  # fmt: skip

# Above it softplus(x) is x, as in torch.nn.functional.softplus.
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)
# A = -inf would make NaN of the steps past l, where delta is 0.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _compose(decay_1, drive_1, decay_2, drive_2):
    """One step after another: h -> decay_2 (decay_1 h + drive_1) + drive_2."""
    return decay_2 * decay_1, decay_2 * drive_1 + drive_2


@triton.jit
def _gradient_of_states(decay_next, drive, after, last):
    """f_t = drive_t + decay_{t+1} f_{t+1} over a tile, with f = after (D, 1) on its right.

    A reverse scan turns its operands around by shuffles; with ``after`` in the last drive the
    product of the decays is not needed and need not be turned back.
    """
    drive += decay_next * tl.where(last, after, 0.0)
    _, f = tl.associative_scan((decay_next, drive), 1, _compose, reverse=True)
    return f


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0: hardware logarithms lose the digits of a small x."""
    s = x / (2.0 + x)  # log(1 + x) = 2 atanh(s)
    s2 = s * s
    series = 1.0 / 11 + s2 * (1.0 / 13)
    series = 1.0 / 7 + s2 * (1.0 / 9 + s2 * series)
    series = 1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * series))
    return tl.where(x < 0.5, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def _raw_delta(delta, rows, t, mask, bias):
    return tl.load(delta + rows + t, mask=mask, other=0.0).to(tl.float32) + bias  # (D, T)


@triton.jit
def _step_sizes(raw, mask, SOFTPLUS: tl.constexpr):
    """Softplus where asked for; 0 outside the mask."""
    if SOFTPLUS:
        raw = tl.where(raw > SOFTPLUS_THRESHOLD, raw, _log1p(tl.exp(raw)))
    return tl.where(mask, raw, 0.0)


@triton.jit
def _row(A, channel, k, n, mask):
    """A[channel, k] log2(e), so that exp is one exp2, and finite."""
    value = LOG2_E * tl.load(A + channel * n + k, mask=mask, other=0.0)
    return tl.where(value < LOWEST, LOWEST, value)[:, None]  # (D, 1)


@triton.jit
def _matrix(
    B, example_group, channel, t, k, n, length, mask_d, mask_t, CONSTANT: tl.constexpr
):  # fmt: skip
    """B[k] of a tile: (D, 1) if constant, else (1, T)."""
    if CONSTANT:
        return tl.load(B + channel * n + k, mask=mask_d, other=0.0).to(tl.float32)[:, None]
    start = (example_group * n + k) * length
    return tl.load(B + start + t, mask=mask_t, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _vector(values, channel, mask, PRESENT: tl.constexpr):
    """values[channel] (D, 1), or 0 without values."""
    if PRESENT:
        return tl.load(values + channel, mask=mask, other=0.0)[:, None]
    return tl.zeros_like(channel).to(tl.float32)[:, None]


@triton.jit
def _add(target, values, mask, started):
    """Add values to those at target, or store them if these are the first."""
    if started:
        values += tl.load(target, mask=mask, other=0.0)
    tl.store(target, values, mask=mask)


@triton.jit
def _boundary(values, mask, exists):
    """What lies at a boundary of two blocks of time (D, 1); 0 where there is none."""
    value = tl.zeros(values.shape, tl.float32)
    if exists:
        value = tl.load(values, mask=mask, other=0.0)
    return value[:, None]


@triton.jit
def _place(groups, d, BLOCK_D: tl.constexpr):
    """Which tile a program of the walks over time has: example, group, channels (D), mask (D)."""
    per_group = d // groups
    tiles = tl.cdiv(per_group, BLOCK_D)
    program = tl.program_id(0)
    within = (program % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    group = program // tiles % groups
    example = (program // tiles // groups).to(tl.int64)
    return example, group, (group * per_group + within).to(tl.int64), within < per_group


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def forward_kernel(
    u, delta, A, B, C, D, bias, y, states,
    d, l_units, n, groups, blocks, A_batch, D_batch, bias_batch, B_groups, C_groups,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write y, and the state after each block of time; grid b G ceil(d / G / BLOCK_D)."""
    l = l_units * ALIGN  # noqa: E741  so that the compiler knows how rows are aligned
    example, group, channel, mask_d = _place(groups, d, BLOCK_D)
    rows = ((example * d + channel) * l)[:, None]
    A += example * A_batch
    B_group = example * B_groups + group % B_groups
    C_group = example * C_groups + group % C_groups
    skip = _vector(D + example * D_batch, channel, mask_d, HAS_D)
    shift = _vector(bias + example * bias_batch, channel, mask_d, HAS_BIAS)
    states += example * blocks * n * d + channel
    for block in range(blocks):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = t < l
        mask = mask_d[:, None] & mask_t[None, :]
        raw = _raw_delta(delta, rows, t[None, :], mask, shift)
        dt = _step_sizes(raw, mask, SOFTPLUS)
        x = tl.load(u + rows + t[None, :], mask=mask, other=0.0).to(tl.float32)
        du = dt * x
        out = tl.zeros_like(du)
        if HAS_D:
            out += skip * x
        last = mask_d[:, None] & (tl.arange(0, BLOCK_T) == BLOCK_T - 1)[None, :]
        A_next = _row(A, channel, 0, n, mask_d)
        B_next = _matrix(B, B_group, channel, t, 0, n, l, mask_d, mask_t, B_CONSTANT)
        C_next = _matrix(C, C_group, channel, t, 0, n, l, mask_d, mask_t, C_CONSTANT)
        before_next = _boundary(states - n * d, mask_d, block > 0)
        for k in range(n):
            A_k, B_k, C_k, before = A_next, B_next, C_next, before_next
            j = tl.minimum(k + 1, n - 1)
            A_next = _row(A, channel, j, n, mask_d)
            B_next = _matrix(B, B_group, channel, t, j, n, l, mask_d, mask_t, B_CONSTANT)
            C_next = _matrix(C, C_group, channel, t, j, n, l, mask_d, mask_t, C_CONSTANT)
            before_next = _boundary(states - (n - j) * d, mask_d, block > 0)
            decay = tl.exp2(dt * A_k)
            decay, h = tl.associative_scan((decay, du * B_k), 1, _compose)
            h += decay * before
            out += h * C_k
            slots = (states + k * d)[:, None] + tl.zeros_like(t)[None, :]
            tl.store(slots, h, mask=last)
        tl.store(y + rows + t[None, :], out, mask=mask)
        states += n * d
        tl.debug_barrier()  # the next block reads the states that other threads have written


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def carry_kernel(
    grad_y, grad_last, delta, A, C, bias, carries,
    d, l_units, n, groups, blocks, A_batch, bias_batch, C_groups,
    HAS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    C_CONSTANT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the state at the first step after each block; grid as forward.

    f_t = C_t grad_y_t + exp(delta_{t+1} A) f_{t+1}; after the last step it is grad_last (b, d, n).
    """
    l = l_units * ALIGN  # noqa: E741
    example, group, channel, mask_d = _place(groups, d, BLOCK_D)
    rows = ((example * d + channel) * l)[:, None]
    A += example * A_batch
    C_group = example * C_groups + group % C_groups
    shift = _vector(bias + example * bias_batch, channel, mask_d, HAS_BIAS)
    carries += ((example + 1) * blocks - 1) * n * d + channel
    for k in range(n):
        end = tl.zeros_like(channel).to(tl.float32)
        if HAS_LAST:
            end = tl.load(grad_last + (example * d + channel) * n + k, mask=mask_d, other=0.0)
        tl.store(carries + k * d, end, mask=mask_d)
    for back in range(blocks - 1):
        tl.debug_barrier()  # this block reads what other threads have written
        block = blocks - 1 - back
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = t < l
        mask = mask_d[:, None] & mask_t[None, :]
        mask_next = mask_d[:, None] & (t + 1 < l)[None, :]
        raw = _raw_delta(delta, rows, t[None, :] + 1, mask_next, shift)
        dt_next = _step_sizes(raw, mask_next, SOFTPLUS)
        grad = tl.load(grad_y + rows + t[None, :], mask=mask, other=0.0).to(tl.float32)
        first = mask_d[:, None] & (tl.arange(0, BLOCK_T) == 0)[None, :]
        last = (tl.arange(0, BLOCK_T) == BLOCK_T - 1)[None, :]
        A_next = _row(A, channel, 0, n, mask_d)
        C_next = _matrix(C, C_group, channel, t, 0, n, l, mask_d, mask_t, C_CONSTANT)
        after_next = _boundary(carries, mask_d, True)
        for k in range(n):
            A_k, C_k, after = A_next, C_next, after_next
            j = tl.minimum(k + 1, n - 1)
            A_next = _row(A, channel, j, n, mask_d)
            C_next = _matrix(C, C_group, channel, t, j, n, l, mask_d, mask_t, C_CONSTANT)
            after_next = _boundary(carries + j * d, mask_d, True)
            f = _gradient_of_states(tl.exp2(dt_next * A_k), grad * C_k, after, last)
            slots = (carries + (k - n) * d)[:, None] + tl.zeros_like(t)[None, :]
            tl.store(slots, f, mask=first)
        carries -= n * d


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def backward_kernel(
    grad_y, u, delta, A, B, C, D, bias, states, carries,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
    d, l_units, n, groups, blocks, splits, A_batch, D_batch, bias_batch, B_groups, C_groups,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one block of time and one split of a group; grid b G S K.

    Partial sums: grad_A and those of constant B, C (b, K, d, n); grad_D, grad_bias (b, K, d);
    those of varying B, C (b, S, G, n, l).
    """
    l = l_units * ALIGN  # noqa: E741
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks % splits
    group = program // blocks // splits % groups
    example = (program // blocks // splits // groups).to(tl.int64)
    per_group = d // groups
    tiles = tl.cdiv(per_group, BLOCK_D)

    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = t < l
    last = (tl.arange(0, BLOCK_T) == BLOCK_T - 1)[None, :]
    A += example * A_batch
    B_group = example * B_groups + group % B_groups
    C_group = example * C_groups + group % C_groups
    part = (example * splits + split) * groups + group
    boundary = (example * blocks + block) * n * d
    sums = (example * blocks + block) * d
    first = split * tiles // splits
    for tile in range(first, (split + 1) * tiles // splits):
        started = tile > first
        within = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = within < per_group
        channel = (group * per_group + within).to(tl.int64)
        rows = ((example * d + channel) * l)[:, None]
        skip = _vector(D + example * D_batch, channel, mask_d, HAS_D)
        shift = _vector(bias + example * bias_batch, channel, mask_d, HAS_BIAS)

        mask = mask_d[:, None] & mask_t[None, :]
        dt = _step_sizes(_raw_delta(delta, rows, t[None, :], mask, shift), mask, SOFTPLUS)
        du = dt * tl.load(u + rows + t[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + rows + t[None, :], mask=mask, other=0.0).to(tl.float32)
        mask_next = mask_d[:, None] & (t + 1 < l)[None, :]
        raw_next = _raw_delta(delta, rows, t[None, :] + 1, mask_next, shift)
        dt_next = _step_sizes(raw_next, mask_next, SOFTPLUS)
        # What the step before drove into the state; the block's first step has it in ``before``.
        mask_before = (t > block * BLOCK_T) & mask_t
        inner = mask_d[:, None] & mask_before[None, :]
        raw_before = _raw_delta(delta, rows, t[None, :] - 1, inner, shift)
        du_before = _step_sizes(raw_before, inner, SOFTPLUS)
        du_before *= tl.load(u + rows + t[None, :] - 1, mask=inner, other=0.0).to(tl.float32)

        driven = tl.zeros_like(dt)  # sum over n of f B
        decayed = tl.zeros_like(dt)  # sum over n of f A exp(delta A) h_{t-1}, in units of ln 2
        for k in range(n):
            A_k = _row(A, channel, k, n, mask_d)
            B_k = _matrix(B, B_group, channel, t, k, n, l, mask_d, mask_t, B_CONSTANT)
            B_before = _matrix(B, B_group, channel, t - 1, k, n, l, mask_d, mask_before, B_CONSTANT)
            C_k = _matrix(C, C_group, channel, t, k, n, l, mask_d, mask_t, C_CONSTANT)
            slot = boundary + k * d + channel
            after = tl.load(carries + slot, mask=mask_d, other=0.0)[:, None]
            before = tl.zeros_like(after)
            if block > 0:
                before = tl.load(states + slot - n * d, mask=mask_d, other=0.0)[:, None]

            f = _gradient_of_states(tl.exp2(dt_next * A_k), grad * C_k, after, last)
            # The scan yields kept = exp(delta_t A) h_{t-1} and not h_t, from which kept could only
            # be had by a difference that loses its digits.
            decay = tl.exp2(dt * A_k)
            decay, kept = tl.associative_scan((decay, decay * du_before * B_before), 1, _compose)
            kept += decay * before

            driven += f * B_k
            flow = f * kept
            decayed += flow * A_k
            sums_k = (sums + channel) * n + k
            tl.store(grad_A + sums_k, tl.sum(flow * dt, 1), mask=mask_d)
            grad_B_k = f * du
            grad_C_k = (kept + du * B_k) * grad
            if B_CONSTANT:
                tl.store(grad_B + sums_k, tl.sum(grad_B_k, 1), mask=mask_d)
            else:
                _add(grad_B + (part * n + k) * l + t, tl.sum(grad_B_k, 0), mask_t, started)
            if C_CONSTANT:
                tl.store(grad_C + sums_k, tl.sum(grad_C_k, 1), mask=mask_d)
            else:
                _add(grad_C + (part * n + k) * l + t, tl.sum(grad_C_k, 0), mask_t, started)
        tl.debug_barrier()  # the next tile adds to the sums that other threads have written

        # Read once more rather than kept in registers through the loop.
        raw = _raw_delta(delta, rows, t[None, :], mask, shift)
        x = tl.load(u + rows + t[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_x = dt * driven
        if HAS_D:
            grad_x += skip * grad
            tl.store(grad_D + sums + channel, tl.sum(grad * x, 1), mask=mask_d)
        tl.store(grad_u + rows + t[None, :], grad_x, mask=mask)
        grad_dt = x * driven + LN_2 * decayed
        if SOFTPLUS:
            slope = tl.where(raw > SOFTPLUS_THRESHOLD, 1.0, 1.0 / (1.0 + tl.exp(-raw)))
            grad_dt *= slope
        tl.store(grad_delta + rows + t[None, :], grad_dt, mask=mask)
        if HAS_BIAS:
            grad_dt = tl.where(mask, grad_dt, 0.0)
            tl.store(grad_bias + sums + channel, tl.sum(grad_dt, 1), mask=mask_d)


@triton.jit
def sum_parts_kernel(parts, out, count, size, BLOCK: tl.constexpr):
    """Sum parts (outer, count, size) over count, in order; grid outer ceil(size / BLOCK)."""
    tiles = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    outer = (program // tiles).to(tl.int64)
    i = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(count):
        total += tl.load(parts + (outer * count + j) * size + i, mask=mask, other=0.0)
    tl.store(out + outer * size + i, total, mask=mask)
