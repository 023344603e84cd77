"""Shipped statistics of the reference splits, so that nobody computes them twice.

One safetensors file a reference: the mean in float64 and the upper triangle of the
covariance in float32, 8 MB instead of 32, with a card in the metadata. The rounding moves
FID by less than 1e-6 of its value (2e-8 of 9 between two sets of real MNIST digits).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from eval.gaussian import GaussianStats

_FOLDER = Path(__file__).parent
_SUFFIX = ".safetensors"
_CARD = ("dataset", "split", "n", "extractor", "content_sha256")
_FORMAT = 1


@dataclass(frozen=True)
class Reference:
    """Statistics of a split, and their card.

    The card has `dataset`, `split`, `n`, `extractor` and `content_sha256` (of the images or
    of the extractor's weights, as its maker says), and whatever else its maker noted.
    """

    stats: GaussianStats
    card: dict[str, Any]


def available() -> list[str]:
    """Return the names of the shipped references, sorted."""
    return sorted(p.name.removesuffix(_SUFFIX) for p in _FOLDER.glob(f"*{_SUFFIX}"))


def load_reference(name: str) -> Reference:
    """Load a shipped reference such as `mnist-train`, or one of one's own from its file.

    Raises:
        ValueError: neither a shipped name (the sentence lists those there are) nor a file, or a
            damaged file.
    """
    names = available()
    if name not in names:
        if is_reference(name):
            return read_reference(name)
        known = ", ".join(names) or "none"
        raise ValueError(f"no reference statistics named '{name}'; shipped are: {known}")
    return read_reference(_FOLDER / f"{name}{_SUFFIX}")


def is_reference(path: str | Path) -> bool:
    """Whether a path is a file that holds, by its name, a reference."""
    return Path(path).suffix == _SUFFIX and Path(path).is_file()


def read_reference(path: str | Path) -> Reference:
    """Read a reference from its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no reference statistics at {path}; check the path")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            mean, upper = file.get_tensor("mean"), file.get_tensor("cov_upper")
        card = json.loads(metadata["card"])
        if card.pop("format") != _FORMAT:
            raise ValueError("another format")
        dim = len(mean)
        cov = np.zeros((dim, dim))
        cov[np.triu_indices(dim)] = upper
        cov += np.triu(cov, 1).T
        return Reference(GaussianStats.from_moments(mean, cov, card["n"]), card)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a whole file of reference statistics") from error


def reference_bytes(stats: GaussianStats, card: Mapping[str, Any]) -> bytes:
    """Encode a reference as the content of its file.

    Args:
        stats: of the whole split.
        card: `dataset`, `split`, `n`, `extractor`, `content_sha256`, and more if wanted.

    Raises:
        ValueError: the card lacks an entry, or its n is not that of the statistics.
    """
    missing = [key for key in _CARD if key not in card]
    if missing:
        raise ValueError(f"the card of a reference lacks {', '.join(missing)}")
    if card["n"] != stats.n:
        raise ValueError(f"the card says n = {card['n']}, the statistics n = {stats.n}")
    upper = stats.cov[np.triu_indices(stats.dim)].astype(np.float32)
    if not math.isfinite(float(np.abs(upper).max())):
        raise ValueError("the covariance does not fit float32")
    tensors = {"mean": torch.from_numpy(stats.mean), "cov_upper": torch.from_numpy(upper)}
    # One key only: safetensors writes several in random order, and bytes should repeat.
    return save(tensors, {"card": json.dumps({**card, "format": _FORMAT})})


def save_reference(path: str | Path, stats: GaussianStats, card: Mapping[str, Any]) -> None:
    """Write a reference to `path` (see `reference_bytes`, for a committed write)."""
    Path(path).write_bytes(reference_bytes(stats, card))
