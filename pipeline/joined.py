"""Several data sets as one (`data.also`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from pipeline.errors import UserError
from pipeline.image_set import ImageSet, fingerprint


def join(parts: Sequence[ImageSet]) -> ImageSet:
    """Data sets one behind the other; their classes are not each other's, so it has none.

    Args:
        parts: one or more; one alone stays what it is.

    Raises:
        UserError: images of different shapes.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if part.shape != first.shape:
            raise UserError(
                f"data.also: {part.name} has images {part.shape}, but {first.name} has "
                f"{first.shape}; only data sets of one shape can be joined"
            )
    return ImageSet(
        name="+".join(part.name for part in parts),
        split="+".join(part.split for part in parts),
        shape=first.shape,
        fingerprint=fingerprint({"joined": [part.fingerprint for part in parts]}),
        count=sum(len(part) for part in parts),
        pixels=_JoinedPixels(parts),
    )


class _JoinedPixels:
    def __init__(self, parts: Sequence[ImageSet]) -> None:
        self.parts = parts
        self.any_order = all(part.pixels.any_order for part in parts)
        self.begins = [0, *accumulate(len(part) for part in parts)]

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """See `pipeline.image_set.Pixels.take`."""
        places = pairwise(np.searchsorted(numbers, self.begins))
        rows = zip(self.parts, self.begins, places, strict=False)
        return np.concatenate([part.take(numbers[a:b] - begin) for part, begin, (a, b) in rows])

    def labels(self) -> None:
        """See `pipeline.image_set.Pixels.labels`."""
        return
