"""Inception features for FID: pytorch-fid's network, as it is or folded into a faster one.

The folded network is about twice as fast on a CPU, and equal up to rounding. Batch norms are
folded into convolutions, and 1x1 convolutions of one input are merged. An average pool follows its
1x1 convolution, where there are fewer channels. Memory is channels-last.

Reference: Heusel et al. 2017; the resize and the network are pytorch-fid's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.features.folded_conv import CPU_MICRO_BATCH, FoldedConv
from eval.features.inception_weights import read_weights
from eval.features.pytorch_fid import network_from
from eval.features.resize import MODES, prepare

FEATURES = 2048
EXTRACTOR = "inception-2015-12-05/pool3"
"""Name of the features, recorded next to every FID as `extractor`."""

_GPU_MICRO_BATCH = 64


class Inception(nn.Module):
    """Feature extractor of FID: images to pool3 features.

    A subclass is built from a state dict (see `eval.features.inception_weights`). It maps prepared
    images (B, 3, 299, 299) in [-1, 1] to features (B, 2048). `mode` names the resize, a key of
    `eval.features.resize.MODES`.
    """

    mode = "pytorch"
    dim = FEATURES

    @classmethod
    def from_weights(cls, path: str | Path) -> Self:
        """Build the network from a file of weights (see `eval.features.inception_weights`)."""
        return cls(read_weights(path))

    def with_mode(self, mode: str) -> Self:
        """Set the resize; ValueError names the modes."""
        if mode not in MODES:
            raise ValueError(f"the mode is {mode!r}; expected one of {', '.join(MODES)}")
        self.mode = mode
        return self

    @property
    def name(self) -> str:
        """Name of the features: the extractor, and the resize unless it is pytorch-fid's."""
        return EXTRACTOR if self.mode == "pytorch" else f"{EXTRACTOR}/{self.mode}"

    @torch.no_grad()
    def features(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Compute pool3 features, float32 (B, 2048); they do not depend on how images are batched.

        Images are uint8 (B, C, H, W), C = 1 (repeated to three) or 3, or a sequence of (C, H, W).

        Raises:
            ValueError: the images have another dtype or shape.
        """
        parts = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        for part in parts:
            require_pictures(part)
        device = next(self.buffers()).device
        size = CPU_MICRO_BATCH if device.type == "cpu" else _GPU_MICRO_BATCH
        features = torch.empty(len(images), FEATURES, device=device)
        # TensorFloat-32, on by default for convolutions, moves features by 1e-3.
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            for start in range(0, len(images), size):
                rows = slice(start, start + size)
                batch = [images[rows]] if isinstance(images, Tensor) else parts[rows]
                prepared = torch.cat([prepare(part.to(device), self.mode) for part in batch])
                features[rows] = self(prepared)
        return features


class PytorchFidInception(Inception):
    """pytorch-fid's network as it is, for comparison with the folded one."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network_from(state)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Compute features (B, 2048) of prepared images x (B, 3, 299, 299) in [-1, 1]."""
        return self.network(x)


class FidInception(Inception):
    """pytorch-fid's network, folded: the same features up to rounding, in half the time."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        network = network_from(state)

        def conv(name: str) -> FoldedConv:
            return FoldedConv([getattr(network, name)])

        self.stem = nn.Sequential(
            conv("Conv2d_1a_3x3"), conv("Conv2d_2a_3x3"), conv("Conv2d_2b_3x3"),
            nn.MaxPool2d(3, 2),
            conv("Conv2d_3b_1x1"), conv("Conv2d_4a_3x3"),
            nn.MaxPool2d(3, 2),
        )  # fmt: skip
        blocks = [block for name, block in network.named_children() if name.startswith("Mixed")]
        self.mixed = nn.Sequential(*(FoldedBlock(block) for block in blocks))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Compute features (B, 2048) of prepared images x (B, 3, 299, 299) in [-1, 1]."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.mixed(self.stem(x)).mean((2, 3))


class Bfloat16Inception(FidInception):
    """The folded network in bfloat16: features with a rounding error of a few percent.

    It is twice as fast as in float32 where the processor has bfloat16 instructions.
    """

    @property
    def name(self) -> str:
        """Name of the features, which ends with bf16."""
        return f"{super().name}/bf16"

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Compute features float32 (B, 2048) of prepared images x (B, 3, 299, 299) in [-1, 1]."""
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        return self.mixed(self.stem(x)).float().mean((2, 3))


class Wiring(NamedTuple):
    """Order of the convolutions inside an Inception block.

    Attributes:
        heads: 1x1 convolutions of the input, which are merged; each starts a branch.
        branches: for each head the stages that follow: one convolution, or two whose outputs are
            concatenated. Without a stage the head's output is the branch's.
        pool: `average` (TensorFlow's, which ignores the padding), `max` or `reduce`.
        alone: a convolution of the input that is no head (the reduction block's 3x3).
    """

    heads: list[str]
    branches: list[list[list[str]]]
    pool: str
    alone: str | None = None


_WIRING_E = Wiring(
    ["branch1x1", "branch3x3_1", "branch3x3dbl_1"],
    [[], [["branch3x3_2a", "branch3x3_2b"]],
     [["branch3x3dbl_2"], ["branch3x3dbl_3a", "branch3x3dbl_3b"]]],
    "average",
)  # fmt: skip
#: by the class of a block, which is pytorch-fid's or torchvision's
_WIRING = {
    "FIDInceptionA": Wiring(
        ["branch1x1", "branch5x5_1", "branch3x3dbl_1"],
        [[], [["branch5x5_2"]], [["branch3x3dbl_2"], ["branch3x3dbl_3"]]],
        "average",
    ),
    "InceptionB": Wiring(
        ["branch3x3dbl_1"], [[["branch3x3dbl_2"], ["branch3x3dbl_3"]]], "reduce", "branch3x3"
    ),
    "FIDInceptionC": Wiring(
        ["branch1x1", "branch7x7_1", "branch7x7dbl_1"],
        [[], [["branch7x7_2"], ["branch7x7_3"]], [[f"branch7x7dbl_{i}"] for i in (2, 3, 4, 5)]],
        "average",
    ),
    "InceptionD": Wiring(
        ["branch3x3_1", "branch7x7x3_1"],
        [[["branch3x3_2"]], [[f"branch7x7x3_{i}"] for i in (2, 3, 4)]],
        "reduce",
    ),
    "FIDInceptionE_1": _WIRING_E,
    "FIDInceptionE_2": _WIRING_E._replace(pool="max"),
}


class FoldedBlock(nn.Module):
    """Inception block, pytorch-fid's or torchvision's: parallel branches, concatenated."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        wiring = _WIRING[type(block).__name__]

        def conv(*names: str, relu: bool = True) -> FoldedConv:
            convolutions: list[Any] = [getattr(block, name) for name in names]
            return FoldedConv(convolutions, relu)

        self.alone = conv(wiring.alone) if wiring.alone else None
        self.heads = conv(*wiring.heads)
        self.branches = nn.ModuleList(
            nn.ModuleList(nn.ModuleList(conv(name) for name in stage) for stage in branch)
            for branch in wiring.branches
        )
        self.pool = wiring.pool
        # An average pool follows its convolution, so the ReLU has to follow the pool.
        relu = self.pool == "max"
        self.pooled = None if self.pool == "reduce" else conv("branch_pool", relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        """Map activations x (B, C, H, W), channels-last, to those of the next block."""
        outputs = [self.alone(x)] if self.alone is not None else []
        starts = self.heads.split(x)
        for start, branch in zip(starts, self.branches, strict=True):
            y = [start]
            for stage in branch.children():
                y = [conv(y[0]) for conv in stage.children()]
            outputs += y
        return torch.cat([*outputs, self._pool(x)], 1)

    def _pool(self, x: Tensor) -> Tensor:
        """Compute the pooling branch of activations x (B, C, H, W)."""
        if self.pooled is None:
            return F.max_pool2d(x, 3, 2)
        if self.pool == "max":
            return self.pooled(F.max_pool2d(x, 3, 1, 1))
        return F.relu_(F.avg_pool2d(self.pooled(x), 3, 1, 1, count_include_pad=False))


def require_pictures(images: Tensor) -> None:
    """Check that images are uint8 (B, C, H, W) with C = 1 or 3; else raise ValueError."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"the images are {images.dtype} {tuple(images.shape)}; expected uint8 "
            "(B, 1 or 3, H, W); scale them to 0…255 and round first"
        )
