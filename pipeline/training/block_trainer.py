"""Trains one block on a stage: optimiser, learning rate, EMA, checks for divergence, checkpoint.

Only this block is in memory. Batches and probes derive from (seed, stage, step)
(`pipeline.training.batches`). Every rank takes its share of each batch, and gradients are averaged
over ranks. Under FSDP, every rank also holds only its part of the network
(`pipeline.runtime.sharding`).
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
from flows.errors import SolveError
from flows.mixed_precision import MixedPrecision
from flows.networks.base import Velocity
from flows.networks.image_condition import ImageConditionedNetwork
from flows.objectives.losses import JkoLoss, LfmLoss, jko_loss, join_losses
from flows.solving.divergence import Divergence, Probes
from flows.solving.estimators import make_divergence
from flows.spec import BlockSpec, build_block
from pipeline.config.training import JkoConfig, MatchingConfig, TrainConfig
from pipeline.config.values import of_block
from pipeline.errors import JkoflowError
from pipeline.optim.ema import Ema
from pipeline.optim.gradients import average_gradients
from pipeline.optim.learning_rate import set_learning_rate, warmup_cosine
from pipeline.optim.micro_batches import MicroBatches
from pipeline.optim.optimisers import make_optimizer
from pipeline.runs.manifest import Manifest
from pipeline.runtime.devices import to_device
from pipeline.runtime.distributed import raise_on_all_ranks, sum_over_ranks
from pipeline.runtime.sharding import gather, scatter, shard, shards_networks
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from pipeline.storage.shards.reader import StoreReader
from pipeline.training.batches.block_batches import BlockBatches
from pipeline.training.batches.matching_loss import Regression, matching_regression
from pipeline.training.stages import number_of

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
        regression: loss of an objective that integrates nothing; None is flow matching.

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
        self.index = number_of(stage)
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
        half = recipe.precision == "bf16"
        self.integrated = Block(MixedPrecision(block.velocity), block.solver) if half else block
        self.divergence: Divergence | None = None
        self.regression = regression
        if isinstance(options, JkoConfig):
            self.divergence = make_divergence(
                options.divergence, noise="rademacher", penalty=options.jacobian_weight
            )
        elif regression is None:
            self.regression = matching_regression(spec, options)
        self.batches = BlockBatches(spec, stage, recipe, number)
        self.batches.require_samples_for_all(accelerator.num_processes)
        # parts that follow memory would differ between ranks, whose passes are collectives
        most = recipe.batch_size if self.sharded else None
        self.micro_batches = MicroBatches(recipe.micro_batch or most)
        self.done = 0
        self.seconds, self.clock = 0.0, time.perf_counter
        self.stopped = False
        self._sound: dict[str, Tensor] | None = None

    def gradient(self, step: int, redraw: int = 0) -> Tensor:
        """Compute the gradient on the batch of a step on the CPU, float64 (parameters,).

        The weights stay. Each value of `redraw` has other probes, or times and noise, for the same
        samples.

        Raises:
            JkoflowError: the block cannot be integrated.
        """
        done, self.done = self.done, step
        self.batches.redraw = ("redraw", redraw) if redraw else ()
        try:
            self._loss_and_gradient()
        finally:
            self.done, self.batches.redraw = done, ()
        zero = torch.zeros(())
        gradients = [zero.expand_as(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([gradient.cpu().double().flatten() for gradient in gradients])

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
            raise self._failure(f"the loss is {total}, its gradient's norm {norm}")
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
            return self._loss_and_gradient(), None
        except JkoflowError as error:
            if self.sharded:
                raise
            return None, error

    def _loss_and_gradient(self) -> JkoLoss | LfmLoss:
        """Compute the block's objective and gradient on this rank's share of the next batch."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = torch.arange(rank, self.recipe.batch_size, ranks)
        losses: list[JkoLoss | LfmLoss] = []

        def add(parts: tuple[Tensor, ...]) -> None:
            losses.clear()
            self.optimizer.zero_grad(set_to_none=True)
            for part in parts:
                loss = self._loss(part)
                self._backward(loss.total * (len(part) / len(share)))
                losses.append(join_losses([loss]))  # without its graph, whose memory is free then

        self.micro_batches.run(share, add)
        return join_losses(losses)

    def _backward(self, total: Tensor) -> None:
        """Add the gradient of a loss; the adjoint method integrates here."""
        try:
            total.backward()
        except (SolveError, AssertionError) as error:  # torchdiffeq raises AssertionError
            raise self._failure(str(error) or "the adjoint solver failed") from error

    def _loss(self, part: Tensor) -> JkoLoss | LfmLoss:
        """Compute the block's objective on a part of the next batch, int64 positions (n,)."""
        step = self.done
        if self.regression is not None:
            kind, half = self.accelerator.device.type, self.recipe.precision == "bf16"
            batch, source = self.batches.indices(step), self.batches.matching_source(step)
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                stage = self.batches.stage
                return self.regression(self.block.velocity, stage, batch, source, part)
        assert self.divergence is not None
        device = self.accelerator.device
        z, labels = self.batches.samples(step, part), self.batches.labels_with_dropout(step, part)
        probes = self.batches.probes(self.divergence, z, step, part, device)
        eps: Tensor | Probes | None = probes
        if probes is not None and not self.block.solver.allows_probes_per_evaluation:
            eps = probes()  # one for the whole solve
        z = to_device(z, device)
        try:
            return jko_loss(self.integrated, z, self.spec.h, self.divergence, eps, labels)
        except SolveError as error:
            raise self._failure(str(error)) from error

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
        self._fill_gradients()
        here = [] if self.sharded else self.parameters  # FSDP has averaged those gradients
        mean = average_gradients(self.accelerator, here, weight, total)
        return float(gather(nn.utils.clip_grad_norm_(self.parameters, limit))), float(mean)

    def _fill_gradients(self) -> None:
        """Set gradients to zero that this rank lacks and another has.

        A rank's share of a batch may hold no sample of the time that one of a block's several
        networks covers.
        """
        if self.accelerator.num_processes == 1 or self.spec.velocity.nets == 1 or self.sharded:
            return
        present = torch.tensor([float(p.grad is not None) for p in self.parameters])
        counts = sum_over_ranks(self.accelerator, present.to(self.accelerator.device)).tolist()
        for parameter, count in zip(self.parameters, counts, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _failure(self, reason: str) -> JkoflowError:
        advice = "lower train.lr"
        if self.spec.objective == "jko":
            advice += " or jko.h0, or take more jko.solver.steps"
        return JkoflowError(
            f"block {self.index} failed at step {self.done}: {reason}; {advice}, then train again"
        )
