"""A training step of the whole tiny, scan and all, against the official code without its scan.

    python benchmarks/model_step.py [--quick] [--json]

Tiny at 224 pixels, batch 8, forward, loss, backward and the same fused AdamW for both, on the same
threads, with freed memory kept as the commands keep it. Ours runs its scans. The other is the
official model's data movement, written out below: convolutions on contiguous channels, four
flipped and transposed copies of what is scanned, einsums for the projections, one output for each
direction. Of its scan only the softplus of the step sizes is left, and one addition; with the real
scan in place its logits are first compared with ours. They take turns; a ratio is the median over
the rounds of its time over ours.

* ``step_vs_official_without_scan``, ``forward_vs_official_without_scan`` (no gradients).
* ``step_vs_official_without_softplus``: the softplus is left out too.
* ``seconds_per_step_tiny_224``: ours, the median.
* ``seconds_per_step_checkpointed``: ours with activation checkpointing, the median.
* ``peak_mib``, ``peak_mib_checkpointed``, ``peak_mib_official_without_scan``: how far a fresh
  process grows above its model and images in three steps.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands set it

import torch
from measuring import describe_machine, median_ratio, need_native, print_figures, seconds
from torch import Tensor, nn
from torch.nn import functional

from medmamba import MedMamba
from medmamba.scan import selective_scan
from medmamba.weights import to_official
from strategies.cli import keep_freed_memory

BATCH, PIXELS, CLASSES = 8, 224, 6
RANK_DIVISOR, STATE = 16, 16
OURS, CHECKPOINTED = "ours", "checkpointed"
OFFICIAL, NO_SOFTPLUS = "official", "no-softplus"

Scan = Callable[..., Tensor]


class NoScan(torch.autograd.Function):
    """In place of a scan: u + delta; every input still gets a gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx,
        u: Tensor,
        delta: Tensor,
        *others: Tensor,
    ) -> Tensor:
        """Add u and delta, both (b, (k d), l)."""
        ctx.save_for_backward(*others)
        return u + delta

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, ...]:
        """Hand on the gradient (b, (k d), l); of the other inputs it is zero."""
        others: tuple[Tensor, ...] = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return (gradient, gradient, *(torch.zeros_like(other) for other in others))


def no_scan(u: Tensor, delta: Tensor, *others: Tensor, delta_bias: Tensor) -> Tensor:
    """Take the arguments of a scan, and scan nothing."""
    return NoScan.apply(u, delta, *others, delta_bias)  # pyright: ignore[reportReturnType]


def softplus_alone(u: Tensor, delta: Tensor, *others: Tensor, delta_bias: Tensor) -> Tensor:
    """Scan nothing either, but make the step sizes positive."""
    return no_scan(u, functional.softplus(delta), *others, delta_bias=delta_bias)


def true_scan(*arguments: Tensor, delta_bias: Tensor) -> Tensor:
    """Scan as the official code does."""
    return selective_scan(*arguments, delta_bias=delta_bias, delta_softplus=True)


class OfficialSS2D(nn.Module):
    """The state-space branch with the official names, copies and products."""

    def __init__(self, d_model: int, scan: Scan) -> None:
        super().__init__()
        d, self.rank, self.scan = 2 * d_model, -(-d_model // RANK_DIVISOR), scan
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.conv2d = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.x_proj_weight = nn.Parameter(torch.empty(4, self.rank + 2 * STATE, d))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, d, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, d))
        self.A_logs = nn.Parameter(torch.empty(4 * d, STATE))
        self.Ds = nn.Parameter(torch.empty(4 * d))
        self.out_norm = nn.LayerNorm(d)
        self.out_proj = nn.Linear(d, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, h, w, d_model) to the same shape."""
        b, h, w, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)  # twice (b, h, w, d)
        x = functional.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))  # (b, d, h, w)
        columns = x.transpose(2, 3).contiguous().view(b, -1, h * w)
        both = torch.stack((x.view(b, -1, h * w), columns), dim=1)  # (b, 2, d, l)
        xs = torch.cat((both, both.flip(-1)), dim=1)  # (b, k, d, l)
        projected = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight)
        dts, Bs, Cs = projected.split((self.rank, STATE, STATE), dim=2)
        dts = torch.einsum("bkrl,kdr->bkdl", dts, self.dt_projs_weight)
        y = self.scan(
            xs.view(b, -1, h * w),
            dts.contiguous().view(b, -1, h * w),
            -torch.exp(self.A_logs),
            Bs,
            Cs,
            self.Ds,
            delta_bias=self.dt_projs_bias.view(-1),
        ).view(b, 4, -1, h * w)
        back = y[:, 2:4].flip(-1)  # (b, 2, d, l)
        turned = y[:, 1].view(b, -1, w, h).transpose(2, 3).contiguous().view(b, -1, h * w)
        turned_back = back[:, 1].view(b, -1, w, h).transpose(2, 3).contiguous().view(b, -1, h * w)
        y = y[:, 0] + back[:, 0] + turned + turned_back  # (b, d, l)
        y = self.out_norm(y.transpose(1, 2).contiguous().view(b, h, w, -1))
        return self.out_proj(y * functional.silu(z))


class OfficialBlock(nn.Module):
    """Split, two branches, shuffle, residual."""

    def __init__(self, c: int, scan: Scan) -> None:
        super().__init__()
        self.ln_1, self.self_attention = nn.LayerNorm(c // 2), OfficialSS2D(c // 2, scan)
        c //= 2
        self.conv33conv33conv11 = nn.Sequential(
            nn.BatchNorm2d(c),
            nn.Conv2d(c, c, 3, padding=1),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, padding=1),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, c, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, h, w, c) to the same shape."""
        left, right = x.chunk(2, dim=-1)
        right = self.self_attention(self.ln_1(right))
        left = self.conv33conv33conv11(left.permute(0, 3, 1, 2).contiguous())
        joined = torch.cat((left.permute(0, 2, 3, 1).contiguous(), right), dim=-1)
        return joined.unflatten(3, (2, -1)).transpose(3, 4).contiguous().flatten(3) + x


