"""pytorch-fid's Inception network, which defines the features that FID compares.

`fid_inception_v3` downloads weights while it is built, so the network is assembled here.

Reference: Heusel et al. 2017 (FID); Szegedy et al. 2016 (Inception v3).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


def empty_network() -> Any:  # noqa: ANN401 - torchvision is untyped
    """Build torchvision's `Inception3` with pytorch-fid's blocks, without the classifier.

    It maps images (B, 3, 299, 299) in [-1, 1] to pool3 features (B, 2048). Its tensors are on the
    meta device.
    """
    import pytorch_fid.inception as fid  # both take seconds to import
    import torchvision

    with torch.device("meta"):
        network = torchvision.models.inception_v3(
            num_classes=1008, aux_logits=False, weights=None, init_weights=False
        )
        network.Mixed_5b = fid.FIDInceptionA(192, pool_features=32)
        network.Mixed_5c = fid.FIDInceptionA(256, pool_features=64)
        network.Mixed_5d = fid.FIDInceptionA(288, pool_features=64)
        network.Mixed_6b = fid.FIDInceptionC(768, channels_7x7=128)
        network.Mixed_6c = fid.FIDInceptionC(768, channels_7x7=160)
        network.Mixed_6d = fid.FIDInceptionC(768, channels_7x7=160)
        network.Mixed_6e = fid.FIDInceptionC(768, channels_7x7=192)
        network.Mixed_7b = fid.FIDInceptionE_1(1280)
        network.Mixed_7c = fid.FIDInceptionE_2(2048)
        network.fc = nn.Identity()
    return network.eval().requires_grad_(False)


def convolutions_of(network: nn.Module) -> dict[str, Any]:
    """List the 94 convolutions, each with its batch norm, by name in the order of the graph."""
    return {
        name: module
        for name, module in network.named_modules()
        if type(module).__name__ == "BasicConv2d"
    }


@lru_cache(maxsize=1)
def convolutions() -> dict[str, Any]:
    """List the convolutions of a network without weights, for their names and shapes."""
    return convolutions_of(empty_network())


def network_from(state: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - torchvision is untyped
    """Build the network with checked weights (see `eval.features.inception_weights`), shared."""
    network = empty_network()
    counters = {
        f"{name}.bn.num_batches_tracked": torch.tensor(0) for name in convolutions_of(network)
    }
    network.load_state_dict({**state, **counters}, assign=True)
    return network.requires_grad_(False)
