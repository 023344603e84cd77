"""Objective of a block in training: its loss and gradient on the batches of the optimiser steps.

A batch is taken in micro-batches (`pipeline.optim.micro_batches`), and a rank takes its share of
it. The optimiser is in `pipeline.training.block_trainer`.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from flows.block import Block
from flows.errors import SolveError
from flows.mixed_precision import MixedPrecision
from flows.objectives.losses import JkoLoss, LfmLoss, jko_loss, join_losses
from flows.solving.divergence import Divergence, Probes
from flows.solving.estimators import make_divergence
from flows.spec import BlockSpec
from pipeline.config.training import JkoConfig, MatchingConfig
from pipeline.errors import JkoflowError
from pipeline.optim.micro_batches import MicroBatches
from pipeline.runtime.devices import to_device
from pipeline.training.batches.block_batches import BlockBatches
from pipeline.training.batches.matching_loss import Regression, matching_regression


class BlockObjective:
    """Objective that a block minimises, on the batches of its stage.

    Args:
        block: in training, on the device.
        spec: its specification, with the step size h or the time γ.
        batches: of the block; their recipe has the batch size and the precision.
        micro_batches: parts in which this rank takes its share of a batch.
        options: the section of the objective.
        accelerator: device and ranks.
        regression: loss of a distillation; None takes the objective jko, lfm or fm.

    Attributes:
        divergence: estimator of ∇·v; None for an objective that integrates nothing.
    """

    def __init__(
        self,
        block: Block,
        spec: BlockSpec,
        batches: BlockBatches,
        micro_batches: MicroBatches,
        options: JkoConfig | MatchingConfig,
        accelerator: Accelerator,
        regression: Regression | None = None,
    ) -> None:
        self.block, self.spec, self.batches = block, spec, batches
        self.micro_batches, self.accelerator = micro_batches, accelerator
        self.mixed_precision = batches.recipe.precision == "bf16"
        self.divergence: Divergence | None = None
        self._regression = regression
        self._integrated = (
            Block(MixedPrecision(block.velocity), block.solver) if self.mixed_precision else block
        )
        if isinstance(options, JkoConfig):
            self.divergence = make_divergence(
                options.divergence, noise="rademacher", penalty=options.jacobian_weight
            )
        elif regression is None:
            self._regression = matching_regression(spec, options)

    def loss_and_gradient(self, step: int) -> JkoLoss | LfmLoss:
        """Compute the objective on this rank's share of a step's batch, and its gradient.

        The gradient replaces that of the parameters.

        Returns:
            the terms, detached.

        Raises:
            JkoflowError: the block cannot be integrated.
        """
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = torch.arange(rank, self.batches.recipe.batch_size, ranks)
        losses: list[JkoLoss | LfmLoss] = []

        def add(parts: tuple[Tensor, ...]) -> None:
            losses.clear()
            self.block.zero_grad(set_to_none=True)
            for part in parts:
                loss = self.loss(step, part)
                self._backward(loss.total * (len(part) / len(share)), step)
                losses.append(join_losses([loss]))  # without its graph, whose memory is free then

        self.micro_batches.run(share, add)
        return join_losses(losses)

    def gradient(self, step: int, redraw: int = 0) -> Tensor:
        """Compute the gradient on the batch of a step on the CPU, float64 (parameters,).

        Each value of `redraw` has other probes, or times and noise, for the same samples.

        Raises:
            JkoflowError: the block cannot be integrated.
        """
        self.batches.redraw = ("redraw", redraw) if redraw else ()
        try:
            self.loss_and_gradient(step)
        finally:
            self.batches.redraw = ()
        zero, parameters = torch.zeros(()), list(self.block.parameters())
        gradients = [zero.expand_as(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([gradient.cpu().double().flatten() for gradient in gradients])

    def loss(self, step: int, part: Tensor) -> JkoLoss | LfmLoss:
        """Compute the objective on a part of a step's batch, int64 positions (n,).

        Raises:
            JkoflowError: the block cannot be integrated.
        """
        device = self.accelerator.device
        if self._regression is not None:
            batch, source = self.batches.indices(step), self.batches.matching_source(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision):
                stage = self.batches.stage
                return self._regression(self.block.velocity, stage, batch, source, part)
        assert self.divergence is not None
        z, labels = self.batches.samples(step, part), self.batches.labels_with_dropout(step, part)
        probes = self.batches.probes(self.divergence, z, step, part, device)
        eps: Tensor | Probes | None = probes
        if probes is not None and not self.block.solver.allows_probes_per_evaluation:
            eps = probes()  # one for the whole solve
        z = to_device(z, device)
        try:
            return jko_loss(self._integrated, z, self.spec.h, self.divergence, eps, labels)
        except SolveError as error:
            raise self.failure(step, str(error)) from error

    def failure(self, step: int, reason: str) -> JkoflowError:
        """Return the error of a step that failed, with what to change."""
        advice = "lower train.lr"
        if self.spec.objective == "jko":
            advice += " or jko.h0, or take more jko.solver.steps"
        return JkoflowError(
            f"block {self.batches.index} failed at step {step}: {reason}; {advice}, then train "
            "again"
        )

    def _backward(self, total: Tensor, step: int) -> None:
        """Add the gradient of a loss; the adjoint method integrates here."""
        try:
            total.backward()
        except (SolveError, AssertionError) as error:  # torchdiffeq raises AssertionError
            raise self.failure(step, str(error) or "the adjoint solver failed") from error
