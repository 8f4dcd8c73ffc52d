"""F28: a model with BatchNorm, whose buffers hold running statistics and a counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fakes.experiments import SITES, make_scenario, start
from fakes.orders import unverified
from medmamba.model import MedMamba
from medmamba.weights import load, to_arrays
from server.rounds import initial_weights
from strategies.fedavg import FedAvg, WeightedMean


@pytest.mark.fault(
    "F28",
    fault="The model has BatchNorm: floating-point buffers and integer ones",
    injection="a federation with model.norm=batch; everything that travels is looked at",
    promise="running statistics are averaged like weights, as the strategy declares; counters "
    "(num_batches_tracked) never travel and are never averaged",
)
def test_counters_stay_and_statistics_are_averaged(tmp_path, monkeypatch):
    scenario = make_scenario(run__model__norm="batch", run__num_server_rounds=1)
    model = MedMamba.from_name(scenario.run.model.size, **scenario.run.model.architecture)
    state = model.state_dict()
    counters = {name for name, value in state.items() if not value.is_floating_point()}
    statistics = {name for name in state if name.endswith(("running_mean", "running_var"))}
    assert counters
    assert {name.rpartition(".")[2] for name in counters} == {"num_batches_tracked"}
    assert statistics

    sent, arrived = [], []
    add = WeightedMean.add

    def overhear(site, message):
        sent.append(unverified(message.content).weights)
        return "deliver"

    def take(self, reply):
        arrived.append(reply)
        add(self, reply)

    monkeypatch.setattr(WeightedMean, "add", take)
    path = tmp_path / "run"
    start(path, scenario, fault=overhear)
    assert [reply.site for reply in arrived] == list(SITES)

    for arrays in [*sent, *(reply.update for reply in arrived)]:
        assert set(arrays) == set(state) - counters
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}

    assert FedAvg.buffer_rule == "averaged"
    final, first = load(path / "model.safetensors"), initial_weights(scenario.run)
    total = sum(reply.num_examples for reply in arrived)
    for name in statistics:
        mean = sum(reply.num_examples / total * reply.update[name] for reply in arrived)
        assert np.abs(mean).max() > 0
        np.testing.assert_allclose(to_arrays(final)[name], first[name] + mean, rtol=1e-5, atol=1e-7)
    for name in counters:
        value = final.state_dict()[name]
        assert (value.dtype, value.item()) == (torch.int64, 0)
