"""Reference statistics for FID: the shipped ones and their file format.

A reference is one safetensors file. It holds the mean in float64, the upper triangle of the
covariance in float32 (8 MB instead of 32), and a card in the metadata. The rounding changes FID by
less than 1e-6 of its value (by 2e-8 at an FID of 9 between two sets of real MNIST digits).
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
from pipeline.integrity.digests import BLANK, check_file, stamp

_FOLDER = Path(__file__).parent
_SUFFIX = ".safetensors"
_CARD = ("dataset", "split", "n", "extractor", "content_sha256")
_FORMAT = 1


@dataclass(frozen=True)
class Reference:
    """Statistics of a split, and their card.

    The card has `dataset`, `split`, `n`, `extractor`, `content_sha256` (of the images or of the
    extractor's weights), and optional further entries.
    """

    stats: GaussianStats
    card: dict[str, Any]


def reference_names() -> list[str]:
    """List the names of the shipped references, sorted."""
    return sorted(p.name.removesuffix(_SUFFIX) for p in _FOLDER.glob(f"*{_SUFFIX}"))


def load_reference(name: str) -> Reference:
    """Load a reference by its name, such as `mnist-train`, or from a file.

    Raises:
        ValueError: it is neither a shipped name nor a reference file, or the file is damaged.
    """
    names = reference_names()
    if name not in names:
        if is_reference(name):
            return read_reference(name)
        known = ", ".join(names) or "none"
        raise ValueError(
            f"the reference '{name}' is neither a file nor shipped; expected one of: {known}"
        )
    return read_reference(_FOLDER / f"{name}{_SUFFIX}")


def is_reference(path: str | Path) -> bool:
    """Return whether a path is a file with the suffix of a reference."""
    return Path(path).suffix == _SUFFIX and Path(path).is_file()


def read_reference(path: str | Path) -> Reference:
    """Read a reference from its file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another kind.
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
        card.pop("seal", None)
        dim = len(mean)
        cov = np.zeros((dim, dim))
        cov[np.triu_indices(dim)] = upper
        cov += np.triu(cov, 1).T
        reference = Reference(GaussianStats.from_moments(mean, cov, card["n"]), card)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a complete file of reference statistics; write it again"
        ) from error
    check_file(path)
    return reference


def reference_bytes(stats: GaussianStats, card: Mapping[str, Any]) -> bytes:
    """Encode statistics of a whole split and their card as the content of a reference's file.

    Raises:
        ValueError: the card lacks an entry, or its n is not that of the statistics.
    """
    missing = [key for key in _CARD if key not in card]
    if missing:
        raise ValueError(f"the card lacks {', '.join(missing)}; expected {', '.join(_CARD)}")
    if card["n"] != stats.n:
        raise ValueError(
            f"n is {card['n']} in the card and {stats.n} in the statistics; expected the same"
        )
    upper = stats.cov[np.triu_indices(stats.dim)].astype(np.float32)
    if not math.isfinite(float(np.abs(upper).max())):
        raise ValueError(
            "the covariance exceeds float32; expected finite values; check the features"
        )
    tensors = {"mean": torch.from_numpy(stats.mean), "cov_upper": torch.from_numpy(upper)}
    # safetensors writes several metadata keys in random order; one key makes bytes repeatable.
    return stamp(save(tensors, {"card": json.dumps({**card, "format": _FORMAT, "seal": BLANK})}))
