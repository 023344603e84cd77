"""Repairs of what runs share: latent caches, and features of real and reconstructed images.

A cache has the recipe of its configuration. Where that is absent, the configurations of the runs
that are repaired, of other caches and of the package are tried. The right one has the cache's key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.config import packaged
from pipeline.config.data import LATENTS
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.data.encoding import encode, recipe_of
from pipeline.data.image_set import ImageSet
from pipeline.data.latent_cache import cache_folder, cache_identity, load_images_and_autoencoder
from pipeline.data.packed.load import FOLDERS
from pipeline.errors import UserError
from pipeline.evaluation.features import (
    FeatureExtractor,
    features_folder,
    real_features_identity,
    reconstructed_identity,
)
from pipeline.evaluation.real_images import at_least, held_out_images
from pipeline.repair.tools import Tools, reopened
from pipeline.runs.directory import CONFIG, RunDirectory
from pipeline.runtime.console import say
from pipeline.storage import atomic
from pipeline.storage.paths import data_root
from pipeline.storage.records import keep_recipe, read_recipe
from pipeline.storage.shards.manifest import CACHE_RECIPE, MANIFEST

_MISSING = (UserError, ValueError, OSError)
#: types of stored latents in a file of safetensors, by the precision of `encode`
_PRECISIONS = {"F16": "fp16", "BF16": "bf16"}


def known_configurations(tools: Tools, first: Path | None = None) -> Iterator[Config]:
    """Yield the configurations that this machine knows, the likely ones first.

    They are those of the cache `first`, of the runs below the paths, of all caches, and of the
    package. Some may not be readable and are left out.
    """
    own = [first / CACHE_RECIPE] if first is not None else []
    for recipe in [*own, *sorted((data_root() / "latents").glob(f"*/{CACHE_RECIPE}"))]:
        with contextlib.suppress(*_MISSING):
            if read_recipe(recipe) is not None:
                yield load_config(str(recipe))
        if recipe in own:
            yield from _of_runs(tools)
    if first is None:
        yield from _of_runs(tools)
    for name in packaged.available(packaged.FLOWS):
        with contextlib.suppress(*_MISSING):
            config = load_config(name)
            if (data_root() / "assets" / config.data.name).is_dir():  # nothing is downloaded
                yield config


def _of_runs(tools: Tools) -> Iterator[Config]:
    """Yield the configurations of the runs below the paths of a repair."""
    for path in tools.paths:
        for found in [path / CONFIG, *sorted(path.rglob(CONFIG))] if path.is_dir() else []:
            with contextlib.suppress(*_MISSING):
                config = RunDirectory(found.parent).config
                if config.data.name != LATENTS and config.points is None:
                    yield config


def _is(folder: Path, other: Path) -> bool:
    """Return whether two paths are those of one folder."""
    return folder.resolve() == other.resolve()


def encode_again(folder: Path, tools: Tools) -> bool:
    """Make the broken shards or the manifest of a latent cache again.

    Returns:
        whether a configuration of this cache is known.

    Raises:
        UserError: the images cannot be encoded.
    """
    for config in known_configurations(tools, folder):
        name = "folder" if config.data.name in FOLDERS else config.data.name
        if not folder.name.startswith(name):
            continue
        with contextlib.suppress(*_MISSING):  # of data that are elsewhere
            images, autoencoder = load_images_and_autoencoder(config)
            if _is(folder, cache_folder(cache_identity(config, images, autoencoder))):
                break
    else:
        return False
    say(f"encoding {images.name} ({len(images)} images): broken shards of {folder}")
    precision = _precision(folder)
    with reopened(folder):
        encode(config, tools.accelerator, tools.progress, precision, elsewhere=False)
    return True


def _precision(folder: Path) -> str:
    """Return the precision of the latents in a cache, by its first readable shard."""
    for shard in sorted(folder.glob("shard-*")):
        with contextlib.suppress(SafetensorError, OSError, ValueError):
            with safe_open(shard, "pt") as file:
                return _PRECISIONS.get(file.get_slice("mean").get_dtype(), "fp32")
    return "fp32"


def write_recipe_again(path: Path, tools: Tools) -> bool:
    """Write the recipe of a latent cache again; return whether its configuration is known."""
    folder = path.parent
    for config in known_configurations(tools):
        with contextlib.suppress(*_MISSING):
            images, autoencoder = load_images_and_autoencoder(config)
            if _is(folder, cache_folder(cache_identity(config, images, autoencoder))):
                keep_recipe(path, recipe_of(config))
                return True
    return False


def extract_again(folder: Path, tools: Tools) -> bool:
    """Make features of real or reconstructed images again.

    Returns:
        whether their images are known.

    Raises:
        UserError: the images cannot be read.
    """
    n = _count(folder)
    for config in known_configurations(tools):
        found = None
        with contextlib.suppress(*_MISSING):  # of data that are elsewhere
            found = next(
                (each for each in _candidates(config, n) if _have_features_in(folder, *each, n)),
                None,
            )
        if found is None:
            continue
        images, autoencoder = found
        say(f"extracting features of {n} images: broken shards of {folder}")
        extractor = FeatureExtractor(tools.accelerator, tools.progress)
        with reopened(folder):
            if autoencoder is None:
                extractor.real_features(images, n)
            else:
                extractor.reconstructed_features(autoencoder, images, n)
        return True
    return False


def _have_features_in(folder: Path, images: ImageSet, autoencoder: Any, n: int) -> bool:  # noqa: ANN401
    """Return whether a folder holds the features of n images, reconstructed or not."""
    if autoencoder is None:
        return _is(folder, features_folder(real_features_identity(images, n)))
    return _is(folder, features_folder(reconstructed_identity(autoencoder, images, n)))


def _candidates(config: Config, n: int) -> Iterator[tuple[ImageSet, Any]]:
    """Yield images whose features may have been extracted, some with an autoencoder."""
    images = {"test": held_out_images(config.data), "more": at_least(config.data, n)}
    images["train"], autoencoder = load_images_and_autoencoder(config)
    for each in images.values():
        if len(each) >= n:
            yield each, None
    yield images["more"], autoencoder


def _count(folder: Path) -> int:
    """Return the number of images of a store of features, by its manifest or readable shards."""
    rows = []
    for shard in sorted(folder.glob("shard-*")):
        with contextlib.suppress(SafetensorError, OSError, ValueError):
            with safe_open(shard, "pt") as file:
                rows.append(file.get_slice("features").get_shape()[0])
    known = sum(rows)
    with contextlib.suppress(UserError, TypeError, AttributeError):
        count = atomic.read_json(folder / MANIFEST, "manifest").get("count")
        known = count if isinstance(count, int) else known
    return known
