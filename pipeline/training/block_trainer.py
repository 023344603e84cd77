"""Optimises the weights of one block: optimiser, learning rate, EMA, checks, checkpoint.

Only this block is in memory. Its loss and gradient come from `pipeline.training.batches`. Every
rank takes its share of each batch, and gradients are averaged over ranks. Under FSDP, every rank
also holds only its part of the network (`pipeline.runtime.sharding`).
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flows.block import Block
from flows.networks.base import Velocity
from flows.networks.image_condition import ImageConditionedNetwork
from flows.objectives.losses import JkoLoss, LfmLoss
from flows.spec import BlockSpec, build_block
from pipeline.config.training import JkoConfig, MatchingConfig, TrainConfig
from pipeline.config.values import of_block
from pipeline.errors import JkoflowError
from pipeline.optim.ema import Ema
from pipeline.optim.gradients import average_gradients, fill_gradients
from pipeline.optim.learning_rate import set_learning_rate, warmup_cosine
from pipeline.optim.micro_batches import MicroBatches
from pipeline.optim.optimisers import make_optimizer
from pipeline.runs.manifest import Manifest
from pipeline.runtime.distributed import raise_on_all_ranks
from pipeline.runtime.sharding import gather, scatter, shard, shards_networks
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from pipeline.storage.shards.reader import StoreReader
from pipeline.training.batches.block_batches import BlockBatches
from pipeline.training.batches.block_objective import BlockObjective
from pipeline.training.batches.matching_loss import Regression
from pipeline.training.stages import stage_index

#: state of Adam with the shape of the parameter
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepReport:
    """Result of one optimiser step.

    Attributes:
        terms: named terms of the loss per dimension, and the norm of the gradient.
        nfe: evaluations of the velocity.
    """

    terms: dict[str, float]
    nfe: int


class BlockTrainer:
    """Block in training; `step()` makes one optimiser step.

    Args:
        block: with its initial weights; it is trained in place.
        spec: its specification, with the step size h.
        stage: the samples it trains on.
        recipe: the train section.
        options: the section of the objective.
        accelerator: device and ranks.
        number: of the pass; each pass draws its own batches and probes.
        regression: loss of a distillation; None takes the objective jko, lfm or fm.

    Attributes:
        seconds: of all steps, by `clock`; a checkpoint keeps them.
        clock: function that returns seconds from an arbitrary origin.

    Raises:
        UserError: there are more ranks than samples in a batch, or a network cannot be sharded.
    """

    def __init__(
        self,
        block: Block,
        spec: BlockSpec,
        stage: StoreReader,
        recipe: TrainConfig,
        options: JkoConfig | MatchingConfig,
        accelerator: Accelerator,
        number: int = 0,
        regression: Regression | None = None,
    ) -> None:
        self.block, self.spec, self.stage = block, spec, stage
        self.recipe, self.accelerator = recipe, accelerator
        self.index = stage_index(stage)
        self.sharded = shards_networks(accelerator)
        block.train().requires_grad_(True)
        if self.sharded:  # part by part, so that the whole network is never on the device
            network: Velocity = block.velocity
            if isinstance(network, ImageConditionedNetwork):
                network = network.inner  # which is what a pass calls
            shard(accelerator, network)
        else:
            block.to(accelerator.device)
        self.parameters = list(block.parameters())
        self.iterations = of_block(recipe.iterations, self.index)
        self.lr = of_block(recipe.lr, self.index)
        self.optimizer = make_optimizer(recipe.optimizer, block, self.lr)
        self.average = Ema(block, recipe.ema) if recipe.ema > 0 else None
        batches = BlockBatches(spec, stage, recipe, number)
        batches.require_samples_for_all(accelerator.num_processes)
        # parts that follow memory would differ between ranks, whose passes are collectives
        most = recipe.batch_size if self.sharded else None
        parts = MicroBatches(recipe.micro_batch or most)
        self.objective = BlockObjective(
            block, spec, batches, parts, options, accelerator, regression
        )
        self.done = 0
        self.seconds, self.clock = 0.0, time.perf_counter
        self.stopped = False
        self._sound: dict[str, Tensor] | None = None

    @property
    def batches(self) -> BlockBatches:
        """Batches of the block."""
        return self.objective.batches

    def step(self) -> StepReport:
        """Make one optimiser step.

        Raises:
            JkoflowError: the block cannot be integrated, or its loss or gradient is not finite, on
                any rank.
        """
        began = self.clock()
        loss, failure = self._loss_or_failure()  # with its gradient
        lr = warmup_cosine(
            self.done,
            self.iterations,
            peak=self.lr,
            final=self.recipe.lr_final,
            warmup=self.recipe.warmup,
        )
        set_learning_rate(self.optimizer, lr)
        norm, total = self._average_gradients(loss)
        if loss is None or not math.isfinite(norm) or not math.isfinite(total):
            # norm and total are those of the whole batch, so every rank comes here
            raise_on_all_ranks(self.accelerator, failure)
            reason = f"the loss is {total}, its gradient's norm {norm}"
            raise self.objective.failure(self.done, reason)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.block)
        self.done += 1
        self.seconds += self.clock() - began
        nfe = loss.nfe if isinstance(loss, JkoLoss) else 1
        terms = loss.per_dim(self.block.velocity.dim)
        if self.accelerator.num_processes > 1:
            terms["total"] = total / self.block.velocity.dim  # of the whole batch
        return StepReport(terms | {"grad_norm": norm}, nfe)

    @property
    def can_return(self) -> bool:
        """Whether there are earlier weights to return to."""
        return self._sound is not None

    def keep(self) -> None:
        """Keep the present averaged weights, so that `stop` can return to them."""
        self._sound = {name: value.clone() for name, value in self._weights().items()}

    def stop(self) -> None:
        """End the training of the block with the weights that were kept last."""
        self.stopped = True

    def snapshot(self) -> Block:
        """Return a frozen copy of the block with its present averaged weights; see `weights`."""
        weights = self.weights()
        if self.sharded:
            block = build_block(self.spec, self.block.velocity.shape)
            block.to(self.accelerator.device)
        else:
            block = copy.deepcopy(self.block)
        block.load_state_dict(weights)
        return block.eval().requires_grad_(False)

    def finish(self) -> Block:
        """Return the trained block with its averaged weights, frozen; see `weights`.

        It is whole on every rank, also under FSDP, where it ends the training.
        """
        if self.sharded:
            self.block, self.sharded = self.snapshot(), False
            self.parameters, self.average = list(self.block.parameters()), None
            if isinstance(self.optimizer, torch.optim.Adam):
                self.optimizer.state.clear()
        elif self.stopped and self._sound is not None:
            self.block.load_state_dict(self._sound)
        elif self.average is not None:
            self.average.copy_to(self.block)
        return self.block.eval().requires_grad_(False)

    def adopt(self, weights: dict[str, Tensor], seconds: float) -> None:
        """End the training with weights that were trained elsewhere; not under FSDP.

        Args:
            weights: of the block.
            seconds: of their training.
        """
        self.block.load_state_dict(weights)
        if self.average is not None:
            self.average.restart(self.block)
        self.done, self.seconds = self.iterations, seconds

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that the block would have if it were finished now.

        Under FSDP this is a collective.
        """
        whole: dict[str, Tensor] = gather(self._weights())
        return whole

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights; under FSDP those that this rank holds."""
        if self.stopped and self._sound is not None:
            return self._sound
        averages = self.average.average if self.average is not None else {}
        return {**self.block.state_dict(), **averages}

    def save(
        self, path: Path, log: dict[str, Any] | None = None, manifest: Manifest | None = None
    ) -> None:
        """Commit a checkpoint; all ranks call it, and rank 0 writes.

        Args:
            path: of the checkpoint.
            log: state of the log.
            manifest: of the run, with which `pipeline.runs.unfinished` opens it.
        """
        tensors = {
            "block": self.block.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "sound": self._sound,
        }
        tensors = gather(tensors, keep=self.accelerator.is_main_process)
        if not self.accelerator.is_main_process:
            return
        state: dict[str, Any] = {
            "step": self.done,
            "seconds": self.seconds,
            **tensors,
            "stopped": self.stopped,
            "log": log,
            "spec": self.spec.to_dict(),
            **({"manifest": manifest.to_json()} if manifest is not None else {}),
        }
        save_checkpoint(path, state)

    def load(self, path: Path) -> dict[str, Any] | None:
        """Continue from a checkpoint, of any number of ranks; return the state of the log."""
        state = load_checkpoint(path)
        if self.sharded:
            weights = self.block.state_dict()
            averages = self.average.state_dict() if self.average else None
            moments = {i: dict.fromkeys(_MOMENTS, p) for i, p in enumerate(self.parameters)}
            own = {"block": weights, "sound": weights, "average": averages}
            state = scatter(state, own | {"optimizer": {"state": moments}})
        self.done, self.seconds = state["step"], state["seconds"]
        self.block.load_state_dict(state["block"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._sound, self.stopped = state["sound"], state["stopped"]
        log: dict[str, Any] | None = state["log"]
        return log

    def _loss_or_failure(self) -> tuple[JkoLoss | LfmLoss | None, JkoflowError | None]:
        """Compute the objective and its gradient on this rank's share, or catch its error.

        Under FSDP the other ranks wait inside the network, so the error ends this one at once.
        """
        try:
            return self.objective.loss_and_gradient(self.done), None
        except JkoflowError as error:
            if self.sharded:
                raise
            return None, error

    def _average_gradients(self, loss: JkoLoss | LfmLoss | None) -> tuple[float, float]:
        """Average the gradients over ranks and clip them.

        Args:
            loss: on this rank; None after a failure, which makes the mean NaN on every rank.

        Returns:
            norm before clipping, and mean loss of the whole batch.
        """
        total, weight = torch.full((1,), math.nan, device=self.accelerator.device), 1.0
        if loss is not None:
            total = loss.total.detach().reshape(1)
            weight = loss.samples * self.accelerator.num_processes / self.recipe.batch_size
        limit = self.recipe.grad_clip if self.recipe.grad_clip > 0 else math.inf
        if not self.sharded and self.spec.velocity.nets > 1:
            # a rank's share may hold no sample of the time that one of the networks covers
            fill_gradients(self.accelerator, self.parameters)
        here = [] if self.sharded else self.parameters  # FSDP has averaged those gradients
        mean = average_gradients(self.accelerator, here, weight, total)
        return float(gather(nn.utils.clip_grad_norm_(self.parameters, limit))), float(mean)
