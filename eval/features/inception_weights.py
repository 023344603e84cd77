"""Weights of the FID Inception network: their files and the hash of their content.

The weights are those of the TensorFlow graph of 2015-12-05, which every FID uses. Names are
torchvision's, as in pytorch-fid's state dict. Every batch norm has unit scale and ε = 1e-3.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.features.pytorch_fid import convolutions
from pipeline.integrity.checkpoints import read_checkpoint
from pipeline.integrity.limits import require_archive_size
from pipeline.integrity.reason import reason_of

#: tensors of a convolution, in the order of the TorchScript archive
_SUFFIXES = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")


CLASSIFIER = "fc.weight"
"""Key of the class weights in a state dict."""

_CLASSES = (1008, 2048)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the network's float32 state dict without executing code in the file.

    The file is pytorch-fid's `.pth`, a `.safetensors` with the same keys, or the TorchScript.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or holds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}; check the path")
    state = _load_state(path)
    return convert_torchscript(path) if state is None else check_state(state)


def _load_state(path: Path) -> dict[str, Tensor] | None:
    """Read a state dict; None for TorchScript."""
    if _is_torchscript(path):
        return None
    try:
        return read_checkpoint(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a readable file of Inception weights ({reason_of(error)}); delete it "
            "and fetch it again"
        ) from error


def read_classifier(path: str | Path) -> Tensor | None:
    """Read the class weights, float32 (1008, 2048), of a file of Inception weights.

    Inception scores use them without a bias, as the original does. pytorch-fid's `.pth` has them;
    other files have none, and the result is None.
    """
    state = _load_state(Path(path))
    weight = None if state is None else state.get(CLASSIFIER)
    if weight is None or tuple(weight.shape) != _CLASSES:
        return None
    return weight.detach().float()


def check_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the 94 convolutions of a state dict as float32, after a check of names and shapes.

    Raises:
        ValueError: a tensor is missing or has another shape; the message names it.
    """
    kept: dict[str, Tensor] = {}
    for name, convolution in convolutions().items():
        outputs = convolution.conv.out_channels
        for suffix in _SUFFIXES:
            key = f"{name}.{suffix}"
            expected = (outputs,)
            if suffix == "conv.weight":
                expected = tuple(convolution.conv.weight.shape)
            shape = tuple(state[key].shape) if key in state else "missing"
            if shape != expected:
                raise ValueError(
                    f"the shape of the Inception tensor {key} is {shape}; expected {expected}; "
                    "use the weights that pytorch-fid uses"
                )
            kept[key] = state[key].detach().to("cpu", torch.float32)
        key = f"{name}.bn.weight"
        kept[key] = state[key].detach().float() if key in state else torch.ones(outputs)
    return kept


def _is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive."""
    damage = (zipfile.BadZipFile, ValueError, NotImplementedError)
    with contextlib.suppress(*damage), zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
    return False


def convert_torchscript(path: str | Path) -> dict[str, Tensor]:
    """Read the TorchScript edition of the network as pytorch-fid's state dict.

    Nothing is executed or unpickled. The archive stores weight, beta, mean and variance of the 94
    convolutions as raw float32 records `data/0` … `data/375`, in the order of the graph.

    Raises:
        ValueError: the archive does not hold these 376 tensors.
    """
    state: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            require_archive_size(archive, path)
            root = next(n.split("/")[0] for n in archive.namelist() if "/code/" in n)
            for i, (name, convolution) in enumerate(convolutions().items()):
                for j, suffix in enumerate(_SUFFIXES):
                    raw = archive.read(f"{root}/data/{4 * i + j}")
                    values = torch.from_numpy(np.frombuffer(raw, "<f4").copy())
                    if suffix == "conv.weight":
                        values = values.view(convolution.conv.weight.shape)
                    state[f"{name}.{suffix}"] = values
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, StopIteration, ValueError,
            RuntimeError) as error:
        raise ValueError(
            f"{path} is not the TorchScript file of the FID Inception network; fetch it again"
        ) from error
    return check_state(state)


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash the weights, independently of the file that held them.

    The sha256 covers the sorted keys of the 94 convolutions, each followed by its shape and its
    little-endian float32 bytes. A `bn.weight` is part of the hash only where it is not all ones.
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
