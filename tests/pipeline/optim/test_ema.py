"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.optim.ema import Ema


def constant(value: float) -> nn.Linear:
    layer = nn.Linear(2, 3)
    nn.init.constant_(layer.weight, value)
    nn.init.constant_(layer.bias, value)
    return layer


def test_warm_up_forgets_the_start():
    layer = constant(0.0)
    ema = Ema(layer, 0.999)
    decays, remaining = [], 1.0
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1.0)
    for _ in range(20):
        decays.append(ema.current_decay())
        remaining *= decays[-1]
        ema.update(layer)
    assert decays[:2] == pytest.approx([1 / 10, 2 / 11])
    assert ema.average["bias"][0].item() == pytest.approx(1 - remaining, rel=1e-5)
    ema.updates = 10**6
    assert ema.current_decay() == 0.999


def test_copying_overwrites_the_weights_and_restarting_the_average():
    layer = constant(0.0)
    ema = Ema(layer, 0.5)
    ema.updates = 100  # after the warm-up
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1.0)
    ema.update(layer)
    kept = constant(3.0)
    ema.copy_to(kept)
    assert kept.weight[0, 0].item() == kept.bias[0].item() == 0.5
    assert kept.weight.requires_grad
    ema.restart(layer)
    assert ema.average["weight"][0, 0].item() == ema.average["bias"][0].item() == 1.0
    assert ema.updates == 101


def test_state_goes_on_where_it_stopped():
    layer, other = constant(0.0), constant(5.0)
    ema = Ema(layer, 0.9)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1.0)
    ema.update(layer)
    resumed = Ema(other, 0.9)
    resumed.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    ema.update(layer)
    resumed.update(layer)
    assert resumed.updates == ema.updates == 2
    assert torch.equal(resumed.average["weight"], ema.average["weight"])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"is 1.0; expected a number in \[0, 1\)"):
        Ema(constant(0.0), 1.0)
    ema = Ema(constant(0.0))
    with pytest.raises(ValueError, match="another module"):
        ema.load_state_dict({"updates": torch.tensor(1)})
    with pytest.raises(ValueError, match="other parameters"):
        ema.update(nn.Linear(2, 3, bias=False))
