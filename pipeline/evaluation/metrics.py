"""Metrics of any set of images against any other set, or against statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from eval.distances import frechet_distance, kid
from eval.features.inception import FidInception
from eval.features.inception_weights import read_classifier
from eval.features.networks import FeatureNetwork, load_network
from eval.frechet_error import frechet_error
from eval.gaussian import GaussianStats
from eval.inception_score import inception_score
from eval.manifolds import manifold_metrics
from eval.sets.images import ImageSource
from eval.sets.sources import Source, open_source
from pipeline.assets.readers import INCEPTION_PTH
from pipeline.errors import UserError
from pipeline.evaluation.features import inception_weights
from pipeline.evaluation.kid_precision_recall import LEAST, MOST
from pipeline.runtime.rng import generator

#: how the standard errors are estimated
JACKKNIFE = "infinitesimal jackknife over images"
SUBSETS = "random subsets"
BOOTSTRAP = "bootstrap over images, in closed form, with the balls fixed"

#: random parts of the images, over which the Inception score is averaged
_PARTS = 10

ImageProgress = Callable[[str], Callable[[int], None]]


def measure_sets(
    a: str,
    b: str,
    accelerator: Accelerator,
    progress: ImageProgress,
    features: str = "inception",
    mode: str | None = None,
) -> dict[str, Any]:
    """Measure the images `a` (generated) against `b` (real): images, statistics or both.

    Statistics allow FID alone. KID and the manifolds take 10 000 images of either set at most.

    Args:
        a: images (see `eval.sets.sources.open_source`).
        b: images or statistics, likewise.
        accelerator: the device of the network.
        progress: returns, for the name of a set, the function that is called with the size of
            every batch.
        features: `inception`, or the path of a network (see `eval.features.networks`).
        mode: resize for Inception, a key of `eval.features.resize.MODES`; default pytorch.

    Raises:
        UserError: `a` has no images, `mode` is given for another network, or the statistics are
            those of other features.
        FileNotFoundError: a set or the network does not exist.
        ValueError: a set or the network is damaged, too small or of another kind.
    """
    if mode is not None and features != "inception":
        raise UserError(
            f"--mode is {mode!r} with --features {features}; expected it for inception alone; "
            "leave it out"
        )
    first, second = open_source(a), open_source(b)
    if first.images is None:
        raise UserError(
            f"{a} holds statistics alone; expected images; use `jkoflow fid` for two sets of "
            "statistics"
        )
    network, classifier = _network(features, mode or "pytorch", accelerator)
    for name, source in ((a, first), (b, second)):
        if source.extractor is not None and source.extractor != network.name:
            raise UserError(
                f"the statistics {name} are those of {source.extractor}; expected "
                f"{network.name}; use another --mode, --features or reference"
            )
    x = _features(first.images, network, progress(a))
    y = None if second.images is None else _features(second.images, network, progress(b))
    result: dict[str, Any] = {"a": a, "b": b, "features": network.name}
    result["fid"] = _fid(x, y, second)
    if y is not None:
        result |= _sample_metrics(x, y)
    result["inception_score"] = _inception_score(x, classifier, features)
    return result


def _network(
    features: str, mode: str, accelerator: Accelerator
) -> tuple[FeatureNetwork, Tensor | None]:
    """Load the network, and Inception's class weights if its file has them."""
    if features != "inception":
        return load_network(features, accelerator.device), None
    weights = inception_weights(accelerator)
    network = FidInception.from_weights(weights).with_mode(mode).to(accelerator.device)
    return network, read_classifier(weights)


def _features(
    images: ImageSource, network: FeatureNetwork, progress: Callable[[int], None]
) -> Tensor:
    """Extract the features (n, d) of all images, on the CPU."""
    parts = []
    for batch in images.batches():
        parts.append(network.features(batch).cpu())
        progress(len(batch))
    return torch.cat(parts)


def _fid(x: Tensor, y: Tensor | None, second: Source) -> dict[str, Any]:
    """Compute FID and its error; statistics of a source have priority over its images."""
    stats = _stats(x)
    exact = second.stats is not None
    other = second.stats if second.stats is not None else _stats(y)
    value = frechet_distance(stats, other)
    error = frechet_error(x, None if exact else y, stats, other)
    return _entry(value, error, JACKKNIFE, len(x), other.n)


def _stats(features: Tensor | None) -> GaussianStats:
    """Compute mean and covariance of features (n, d)."""
    assert features is not None
    stats = GaussianStats(features.shape[1])
    stats.update(features)
    return stats


def _sample_metrics(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Compute KID, precision, recall, density and coverage of features (n, d) and (m, d)."""
    if min(len(x), len(y)) < LEAST:
        return {}
    x, y = _subset(x), _subset(y)
    distance, manifold = kid(x, y), manifold_metrics(y, x)
    result = {"kid": _entry(distance.value, distance.standard_error, SUBSETS, len(x), len(y))}
    result["kid"] |= {"subsets": distance.subsets, "subset_size": distance.subset_size}
    for name, terms in (
        ("precision", manifold.precise),
        ("recall", manifold.recalled),
        ("density", manifold.dense),
        ("coverage", manifold.covered),
    ):
        terms = terms.double()
        error = float(terms.std() / len(terms) ** 0.5)
        result[name] = _entry(float(terms.mean()), error, BOOTSTRAP, len(x), len(y))
    return result


def _subset(features: Tensor) -> Tensor:
    """Choose at most `MOST` rows at random, with a fixed seed, in their order."""
    if len(features) <= MOST:
        return features
    order = torch.randperm(len(features), generator=generator(0, "rows"))
    return features[order[:MOST].sort().values]


def _inception_score(x: Tensor, classifier: Tensor | None, features: str) -> dict[str, Any]:
    """Compute the Inception score of features (n, 2048); without a value the entry says why."""
    reason = None
    if features != "inception":
        reason = "the features are not those of the Inception network, which has the classes"
    elif classifier is None:
        reason = (
            "the file of the Inception network has no class weights, which pytorch-fid's own file "
            f"{INCEPTION_PTH} has; remove the folder assets/inception of the data root, and run "
            "`jkoflow fetch inception --from FILE`"
        )
    elif len(x) < _PARTS:
        reason = f"there are {len(x)} images; expected at least {_PARTS}"
    if classifier is None or reason is not None:
        return {"value": None, "n": len(x), "reason": reason}
    score = inception_score(x @ classifier.T, splits=_PARTS)
    entry = _entry(score.value, score.standard_error, SUBSETS, len(x), None)
    return entry | {"subsets": score.splits}


def _entry(value: float, error: float, kind: str, n: int, n_real: int | None) -> dict[str, Any]:
    """Return a metric with its standard error, how that is estimated, and the two n."""
    return {
        "value": value, "standard_error": error, "error_kind": kind, "n": n, "n_real": n_real
    }  # fmt: skip
