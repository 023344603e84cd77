"""The Inception features of FID, equal to pytorch-fid's and about twice as fast on a CPU.

What makes it fast, each an identity up to rounding:
- the batch norms, constant at evaluation, are folded into the convolutions (in float64);
- 1x1 convolutions that share an input are one convolution;
- the average pool of a pooling branch follows its 1x1 convolution (fewer channels to pool;
  both are linear, and the pool's weights sum to one so the bias passes through);
- channels-last memory, and on the CPU oneDNN's convolution with the ReLU inside and the
  weights reordered once, in micro-batches that stay in the cache.

Reference: Heusel et al. 2017; the resize and the patched blocks are pytorch-fid's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.folded_conv import CPU_MICRO_BATCH, FoldedConv
from eval.inception_weights import LAYOUT, content_sha256, convert_torchscript, read_weights

__all__ = ["EXTRACTOR", "FEATURES", "FidInception", "content_sha256", "convert_torchscript"]

FEATURES = 2048
EXTRACTOR = "inception-2015-12-05/pool3"
"""What is printed beside every number as `extractor`."""

_SIDE = 299
_GPU_MICRO_BATCH = 64


class Mixed(nn.Module):
    """One Inception block: parallel branches on one input, concatenated.

    Args:
        state: the network's state dict.
        name: such as `Mixed_5b`.
        heads: 1x1 convolutions on the input, merged; each starts a branch.
        branches: for each head the stages that follow; a stage of two names forks, and its
            outputs are concatenated. No stage: the head's output is the branch's.
        pool: `average` (TensorFlow's, which ignores the padding), `max` or `reduce`.
        alone: a convolution on the input that is no head (the reduction block's 3x3).
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        name: str,
        heads: list[str],
        branches: list[list[list[str]]],
        pool: str,
        alone: str | None = None,
    ) -> None:
        super().__init__()

        def conv(*names: str, relu: bool = True) -> FoldedConv:
            return FoldedConv(state, [f"{name}.{n}" for n in names], relu)

        self.alone = conv(alone) if alone else None
        self.heads = conv(*heads)
        self.branches = nn.ModuleList(
            nn.ModuleList(nn.ModuleList(conv(n) for n in stage) for stage in branch)
            for branch in branches
        )
        self.pool = pool
        # An average pool may follow its convolution, so the ReLU has to wait for it.
        self.pooled = None if pool == "reduce" else conv("branch_pool", relu=pool == "max")

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.alone(x)] if self.alone is not None else []
        starts = self.heads.split(x)
        for start, branch in zip(starts, self.branches, strict=True):
            y = [start]
            for stage in branch.children():
                y = [conv(y[0]) for conv in stage.children()]
            outputs += y
        return torch.cat([*outputs, self._pool(x)], 1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.pooled is None:
            return F.max_pool2d(x, 3, 2)
        if self.pool == "max":
            return self.pooled(F.max_pool2d(x, 3, 1, 1))
        return F.relu_(F.avg_pool2d(self.pooled(x), 3, 1, 1, count_include_pad=False))


def _mixed(state: Mapping[str, Tensor], name: str) -> Mixed:
    """Wire the block `name` as the published graph does."""
    kind = name[-2:]
    if kind[0] == "5":
        return Mixed(
            state, name, ["branch1x1", "branch5x5_1", "branch3x3dbl_1"],
            [[], [["branch5x5_2"]], [["branch3x3dbl_2"], ["branch3x3dbl_3"]]], "average",
        )  # fmt: skip
    if kind == "6a":
        return Mixed(
            state, name, ["branch3x3dbl_1"],
            [[["branch3x3dbl_2"], ["branch3x3dbl_3"]]], "reduce", "branch3x3",
        )  # fmt: skip
    if kind[0] == "6":
        return Mixed(
            state, name, ["branch1x1", "branch7x7_1", "branch7x7dbl_1"],
            [[], [["branch7x7_2"], ["branch7x7_3"]],
             [[f"branch7x7dbl_{i}"] for i in (2, 3, 4, 5)]], "average",
        )  # fmt: skip
    if kind == "7a":
        return Mixed(
            state, name, ["branch3x3_1", "branch7x7x3_1"],
            [[["branch3x3_2"]], [[f"branch7x7x3_{i}"] for i in (2, 3, 4)]], "reduce",
        )  # fmt: skip
    return Mixed(
        state, name, ["branch1x1", "branch3x3_1", "branch3x3dbl_1"],
        [[], [["branch3x3_2a", "branch3x3_2b"]],
         [["branch3x3dbl_2"], ["branch3x3dbl_3a", "branch3x3dbl_3b"]]],
        "max" if kind == "7c" else "average",
    )  # fmt: skip


class FidInception(nn.Module):
    """Images to the 2048 numbers whose Gaussians FID compares.

    Args:
        state: the weights under torchvision's names (see `eval.inception_weights`).
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()

        def conv(name: str) -> FoldedConv:
            return FoldedConv(state, [name])

        self.stem = nn.Sequential(
            conv("Conv2d_1a_3x3"), conv("Conv2d_2a_3x3"), conv("Conv2d_2b_3x3"),
            nn.MaxPool2d(3, 2),
            conv("Conv2d_3b_1x1"), conv("Conv2d_4a_3x3"),
            nn.MaxPool2d(3, 2),
        )  # fmt: skip
        names = list(dict.fromkeys(n.split(".")[0] for n in LAYOUT if n.startswith("Mixed")))
        self.mixed = nn.Sequential(*(_mixed(state, name) for name in names))
        self.eval()

    @classmethod
    def from_weights(cls, path: str | Path) -> FidInception:
        """Build the network from pytorch-fid's `.pth`, the `.safetensors` or the TorchScript.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds another network.
        """
        return cls(read_weights(path))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048) of prepared images x (B, 3, 299, 299) in [-1, 1]."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.mixed(self.stem(x)).mean((2, 3))

    @torch.no_grad()
    def features(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Compute pool3 features; they do not depend on how images are batched.

        Args:
            images: uint8 (B, C, H, W), C = 1 (repeated to three) or 3, any device; or a
                sequence of (C, H, W) of different sizes.

        Returns:
            float32 (B, 2048), on the network's device.

        Raises:
            ValueError: another type or shape; the images must be on disk's 0…255 scale.
        """
        parts = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        for part in parts:
            _check(part)
        device = next(self.buffers()).device
        size = CPU_MICRO_BATCH if device.type == "cpu" else _GPU_MICRO_BATCH
        out = torch.empty(len(images), FEATURES, device=device)
        # TensorFloat-32, on by default for convolutions, moves features by 1e-3.
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            for start in range(0, len(images), size):
                rows = slice(start, start + size)
                batch = [images[rows]] if isinstance(images, Tensor) else parts[rows]
                out[rows] = self(torch.cat([_prepare(part.to(device)) for part in batch]))
        return out


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "expected uint8 images (B, 1 or 3, H, W), found "
            f"{images.dtype} {tuple(images.shape)}; scale to 0…255 and round first"
        )


def _prepare(images: Tensor) -> Tensor:
    """Images uint8 (B, C, H, W) to [-1, 1], (B, 3, 299, 299), by pytorch-fid's resize."""
    x = images.float() / 255
    x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    return (2 * x - 1).expand(-1, 3, -1, -1)
