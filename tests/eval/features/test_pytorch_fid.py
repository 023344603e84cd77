"""The network without weights against the one that pytorch-fid builds."""

from __future__ import annotations

import torch

from eval.features.pytorch_fid import convolutions, network_from


def layout(network: torch.nn.Module) -> list[tuple[str, object]]:
    """Type and settings of every layer that computes something, in the order of the graph."""
    rows: list[tuple[str, object]] = []
    for module in network.modules():
        kind = type(module).__name__
        if isinstance(module, torch.nn.Conv2d):
            rows.append((kind, (tuple(module.weight.shape), module.stride, module.padding)))
        elif isinstance(module, torch.nn.BatchNorm2d):
            rows.append((kind, (module.num_features, module.eps)))
        elif "Inception" in kind and kind not in ("Inception3", "InceptionV3"):
            rows.append((kind, None))
    return rows


def test_the_network_is_pytorch_fids(random_state, random_reference):
    network = network_from(random_state)
    assert layout(network) == layout(random_reference)
    assert len(convolutions()) == 94
    assert not any(p.requires_grad for p in network.parameters()) and not network.training


def test_weights_are_shared_and_complete(random_state):
    network = network_from(random_state)
    state = network.state_dict()
    for name, tensor in random_state.items():
        assert state[name].data_ptr() == tensor.data_ptr(), name
    assert not any(tensor.is_meta for tensor in state.values())
    assert len(state) == len(random_state) + 94  # the counters of the batch norms