class OfficialMerge(nn.Module):
    """Four corners into one position."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * c), nn.Linear(4 * c, 2 * c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, h, w, c), both even, to (b, h/2, w/2, 2c)."""
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class OfficialModel(nn.Module):
    """Tiny, without stochastic depth."""

    def __init__(self, scan: Scan) -> None:
        super().__init__()
        depths, dims = (2, 2, 4, 2), (96, 192, 384, 768)
        projection = nn.Conv2d(3, dims[0], 4, stride=4)
        self.patch_embed = nn.ModuleDict({"proj": projection, "norm": nn.LayerNorm(dims[0])})
        self.layers = nn.ModuleList()
        for depth, c in zip(depths, dims, strict=True):
            stage = OrderedDict[str, nn.Module](
                blocks=nn.Sequential(*(OfficialBlock(c, scan) for _ in range(depth)))
            )
            if c != dims[-1]:
                stage["downsample"] = OfficialMerge(c)
            self.layers.append(nn.Sequential(stage))
        self.head = nn.Linear(dims[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 3, h, w) to logits."""
        x = self.patch_embed["norm"](self.patch_embed["proj"](images).permute(0, 2, 3, 1))
        for stage in self.layers:
            x = stage(x)
        x = functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1)
        return self.head(x.flatten(1))


def make(which: str, scan: Scan = softplus_alone) -> nn.Module:
    """Return one of the models, in training, with the weights of one seed."""
    torch.manual_seed(0)
    ours = MedMamba.from_name(
        "tiny", CLASSES, drop_path=0.0, activation_checkpointing=which == CHECKPOINTED
    )
    if which in (OURS, CHECKPOINTED):
        return ours
    official = OfficialModel(no_scan if which == NO_SOFTPLUS else scan)
    official.load_state_dict(to_official(ours))
    return official


def check_official() -> None:
    """Stop unless the model written out above is the official one."""
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            make(OFFICIAL, true_scan)(images), make(OURS)(images), rtol=1e-4, atol=1e-4
        )


def steps(which: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a training step and a forward pass without gradients."""
    model = make(which)
    images, labels = torch.randn(BATCH, 3, PIXELS, PIXELS), torch.arange(BATCH) % CLASSES
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        optimiser.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    def forward() -> None:
        with torch.no_grad():
            model(images)

    return train, forward


def time_figures(rounds: int) -> dict[str, float]:
    """Return ratios and seconds; all take turns."""
    work = {which: steps(which) for which in (OURS, OFFICIAL, NO_SOFTPLUS, CHECKPOINTED)}
    train: dict[str, list[float]] = {which: [] for which in work}
    forward: dict[str, list[float]] = {which: [] for which in work}
    for turn in range(rounds + 1):
        for which, (one_step, one_forward) in work.items():
            times = seconds(one_step), seconds(one_forward)
            if turn:  # the first warms up
                train[which].append(times[0])
                forward[which].append(times[1])
    return {
        "step_vs_official_without_scan": median_ratio(train[OFFICIAL], train[OURS]),
        "forward_vs_official_without_scan": median_ratio(forward[OFFICIAL], forward[OURS]),
        "step_vs_official_without_softplus": median_ratio(train[NO_SOFTPLUS], train[OURS]),
        "seconds_per_step_tiny_224": statistics.median(train[OURS]),
        "seconds_per_step_checkpointed": statistics.median(train[CHECKPOINTED]),
    }


def peak_mib(which: str) -> float:
    """Return how far this process grows in three training steps."""
    one_step, _ = steps(which)
    before = _peak_kib()
    for _ in range(3):
        one_step()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    # getrusage would count what the parent had before this program replaced it.
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def peak_figures() -> dict[str, float]:
    """Return the growth of one fresh process each."""
    names = {OURS: "peak_mib", CHECKPOINTED: "peak_mib_checkpointed"}
    names[OFFICIAL] = "peak_mib_official_without_scan"
    return {
        name: float(subprocess.check_output([sys.executable, __file__, "--peak", which], text=True))
        for which, name in names.items()
    }


def main() -> None:
    """Print a table, or one JSON object."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="fewer rounds")
    options.add_argument("--json", action="store_true", help="one JSON object")
    options.add_argument("--peak", help=argparse.SUPPRESS)
    given = options.parse_args()
    need_native()
    keep_freed_memory()
    if given.peak:
        print(peak_mib(given.peak))
        return
    check_official()
    figures = time_figures(rounds=3 if given.quick else 11) | peak_figures()
    machine = describe_machine()
    print_figures(machine, figures, as_json=given.json)


if __name__ == "__main__":
    main()
