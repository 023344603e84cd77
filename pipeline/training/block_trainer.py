"""Trains one block on its stage: optimiser, learning rate, EMA, guards, checkpoint.

Only this block is in memory. Batches and probes derive from (seed, stage, step).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flows.block import Block
from flows.errors import SolveError
from flows.networks.condition import Condition
from flows.networks.image_condition import ImageConditionedNetwork
from flows.objectives.losses import JkoLoss, LfmLoss, jko_loss
from flows.solving.divergence import Divergence
from flows.solving.estimators import make_divergence
from flows.spec import BlockSpec
from pipeline.config.schema import JkoConfig, MatchingConfig, TrainConfig, of_block
from pipeline.errors import JkoflowError
from pipeline.optim.ema import Ema
from pipeline.optim.learning_rate import set_learning_rate, warmup_cosine
from pipeline.optim.optimisers import make_optimizer
from pipeline.runtime.distributed import raise_on_all_ranks
from pipeline.runtime.rng import Batches, generator
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from pipeline.storage.shards import StoreReader
from pipeline.training.matching_loss import IMAGE, batch_loss, pair_loss
from pipeline.training.parallel import Share


@dataclass(frozen=True)
class Step:
    """What one optimiser step reports.

    Attributes:
        terms: named terms of the loss, per dimension, and the norm of the gradient.
        nfe: evaluations of the right-hand side.
    """

    terms: dict[str, float]
    nfe: int


class BlockTrainer:
    """Holds a block in training; `step()` makes one optimiser step.

    Args:
        block: with its initial weights; trained in place.
        spec: its specification, which holds the step size h.
        stage: the samples it trains on.
        recipe: the train section.
        options: the section of the objective.
        accelerator: device and processes; every process takes its share of each batch.
        number: the pass; each draws other batches and probes.

    Raises:
        UserError: there are more processes than samples in a batch.
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
    ) -> None:
        self.block, self.spec, self.stage = block, spec, stage
        self.recipe, self.options, self.accelerator = recipe, options, accelerator
        self.index = int(stage.manifest["identity"]["stage"])
        block.train().requires_grad_(True).to(accelerator.device)
        self.parameters = list(block.parameters())
        self.share = Share(block, accelerator, spec.objective)
        kind, networks = recipe.optimizer, self.share.networks
        self.iterations = of_block(recipe.iterations, self.index)
        self.lr = of_block(recipe.lr, self.index)
        self.optimizers = [make_optimizer(kind, network, self.lr) for network in networks]
        self.share.freeze_others()
        self.average = Ema(block, recipe.ema) if recipe.ema > 0 else None
        self.divergence: Divergence | None = None
        if isinstance(options, JkoConfig):
            self.divergence = make_divergence(
                options.divergence, probes=options.probes, penalty=options.jacobian_weight
            )
        self.salt = (number,) if number else ()
        place = ("block", self.index, *self.salt)
        self.batches = Batches(len(stage), recipe.batch_size, recipe.seed, *place)
        self.batches.require_samples_for_all(accelerator.num_processes)
        self.done = 0
        self.seconds = 0.0

    def step(self) -> Step:
        """One optimiser step.

        Raises:
            JkoflowError: the block cannot be solved, or its loss or gradient is not finite, on
                this process or another.
        """
        began = time.perf_counter()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        loss, failure = self._loss_or_failure(rank, ranks)
        optimizers = [self.optimizers[j] for j in self.share.mine]
        lr = warmup_cosine(
            self.done,
            self.iterations,
            peak=self.lr,
            final=self.recipe.lr_final,
            warmup=self.recipe.warmup,
        )
        for optimizer in optimizers:
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
        if loss is not None:
            failure = self._backward(loss)
            loss = loss if failure is None else None
        norm, total = self._finish_gradients(loss)
        if loss is None or not math.isfinite(norm) or not math.isfinite(total):
            # both numbers are those of the whole batch, so that all processes are here
            raise_on_all_ranks(self.accelerator, failure)
            raise self._failure(f"the loss is {total}, its gradient's norm {norm}")
        for optimizer in optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.update(self.block)
        self.done += 1
        self.seconds += time.perf_counter() - began
        nfe = loss.nfe if isinstance(loss, JkoLoss) else 1
        dim = self.block.velocity.dim
        terms = loss.per_dim(dim)
        if self.share.apart:  # else one network's would stand for all
            terms["total"] = total / dim
        return Step(terms | {"grad_norm": norm}, nfe)

    def finish(self) -> Block:
        """The trained block with its averaged weights, frozen; all processes call it."""
        self._gather()
        if self.average is not None:
            self.average.copy_to(self.block)
        return self.block.eval().requires_grad_(False)

    def weights(self) -> dict[str, Tensor]:
        """What the block would be if it were finished now: its averaged weights.

        All processes call it.
        """
        self._gather()
        averages = self.average.average if self.average is not None else {}
        return {**self.block.state_dict(), **averages}

    def save(self, path: Path) -> None:
        """Commit a checkpoint; all processes call it, and the first writes."""
        self._gather()
        optimizers = self.share.states([optimizer.state_dict() for optimizer in self.optimizers])
        if not self.accelerator.is_main_process:
            return
        state: dict[str, Any] = {
            "step": self.done,
            "seconds": self.seconds,
            "block": self.block.state_dict(),
            "optimizers": optimizers,
            "average": self.average.state_dict() if self.average else None,
        }
        save_checkpoint(path, state)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = load_checkpoint(path)
        self.done, self.seconds = state["step"], state["seconds"]
        self.block.load_state_dict(state["block"])
        for optimizer, known in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(known)
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _loss_or_failure(
        self, rank: int, ranks: int
    ) -> tuple[JkoLoss | LfmLoss | None, JkoflowError | None]:
        """The objective on this rank's share, or why there is none."""
        try:
            return self._loss(rank, ranks), None
        except JkoflowError as error:
            return None, error

    def _backward(self, loss: JkoLoss | LfmLoss) -> JkoflowError | None:
        """The gradient, or why there is none: the adjoint method solves backwards here."""
        try:
            loss.total.backward()
        except (SolveError, AssertionError) as error:  # the second are torchdiffeq's own checks
            return self._failure(str(error) or "the adjoint solver gave up")
        return None

    def _loss(self, rank: int, ranks: int) -> JkoLoss | LfmLoss:
        """The block's objective on this rank's share of the next batch."""
        if self.spec.objective != "jko":
            half = self.recipe.precision == "bf16"
            with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=half):
                return self._regression()
        rows = self.batches.indices(self.done, rank, ranks)
        z, labels = self.stage.take("z", rows), self.labels(rows)
        probe = self._probe(z, rank, ranks)
        z = z.to(self.accelerator.device)
        assert self.divergence is not None
        try:
            return jko_loss(self.block, z, self.spec.h, self.divergence, probe, labels)
        except SolveError as error:
            raise self._failure(str(error)) from error

    def _regression(self) -> LfmLoss:
        drawn = generator(self.recipe.seed, "matching", self.index, self.done, *self.salt)
        whole = self.batches.indices(self.done)
        field, gamma = self.block.velocity, self.spec.gamma
        if self.spec.objective == "distill":
            return pair_loss(field, self.stage, whole, drawn, self.share.rows)
        dropout = self.spec.velocity.class_dropout
        rows = self.share.rows
        assert isinstance(self.options, MatchingConfig)
        return batch_loss(field, self.stage, whole, gamma, self.options, drawn, rows, dropout)

    def labels(self, rows: Tensor) -> Tensor | None:
        """The classes of some samples, for a block with classes."""
        return self.stage.take("labels", rows) if self.block.velocity.classes else None

    def condition(self, rows: Tensor) -> Condition | None:
        """Return the classes and images of some samples; None for an unconditional block."""
        conditioned = isinstance(self.block.velocity, ImageConditionedNetwork)
        image = self.stage.take(IMAGE, rows).float() if conditioned else None
        labels = self.labels(rows)
        return None if labels is None and image is None else Condition(labels, image=image)

    def _probe(self, z: Tensor, rank: int, ranks: int) -> Tensor | None:
        """This rank's rows of the probe drawn for the whole batch."""
        drawn = generator(self.recipe.seed, "probe", self.index, self.done, *self.salt)
        whole = z.new_empty(()).expand(self.recipe.batch_size, *z.shape[1:])
        assert self.divergence is not None
        eps = self.divergence.draw_probe(whole, drawn)
        if eps is None:
            return None
        return eps[:, rank::ranks][:, : len(z)].to(self.accelerator.device)

    def _finish_gradients(self, loss: JkoLoss | LfmLoss | None) -> tuple[float, float]:
        """Those of the whole batch; returns their norm before clipping, and the mean loss.

        Args:
            loss: on this process; None, which failed, makes the mean NaN everywhere.
        """
        total, weight = torch.full((1,), math.nan, device=self.accelerator.device), 1.0
        if loss is not None:
            total = loss.total.detach().reshape(1)
            weight = loss.samples * self.accelerator.num_processes / self.recipe.batch_size
        limit = self.recipe.grad_clip if self.recipe.grad_clip > 0 else math.inf
        return self.share.finish_gradients(weight, total, limit)

    def _gather(self) -> None:
        """What other processes have trained comes here."""
        self.share.gather(dict(self.block.named_parameters()))
        if self.average is not None:
            self.share.gather(self.average.average)

    def _failure(self, reason: str) -> JkoflowError:
        advice = "lower train.lr"
        if self.spec.objective == "jko":
            advice += " or jko.h0, or take more jko.solver.steps"
        return JkoflowError(
            f"block {self.index} failed at step {self.done}: {reason}; {advice}, then train again"
        )
