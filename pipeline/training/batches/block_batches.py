"""Batches of a block in training: samples, classes and probes.

All are pure functions of (seed, block, step). What is random is drawn for the whole batch and then
sliced. So it does not depend on the ranks and micro-batches that share the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flows.networks.condition import Condition
from flows.solving.divergence import Divergence
from flows.spec import BlockSpec
from pipeline.config.training import TrainConfig
from pipeline.runtime.devices import to_device
from pipeline.runtime.rng import Batches, generator
from pipeline.storage.shards.read_ahead import ReadAhead
from pipeline.storage.shards.reader import SCATTERED, StoreReader
from pipeline.training.batches.matching_loss import IMAGE
from pipeline.training.stages import stage_index


class BlockBatches:
    """Batches of a block; a part of one is given by positions in it, int64 (n,).

    Args:
        spec: of the block.
        stage: the samples that the block trains on.
        recipe: the train section: batch size and seed.
        number: of the pass; each pass draws its own batches and probes.

    Attributes:
        redraw: part of the key of probes, noise and times; another value draws others for the same
            samples.
    """

    def __init__(
        self, spec: BlockSpec, stage: StoreReader, recipe: TrainConfig, number: int = 0
    ) -> None:
        self.spec, self.stage, self.recipe = spec, stage, recipe
        self.index = stage_index(stage)
        self.salt = (number,) if number else ()
        self.redraw: tuple[str | int, ...] = ()
        parts = ("block", self.index, *self.salt)
        self._order = Batches(len(stage), recipe.batch_size, recipe.seed, *parts)
        self._indices: Callable[[int], Tensor] = self._order.indices

    @contextlib.contextmanager
    def reading_ahead(self, last: int) -> Iterator[None]:
        """Let a thread read the next batch of a large stage while a step computes.

        Args:
            last: step after the last.
        """
        if len(self.stage) < SCATTERED:
            yield
            return
        store, ahead = self.stage, ReadAhead(self.stage, self._order.indices, last)
        self.stage, self._indices = ahead, ahead.batch
        try:
            yield
        finally:
            self.stage, self._indices = store, self._order.indices
            ahead.close()

    def require_samples_for_all(self, ranks: int) -> None:
        """Raise UserError if a rank gets no sample of a batch."""
        self._order.require_samples_for_all(ranks)

    def indices(self, step: int) -> Tensor:
        """Return the indices of the samples in the batch of a step, int64 (B,)."""
        return self._indices(step)

    def matching_source(self, step: int) -> torch.Generator:
        """Return the generator of noise and times of a step."""
        return generator(self.recipe.seed, "matching", *self._place(step), *self.redraw)

    def samples(self, step: int, part: Tensor) -> Tensor:
        """Return the samples (n, *shape) of a part; they are drawn again if moments are known."""
        rows = self.indices(step)[part]
        if not self.stage.manifest["identity"].get("moments"):
            return self.stage.take("z", rows)
        mean, std = self.stage.take("mean", rows), self.stage.take("std", rows)
        source = generator(self.recipe.seed, "posterior", *self._place(step))
        noise = torch.randn(self.recipe.batch_size, *mean.shape[1:], generator=source)
        return mean + std * noise[part]

    def labels_with_dropout(self, step: int, part: Tensor) -> Tensor | None:
        """Return the classes (n,) of a part; the null label replaces some at random."""
        labels, dropout = self.labels(self.indices(step)[part]), self.spec.velocity.class_dropout
        if labels is None or not dropout:
            return labels
        source = generator(self.recipe.seed, "labels", *self._place(step))
        dropped = torch.rand(self.recipe.batch_size, generator=source)[part] < dropout
        return labels.masked_fill(dropped, self.spec.velocity.classes)

    def labels(self, rows: Tensor) -> Tensor | None:
        """Return the classes (n,) of the samples at rows (n,), for a block with classes."""
        return self.stage.take("labels", rows) if self.spec.velocity.classes else None

    def condition(self, rows: Tensor) -> Condition | None:
        """Return the classes and images that condition the samples at rows (n,)."""
        conditioned = self.spec.velocity.image_channels > 0
        images = self.stage.take(IMAGE, rows).float() if conditioned else None
        labels = self.labels(rows)
        return None if labels is None and images is None else Condition(labels, image=images)

    def probes(
        self, divergence: Divergence, z: Tensor, step: int, part: Tensor, device: torch.device
    ) -> Callable[..., Tensor] | None:
        """Return a function that draws the probes of a part with samples z (n, *shape).

        Its arguments extend the key (seed, block, step), such as the number of the evaluation. An
        exact divergence has none.
        """
        if not divergence.random:
            return None
        whole = z.new_empty(()).expand(self.recipe.batch_size, *z.shape[1:])

        def draw(*evaluation: int) -> Tensor:
            place = (*self._place(step), *self.redraw, *evaluation)
            eps = divergence.draw_probe(whole, generator(self.recipe.seed, "probe", *place))
            assert eps is not None
            eps = eps if len(part) == eps.shape[1] else eps[:, part]
            return to_device(eps, device)

        return draw

    def _place(self, step: int) -> tuple[int, ...]:
        """Return the part of a generator's key that a block and a step decide."""
        return (self.index, step, *self.salt)
