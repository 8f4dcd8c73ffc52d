"""Scans at random, with gradients, and how far two results are apart."""

from __future__ import annotations

import torch

from medmamba.scan import selective_scan, ss2d_scan

FORWARD, BACKWARD = 1e-5, 1e-4  # largest error, relative to the largest value
TINIEST = 1e-30  # below it an answer counts as 0: the kernel flushes denormal numbers
ORDINARY = (0.0, 1.0)  # mean and deviation of delta, before its bias and softplus
EXTREME = ((-12.0, 4.0), (0.0, 60.0), (30.0, 30.0))


def error(got, expected, floor=TINIEST):
    if not got.numel():
        return 0.0
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(floor))


def scan_inputs(b, g, channels, l, n, constant, per_example, delta, seed):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    d = g * channels

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    own = (b,) if per_example else ()
    mean, deviation = delta
    return {
        "u": normal(b, d, l),
        "delta": mean + deviation * normal(b, d, l),
        "A": -(1.5 * normal(*own, d, n)).exp(),
        "B": normal(d, n) if "B" in constant else normal(b, g, n, l),
        "C": normal(d, n) if "C" in constant else normal(b, g, n, l),
        "D": normal(*own, d),
        "delta_bias": normal(*own, d),
    }


def differentiate(inputs, dtype, backend, softplus=True):
    """y, the last state and all gradients of a loss that weighs both."""
    tensors = {k: t.detach().to(dtype).requires_grad_() for k, t in inputs.items()}
    y, state = selective_scan(
        **tensors, delta_softplus=softplus, return_last_state=True, backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
        for t in (y, state)
    )
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return {"y": y.detach(), "last_state": state.detach()} | dict(
        zip(tensors, gradients, strict=True)
    )


def assert_precise(inputs, softplus=True):
    expected = differentiate(inputs, torch.float64, "reference", softplus)
    got = differentiate(inputs, torch.float32, "native", softplus)
    for name, value in got.items():
        bound = FORWARD if name in ("y", "last_state") else BACKWARD
        assert error(value, expected[name]) <= bound, name


def ss2d_inputs(b, height, width, d, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    k = 4
    return [
        normal(b, height * width, d),
        normal(b, height * width, k * (r + 2 * n)),
        normal(k, d, r) / r**0.5,
        normal(k, d) - 2,
        -normal(k, d, n).exp(),
        normal(k, d),
    ]


def differentiate_paths(inputs, order, dtype, backend):
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    y = ss2d_scan(*tensors, order, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return y.detach(), *torch.autograd.grad((y * weight.to(dtype)).sum(), tensors)
