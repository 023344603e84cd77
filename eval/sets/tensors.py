"""Images of a .safetensors file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eval.sets.images import BATCH, Batch, read_ahead, require_two
from pipeline.integrity.limits import require_size
from pipeline.integrity.reason import reason_of

_FIELD = "images"


class TensorImages:
    """Images of a .safetensors: the tensor `images`, or the only one that can be images.

    It is uint8, (N, C, H, W) or (N, H, W, C), with C = 1 or 3. It is read batch by batch.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not such a file, or holds fewer than two images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no .safetensors at {self.path}; check the path")
        try:
            with safe_open(self.path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {
                    name: (part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path} is not a complete .safetensors ({reason_of(error)}); write it again"
            ) from error
        fitting = [name for name, (dtype, shape) in shapes.items() if _is_images(dtype, shape)]
        self.name = _FIELD if _FIELD in fitting else fitting[0] if len(fitting) == 1 else ""
        if not self.name:
            raise ValueError(
                f"{self.path} has the tensors {shapes}; expected one of images, uint8 "
                "(N, C, H, W) or (N, H, W, C) with 1 or 3 channels, or one named `images`"
            )
        self.shape = shapes[self.name][1]
        self.channels_last = self.shape[1] not in (1, 3)
        require_two(self.shape[0], self.path)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """Yield the images in order, `size` at a time."""
        require_size(min(size, len(self)) * torch.Size(self.shape[1:]).numel(), self.path)
        with safe_open(self.path, "pt") as file:
            part = file.get_slice(self.name)

            def read(start: int) -> Tensor:
                images = part[start : start + size]
                return images.permute(0, 3, 1, 2) if self.channels_last else images

            yield from read_ahead(iter(range(0, len(self), size)), read, 1)


def _is_images(dtype: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor can hold images."""
    channels = len(shape) == 4 and (shape[1] in (1, 3) or shape[3] in (1, 3))
    return dtype == "U8" and channels and 0 not in shape
