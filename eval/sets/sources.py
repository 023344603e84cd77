"""Sources of statistics and images: everything that `jkoflow fid` and `metrics` accept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from eval.features.inception import FEATURES, Inception
from eval.gaussian import GaussianStats
from eval.references import load_reference, read_reference, reference_names
from eval.sets.images import FolderImages, ImageSource, NpzImages, open_archive, require_two
from eval.sets.tables import SUFFIXES, TableImages, table_files
from eval.sets.tensors import TensorImages
from pipeline.integrity.safe_pickle import UnsafePickleError, load_batch

BatchCallback = Callable[[int], None]
"""Function that is called after each batch with its number of images."""

_KINDS = (
    "a folder of images, an .npz, .safetensors, .parquet or .arrow of images, or statistics in "
    "an .npz, .pkl or .safetensors"
)


@dataclass(frozen=True)
class Source:
    """Images, statistics of features, or both (ADM's reference batches).

    Attributes:
        images: the images, if there are any.
        stats: mean and covariance, if the file has them.
        extractor: the features of the statistics, if the file names them.
    """

    images: ImageSource | None = None
    stats: GaussianStats | None = None
    extractor: str | None = None


def open_source(source: str | Path) -> Source:
    """Open a set of images or of statistics; images are not read yet.

    A folder holds images or tables. An .npz holds images (`arr_0`), statistics (`mu`, `sigma`;
    pytorch-fid, EDM) or both (ADM). A .pkl holds statistics (EDM2) and is read without running
    it. A .safetensors holds images or is one of `jkoflow reference`. A .parquet or .arrow holds
    images. Any other name is that of a shipped reference; a path of that name has priority.

    Raises:
        FileNotFoundError: the source is neither a path nor a shipped reference.
        ValueError: the set is empty, too small, damaged or of another kind.
    """
    path = Path(source)
    if not path.exists():
        if str(source) in reference_names():
            reference = load_reference(str(source))
            return Source(None, reference.stats, reference.card["extractor"])
        raise FileNotFoundError(
            f"'{source}' is neither a path nor a shipped reference "
            f"({', '.join(reference_names()) or 'none are shipped'}); "
            "check its name"
        )
    if path.is_dir():
        return Source(TableImages(path) if _holds_tables(path) else FolderImages(path))
    if path.suffix in SUFFIXES:
        images = TableImages(path)
        require_two(len(images), path)
        return Source(images)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".pkl":
        return Source(None, _pickled_stats(path))
    if path.suffix == ".npz":
        return _npz(path)
    raise ValueError(f"{path} is another file; expected {_KINDS}")


def compute_stats(
    images: ImageSource, network: Inception, progress: BatchCallback | None = None
) -> GaussianStats:
    """Compute mean and covariance of the features of all images, with one batch in memory."""
    stats = GaussianStats(FEATURES)
    for batch in images.batches():
        stats.update(network.features(batch))
        if progress:
            progress(len(batch))
    return stats


def stats_of(
    source: str | Path, network: Callable[[], Inception], progress: BatchCallback | None = None
) -> GaussianStats:
    """Load or compute the statistics of a source (see `open_source`).

    `network` is only called if the source has no statistics.

    Raises:
        FileNotFoundError: the source is neither a path nor a shipped reference.
        ValueError: the set is empty, too small, damaged, of another kind or dimension.
    """
    opened = open_source(source)
    if opened.stats is None:
        assert opened.images is not None
        return compute_stats(opened.images, network(), progress)
    if opened.stats.dim != FEATURES:
        raise ValueError(
            f"the statistics in {source} have {opened.stats.dim} dimensions; expected "
            f"{FEATURES}; use pool3 features"
        )
    return opened.stats


def _holds_tables(folder: Path) -> bool:
    """Return whether a folder holds tables and no image files."""
    return bool(table_files(folder)) and not FolderImages.list_files(folder)


def _npz(path: Path) -> Source:
    """Open an .npz of images, of statistics, or of both."""
    with open_archive(path) as archive:
        names = set(archive.namelist())
    has_stats, has_images = {"mu.npy", "sigma.npy"} <= names, "arr_0.npy" in names
    if not (has_stats or has_images):
        raise ValueError(
            f"{path} has the arrays {sorted(n.removesuffix('.npy') for n in names)}; expected "
            "images (`arr_0`) or statistics (`mu`, `sigma`)"
        )
    images = NpzImages(path) if has_images else None
    return Source(images, GaussianStats.load(path) if has_stats else None)


def _safetensors(path: Path) -> Source:
    """Open a .safetensors of images or a reference."""
    try:
        with safe_open(path, "np") as file:
            is_reference = {"mean", "cov_upper"} <= set(file.keys())
    except (SafetensorError, OSError):
        is_reference = True  # its reader describes the damage
    if not is_reference:
        return Source(TensorImages(path))
    reference = read_reference(path)
    return Source(None, reference.stats, reference.card.get("extractor"))


def _pickled_stats(path: Path) -> GaussianStats:
    """Read `mu` and `sigma` of a pickle, or those under `fid`, as EDM2 writes them."""
    try:
        content: dict[str, Any] = load_batch(path)
    except UnsafePickleError as error:
        raise ValueError(f"{path} is not a pickle of statistics: {error}") from error
    nested = content.get("fid")
    content = nested if isinstance(nested, dict) else content
    mean, cov = content.get("mu"), content.get("sigma")
    if not (isinstance(mean, np.ndarray) and isinstance(cov, np.ndarray)) or (
        mean.dtype.kind != "f" or cov.dtype.kind != "f"
    ):
        raise ValueError(
            f"{path} has the entries {json.dumps(sorted(map(str, content)))}; expected the arrays "
            "`mu` and `sigma`, alone or under `fid`"
        )
    return GaussianStats.from_moments(mean, cov, None)
