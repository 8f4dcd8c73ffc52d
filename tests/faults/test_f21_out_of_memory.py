"""F21: a GPU without enough memory for the run."""

from __future__ import annotations

import pytest
import torch

from client import train as client_train
from client.site import registered
from fakes.experiments import make_scenario, model_bytes, site_line, start, statuses
from faults.in_process import Here, audited


@pytest.mark.fault(
    "F21",
    fault="A GPU runs out of memory in training",
    injection="torch.OutOfMemoryError in the second step of one site's round",
    promise="the site sits this round out with that reason, does not move to the CPU by itself, "
    "and trains in the next round if it can",
    simulated=True,
)
def test_a_site_out_of_memory_sits_the_round_out(tmp_path, monkeypatch):
    here, steps, devices = Here(), [], []
    loss = client_train.reweighted_loss

    def step(logits, *arguments, **options):
        if here.at("B", 1):
            steps.append(here.server_round)
            if len(steps) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        devices.append((here.site, logits.device, registered(here.site).device))
        return loss(logits, *arguments, **options)

    monkeypatch.setattr(client_train, "reweighted_loss", step)
    path = tmp_path / "run"
    start(path, make_scenario(), fault=here)
    assert statuses(path, "B") == ["refused", "ok"]
    assert site_line(path, 1, "B")["reason"] == (
        "out-of-memory: the GPU has too little memory for this run"
    )
    assert statuses(path, "A") == statuses(path, "C") == ["ok", "ok"]
    assert len(steps) == 2  # nothing was tried again, on this device or another
    assert len({device for site, *used in devices if site == "B" for device in used}) == 1
    first = audited(path / "sites" / "B" / "audit.jsonl", "answered")[0]
    assert (first["status"], first["reason"]) == ("refused", site_line(path, 1, "B")["reason"])
    assert model_bytes(path)
