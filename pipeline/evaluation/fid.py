"""`jkoflow fid`: the distance of two sets of images or statistics."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator

from eval.distances import frechet_distance
from eval.images import stats_of
from eval.inception import FidInception
from pipeline.evaluation.features import load_inception


def fid_between(
    a: str, b: str, accelerator: Accelerator, progress: Callable[[str], Callable[[int], None]]
) -> float:
    """FID of two sets: folders, .npz of images or statistics, or shipped references.

    Args:
        a: the first.
        b: the second.
        accelerator: device.
        progress: makes, from a set's name, what is told of every batch.
    """
    networks: list[FidInception] = []

    def network() -> FidInception:
        if not networks:
            networks.append(load_inception(accelerator))
        return networks[0]

    first, second = (stats_of(where, network, progress(where)) for where in (a, b))
    return frechet_distance(first, second)
