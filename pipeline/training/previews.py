"""Previews of a training: samples from a fixed noise, as a grid and, if asked for, their FID.

previews/block-00-step-00000500.png shows the flow of the finished blocks and the averaged weights
of the block in training. The noise is the same in every grid. Sampling draws no random numbers of
the training, and works on a copy of the block, so no weight depends on it.
"""

from __future__ import annotations

import json
from functools import cached_property, partial

import torch
from torch import Tensor

from autoencoders.base import Autoencoder, to_uint8
from eval.distances import frechet_distance
from eval.features.inception import FidInception
from eval.gaussian import GaussianStats
from eval.pictures import image_grid, save_png
from eval.sets.sources import stats_of
from flows.block import Block
from flows.errors import SolveError
from flows.flow import Flow
from flows.networks.condition import Condition
from flows.spec import BlockSpec
from pipeline.assets.fetch import fetch_asset
from pipeline.errors import JkoflowError
from pipeline.runs.manifest import Manifest
from pipeline.runs.passes import Pass
from pipeline.runs.run import Run, load_block
from pipeline.runtime.console import say
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from pipeline.storage.training_log import TrainingLog
from pipeline.training.block_source import TrainingContext
from pipeline.training.block_trainer import BlockTrainer

FOLDER = "previews"
_SHOWN, _COLUMNS = 64, 8


class Previews:
    """Drawer of previews; the main process draws, and the others wait for its next gradient.

    A run on points and a refiner have none, because neither samples images from noise alone.

    Args:
        context: of the training.
        manifest: of the run, for its autoencoder.
    """

    def __init__(self, context: TrainingContext, manifest: Manifest) -> None:
        self.context, self.manifest = context, manifest
        config = context.config
        drawable = manifest.autoencoder is not None and not config.velocity.image_channels
        self.every = config.train.preview_every if drawable else 0
        self._failed = False

    def due(self, trainer: BlockTrainer) -> bool:
        """Return whether a preview follows the step that a block has come to."""
        if not self.every:
            return False
        return trainer.done % self.every == 0 or trainer.done == trainer.iterations

    def draw(self, plan: Pass, trainer: BlockTrainer, log: TrainingLog, total_step: int) -> None:
        """Write the grid, send it to the trackers, and log the FID of `train.preview_fid` samples.

        Args:
            plan: the pass in training.
            trainer: of its next block.
            log: of the run; its `number` is that of the pass.
            total_step: steps of all blocks and passes.
        """
        main = self.context.accelerator.is_main_process and not self._failed
        if not self.every or not (main or trainer.sharded):
            return
        block = trainer.snapshot()
        if not main:
            return
        index, step, n = trainer.index, trainer.done, self.context.config.train.preview_fid
        try:
            images = self._sample(self._flow(plan, trainer.spec, block), max(n, _SHOWN))
        except SolveError as error:
            return say(f"block {index} has no preview at step {step}: {error}")
        except JkoflowError as error:  # as of an autoencoder that is not available here
            self._failed = True
            return say(f"the run has no previews: {error}")
        path = self.context.folder / preview_file(index, step, log.number)
        note = {"kind": "preview", "pass": log.number, "block": index, "step": step}
        picture = image_grid(images[:_SHOWN], _COLUMNS, scale=2 if images.shape[-1] <= 64 else 1)
        atomic.write_with(path, partial(save_png, picture, note=json.dumps(note)))
        log.show(index, step, total_step, path)
        if n:
            try:
                fid = frechet_distance(self._statistics(images[:n]), self._reference)
            except (JkoflowError, ValueError, OSError) as error:
                say(f"the FID of the preview at step {step} is not measured: {error}")
            else:
                log.measure(index, step, total_step, fid=round(fid, 4), fid_n=n)

    def _flow(self, plan: Pass, spec: BlockSpec, block: Block) -> Flow:
        """Return the flow of the finished blocks of a pass and the block in training."""
        folder, shape = self.context.folder, self.manifest.shape
        blocks = [load_block(folder, row, shape) for row in plan.blocks]
        flow = Flow.from_blocks(shape, [*blocks, (spec, block)])
        return flow.eval().requires_grad_(False).to(self.context.accelerator.device)

    @torch.inference_mode()
    def _sample(self, flow: Flow, n: int) -> Tensor:
        """Sample images, uint8 (n, C, H, W); classes take turns."""
        config, device = self.context.config, self.context.accelerator.device
        size, solvers, parts = config.generate.batch_size, config.sampler.of_blocks(len(flow)), []
        for first in range(0, n, size):
            noise = torch.randn((size, *flow.shape), generator=generator("preview", first // size))
            noise = noise[: n - first].to(device)
            condition = None
            if flow.classes:
                condition = Condition(torch.arange(first, first + len(noise)) % flow.classes)
            z = flow.decode(noise, solvers, condition=condition)
            latents = self.manifest.standardisation.undo(z)
            parts.append(to_uint8(self._autoencoder.decode(latents)).cpu())
        return torch.cat(parts)

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        context = self.context
        run = Run(context.folder, context.config, self.manifest, Flow(self.manifest.shape))
        model = run.autoencoder()
        model.to(context.accelerator.device)  # type: ignore[attr-defined]
        return model

    @cached_property
    def _inception(self) -> FidInception:
        weights = fetch_asset("inception", log=say)
        return FidInception.from_weights(weights).to(self.context.accelerator.device)

    @cached_property
    def _reference(self) -> GaussianStats:
        return stats_of(self.context.config.evaluate.reference, lambda: self._inception)

    def _statistics(self, images: Tensor) -> GaussianStats:
        """Compute the mean and the covariance of the features of images."""
        stats = GaussianStats()
        for part in images.split(self.context.config.generate.batch_size):
            stats.update(self._inception.features(part))
        return stats


def preview_file(index: int, step: int, number: int = 0) -> str:
    """Return the path of a preview of a block inside the run directory."""
    prefix = f"pass-{number:02d}-" if number else ""
    return f"{FOLDER}/{prefix}block-{index:02d}-step-{step:08d}.png"

