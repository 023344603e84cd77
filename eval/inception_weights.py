"""The 94 convolutions of the Inception network for FID: their layout, files and content hash.

The network is the one of Szegedy et al. with the weights of the TensorFlow graph of 2015-12-05.
Names are torchvision's, as in pytorch-fid's state dict: `Mixed_5b.branch1x1.conv.weight`,
`Mixed_5b.branch1x1.bn.running_mean`, … Every batch norm has unit scale and eps = 1e-3.

Reference: Heusel et al. 2017 (FID); Szegedy et al. 2016 (Inception v3).
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_HASHED = ("bn.bias", "bn.running_mean", "bn.running_var", "conv.weight")


class Conv(NamedTuple):
    """One convolution: `weight` is (outputs, inputs, *kernel), without bias."""

    outputs: int
    inputs: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]


def _same(outputs: int, inputs: int, height: int = 1, width: int = 1) -> Conv:
    """A convolution that keeps the image's size."""
    return Conv(outputs, inputs, (height, width), 1, (height // 2, width // 2))


def _valid(outputs: int, inputs: int, size: int, stride: int = 1) -> Conv:
    """A square convolution without padding."""
    return Conv(outputs, inputs, (size, size), stride, (0, 0))


def _block_a(inputs: int, pool: int) -> dict[str, Conv]:
    return {
        "branch1x1": _same(64, inputs),
        "branch5x5_1": _same(48, inputs),
        "branch5x5_2": _same(64, 48, 5, 5),
        "branch3x3dbl_1": _same(64, inputs),
        "branch3x3dbl_2": _same(96, 64, 3, 3),
        "branch3x3dbl_3": _same(96, 96, 3, 3),
        "branch_pool": _same(pool, inputs),
    }


def _block_b(inputs: int) -> dict[str, Conv]:
    return {
        "branch3x3": _valid(384, inputs, 3, 2),
        "branch3x3dbl_1": _same(64, inputs),
        "branch3x3dbl_2": _same(96, 64, 3, 3),
        "branch3x3dbl_3": _valid(96, 96, 3, 2),
    }


def _block_c(inputs: int, inner: int) -> dict[str, Conv]:
    return {
        "branch1x1": _same(192, inputs),
        "branch7x7_1": _same(inner, inputs),
        "branch7x7_2": _same(inner, inner, 1, 7),
        "branch7x7_3": _same(192, inner, 7, 1),
        "branch7x7dbl_1": _same(inner, inputs),
        "branch7x7dbl_2": _same(inner, inner, 7, 1),
        "branch7x7dbl_3": _same(inner, inner, 1, 7),
        "branch7x7dbl_4": _same(inner, inner, 7, 1),
        "branch7x7dbl_5": _same(192, inner, 1, 7),
        "branch_pool": _same(192, inputs),
    }


def _block_d(inputs: int) -> dict[str, Conv]:
    return {
        "branch3x3_1": _same(192, inputs),
        "branch3x3_2": _valid(320, 192, 3, 2),
        "branch7x7x3_1": _same(192, inputs),
        "branch7x7x3_2": _same(192, 192, 1, 7),
        "branch7x7x3_3": _same(192, 192, 7, 1),
        "branch7x7x3_4": _valid(192, 192, 3, 2),
    }


def _block_e(inputs: int) -> dict[str, Conv]:
    return {
        "branch1x1": _same(320, inputs),
        "branch3x3_1": _same(384, inputs),
        "branch3x3_2a": _same(384, 384, 1, 3),
        "branch3x3_2b": _same(384, 384, 3, 1),
        "branch3x3dbl_1": _same(448, inputs),
        "branch3x3dbl_2": _same(384, 448, 3, 3),
        "branch3x3dbl_3a": _same(384, 384, 1, 3),
        "branch3x3dbl_3b": _same(384, 384, 3, 1),
        "branch_pool": _same(192, inputs),
    }


def _layout() -> dict[str, Conv]:
    layout = {
        "Conv2d_1a_3x3": _valid(32, 3, 3, 2),
        "Conv2d_2a_3x3": _valid(32, 32, 3),
        "Conv2d_2b_3x3": _same(64, 32, 3, 3),
        "Conv2d_3b_1x1": _valid(80, 64, 1),
        "Conv2d_4a_3x3": _valid(192, 80, 3),
    }
    mixed = {
        "5b": _block_a(192, 32), "5c": _block_a(256, 64), "5d": _block_a(288, 64),
        "6a": _block_b(288),
        "6b": _block_c(768, 128), "6c": _block_c(768, 160),
        "6d": _block_c(768, 160), "6e": _block_c(768, 192),
        "7a": _block_d(768), "7b": _block_e(1280), "7c": _block_e(2048),
    }  # fmt: skip
    for name, block in mixed.items():
        layout |= {f"Mixed_{name}.{branch}": conv for branch, conv in block.items()}
    return layout


LAYOUT: dict[str, Conv] = _layout()
"""Every convolution by name, in the order of the published graph."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the network's state dict from any of its files, without executing any of them.

    Args:
        path: pytorch-fid's `.pth`, a `.safetensors` with the same keys, or the TorchScript.

    Returns:
        float32 tensors on the CPU under torchvision's names; checked to be complete.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}; check the path")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif _is_torchscript(path):
            return convert_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable file of Inception weights "
            f"({type(error).__name__}); delete it and fetch it again"
        ) from error
    return check_state(state)


def check_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the 94 convolutions of a state dict as float32, checking names and shapes.

    Raises:
        ValueError: a tensor is missing or has another shape; the sentence names it.
    """
    kept: dict[str, Tensor] = {}
    for name, conv in LAYOUT.items():
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_HASHED, (conv.outputs,))
        shapes["conv.weight"] = (conv.outputs, conv.inputs, *conv.kernel)
        for suffix, shape in shapes.items():
            key = f"{name}.{suffix}"
            found = tuple(state[key].shape) if key in state else "nothing"
            if found != shape:
                raise ValueError(
                    f"Inception weights: expected {key} of shape {shape}, found {found}; "
                    "use the weights that pytorch-fid uses"
                )
            kept[key] = state[key].detach().to("cpu", torch.float32)
        key = f"{name}.bn.weight"
        kept[key] = state[key].detach().float() if key in state else torch.ones(conv.outputs)
    return kept


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def convert_torchscript(path: str | Path) -> dict[str, Tensor]:
    """Read the TorchScript edition of the network as pytorch-fid's state dict.

    Nothing is executed or unpickled: the archive stores weight, beta, mean and variance of
    the 94 convolutions as raw little-endian float32 records `data/0` … `data/375`, in the
    order of `LAYOUT`. Whether they are the right numbers is for `content_sha256` to say.

    Raises:
        ValueError: the archive does not hold these 376 tensors.
    """
    state: dict[str, Tensor] = {}
    suffixes = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(n.split("/")[0] for n in archive.namelist() if "/code/" in n)
            for i, (name, conv) in enumerate(LAYOUT.items()):
                for j, suffix in enumerate(suffixes):
                    raw = archive.read(f"{root}/data/{4 * i + j}")
                    values = torch.from_numpy(np.frombuffer(raw, "<f4").copy())
                    if j == 0:
                        values = values.view(conv.outputs, conv.inputs, *conv.kernel)
                    state[f"{name}.{suffix}"] = values
    except (zipfile.BadZipFile, KeyError, StopIteration, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not the TorchScript file of the FID Inception network; fetch it again"
        ) from error
    return check_state(state)


def content_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash what the network computes, whatever file it came from.

    sha256 over the sorted keys of the 94 convolutions, each followed by its shape and its
    little-endian float32 bytes: `conv.weight`, `bn.bias`, `bn.running_mean`,
    `bn.running_var`. A `bn.weight` is part of the hash only where it is not all ones.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    state = check_state(state)
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("bn.weight") and bool((state[key] == 1).all()):
            continue
        values = np.ascontiguousarray(state[key].numpy(), "<f4")
        digest.update(f"{key} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
