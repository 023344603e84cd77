"""FID between two sets of images or of statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from accelerate import Accelerator

from eval.distances import frechet_distance
from eval.features.inception import (
    Bfloat16Inception,
    FidInception,
    Inception,
    PytorchFidInception,
)
from eval.sets.sources import stats_of
from pipeline.errors import UserError
from pipeline.evaluation.features import inception_weights

#: name, as `jkoflow fid --features` takes it, → network
NETWORKS: dict[str, type[Inception]] = {
    "jkoflow": FidInception,
    "bf16": Bfloat16Inception,
    "pytorch-fid": PytorchFidInception,
}


def fid_between(
    a: str,
    b: str,
    accelerator: Accelerator,
    progress: Callable[[str], Callable[[int], None]],
    features: str = "jkoflow",
) -> float:
    """Compute the FID of two sets: folders, .npz of images or statistics, or shipped references.

    `features` is a key of :data:`NETWORKS`. `progress` returns, for the name of a set, the
    function that is called with the size of every batch.

    Raises:
        UserError: an unknown implementation.
        FileNotFoundError: a set is neither a path nor a shipped reference.
        ValueError: a set is empty, too small, damaged or of another kind.
    """
    if features not in NETWORKS:
        raise UserError(f"--features is {features!r}; expected one of {', '.join(NETWORKS)}")

    @cache
    def network() -> Inception:
        weights = inception_weights(accelerator)
        return NETWORKS[features].from_weights(weights).to(accelerator.device)

    first, second = (stats_of(name, network, progress(name)) for name in (a, b))
    return frechet_distance(first, second)
