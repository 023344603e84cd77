"""A caller's own tensors as data sets: images in an .npz, and latents in a latent cache.

A run on them names the file or the folder in `data.path`, so it resumes as any other run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.image_set import ImageSet, apply_limit, image_set_of
from pipeline.data.standardisation import facts
from pipeline.errors import UserError
from pipeline.integrity.arrays import read_arrays
from pipeline.integrity.reason import reason_of
from pipeline.storage import atomic
from pipeline.storage.paths import data_root
from pipeline.storage.shards.manifest import FORMAT, MANIFEST, content_key
from pipeline.storage.shards.writer import StoreWriter

_SHARD = 10_000


def write_images(images: Tensor, labels: Tensor | None) -> Path:
    """Write images uint8 (n, C, H, W) and labels (n,) to an .npz under the data root.

    `data.name=npz data.path=FILE` reads it.

    Raises:
        UserError: the images are not uint8 with 1 or 3 channels, or labels are invalid.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"the images are {images.dtype} {tuple(images.shape)}; expected uint8 (n, C, H, W) "
            "with 1 or 3 channels; convert them"
        )
    if not images.numel():
        raise UserError(f"the images have the shape {tuple(images.shape)}; expected some images")
    images = images.detach().cpu()
    arrays = {"arr_0": images.permute(0, 2, 3, 1).contiguous().numpy()}
    checked = check_own_labels(labels, len(images))
    if checked is not None:
        arrays["labels"] = checked.numpy()
    path = data_root() / "tensors" / f"images-{_digest(images, checked)}.npz"
    if not path.is_file():
        atomic.write_with(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    return path


def read_images(path: Path, split: str, limit: int | None) -> ImageSet:
    """Open an .npz of images: `arr_0` uint8 (n, H, W, C), and `labels` (n,) if it has them.

    Raises:
        UserError: the file does not hold such arrays.
    """
    try:
        arrays = read_arrays(path, ("arr_0", "labels"))
        pixels, labels = arrays["arr_0"], arrays.get("labels")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.path is {path}, which is no .npz of images ({reason_of(error)}); expected "
            "`arr_0` uint8 (n, H, W, C)"
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise UserError(
            f"arr_0 of {path} is {pixels.dtype} {pixels.shape}; expected uint8 (n, H, W, C) with "
            "1 or 3 channels; convert it"
        )
    if not pixels.size:
        raise UserError(f"arr_0 of {path} has the shape {pixels.shape}; expected some images")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    if labels is not None and labels.dtype.kind not in "iu":
        raise UserError(f"labels of {path} are {labels.dtype}; expected whole numbers from 0")
    given = None if labels is None else torch.as_tensor(labels.astype(np.int64))
    checked = check_own_labels(given, len(images))
    count, _ = apply_limit(len(images), limit)
    rows = None if checked is None else checked[:count].numpy()
    return image_set_of(images[:count].numpy(), rows, "npz", split)


def write_latents(latents: Tensor, labels: Tensor | None) -> Path:
    """Write latents float (n, C, H, W) or (n, D) as a latent cache under the data root.

    `data.name=latents data.path=FOLDER` trains on it.

    Raises:
        UserError: the latents are not finite floats of such a shape, or labels are invalid.
    """
    if not latents.is_floating_point() or latents.ndim not in (2, 4) or len(latents) < 2:
        raise UserError(
            f"the latents are {latents.dtype} {tuple(latents.shape)}; expected float (n, C, H, W) "
            "or (n, D) with n ≥ 2; images are uint8 (n, C, H, W)"
        )
    if not bool(torch.isfinite(latents).all()):
        raise UserError("the latents hold values that are not finite; remove NaN and inf")
    latents = latents.detach().cpu().float().contiguous()
    checked = check_own_labels(labels, len(latents))
    identity = {
        "kind": "latents",
        "format": FORMAT,
        "data": _digest(latents, checked),
        "dataset": "latents",
        "split": "train",
        "count": len(latents),
        "latent_shape": list(latents.shape[1:]),
        "stochastic": False,
        "shard_size": _SHARD,
    }
    folder = data_root() / "latents" / f"latents-{content_key(identity)}"
    if (folder / MANIFEST).is_file():
        return folder
    everywhere = torch.full((len(latents),), -1) if checked is None else checked
    writer = StoreWriter(folder, identity, len(latents), _SHARD)
    for index in writer.missing():
        first, last = writer.bounds(index)
        rows = {"mean": latents[first:last].clone(), "labels": everywhere[first:last].clone()}
        writer.write(index, rows)
    writer.finish(facts)
    return folder


def check_own_labels(labels: Tensor | None, n: int) -> Tensor | None:
    """Return labels as int64 (n,); None stays None.

    Raises:
        UserError: they are not n whole numbers from 0 on.
    """
    if labels is None:
        return None
    whole = not labels.is_floating_point() and not labels.is_complex()
    if tuple(labels.shape) != (n,) or not whole or (n and int(labels.min()) < 0):
        raise UserError(
            f"the labels are {labels.dtype} {tuple(labels.shape)}; expected {n} whole numbers "
            "from 0, one for each sample"
        )
    return labels.detach().cpu().long()


def _digest(samples: Tensor, labels: Tensor | None) -> str:
    """Return 16 hex digits of the sha256 of samples (n, …) and labels (n,)."""
    digest = hashlib.sha256(f"{samples.dtype} {tuple(samples.shape)}".encode())
    digest.update(samples.contiguous().view(torch.uint8).numpy().tobytes())
    if labels is not None:
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()[:16]
