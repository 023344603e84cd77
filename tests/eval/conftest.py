"""Networks for the tests of `eval`: pytorch-fid's own, and random weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eval.features.inception import FidInception
from eval.features.pytorch_fid import convolutions


def pytorch_fid_network(state: dict[str, Tensor]) -> torch.nn.Module:
    """Build pytorch-fid's own network, its download replaced by `state`."""
    import pytorch_fid.inception

    complete = {**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: complete)
        return pytorch_fid.inception.InceptionV3([3]).eval()


@pytest.fixture(scope="session")
def build_reference() -> Callable[[dict[str, Tensor]], torch.nn.Module]:
    return pytorch_fid_network


@pytest.fixture(scope="session")
def random_state() -> dict[str, Tensor]:
    """Weights of the right shapes that keep activations near one; no batch norm is trivial."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, convolution in convolutions().items():
        shape = convolution.conv.weight.shape
        n, fan_in = shape[0], math.prod(shape[1:])
        weight = torch.randn(shape, generator=generator)
        state[f"{name}.conv.weight"] = weight * (2 / fan_in) ** 0.5
        state[f"{name}.bn.weight"] = 0.9 + 0.2 * torch.rand(n, generator=generator)
        state[f"{name}.bn.bias"] = 0.1 * torch.randn(n, generator=generator)
        state[f"{name}.bn.running_mean"] = 0.1 * torch.randn(n, generator=generator)
        state[f"{name}.bn.running_var"] = 0.9 + 0.2 * torch.rand(n, generator=generator)
    return state


@pytest.fixture(scope="session")
def random_network(random_state: dict[str, Tensor]) -> FidInception:
    return FidInception(random_state)


@pytest.fixture(scope="session")
def random_reference(random_state: dict[str, Tensor]) -> torch.nn.Module:
    return pytorch_fid_network(random_state)
