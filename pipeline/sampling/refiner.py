"""Refiners: flows in pixel space that sample the detail that a decoder leaves out of an image.

Decoding is many-to-one, so decoded images are smoother than real ones. A refiner is a run with
`velocity.image_channels`: conditioned on the decoded image c, it transports noise to a residual r,
and the refined image is c + r. It belongs to one autoencoder and serves all flows on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.flow import Flow
from flows.mixed_precision import in_mixed_precision
from flows.networks.condition import Condition
from flows.solving.solver import SolverConfig
from pipeline.errors import JkoflowError, UserError
from pipeline.runs.run import Run, is_refiner, open_run, same_autoencoder
from pipeline.sampling.solvers import solver_identity


@dataclass(frozen=True)
class Refiner:
    """Refiner of decoded images: a run of one block, conditioned on an image.

    Its network has the precision fp32 or bf16.
    """

    run: Run
    precision: str = "fp32"

    @cached_property
    def flow(self) -> Flow:
        """The flow that carries noise to residuals; it shares its weights with the run."""
        return in_mixed_precision(self.run.flow) if self.precision == "bf16" else self.run.flow

    @property
    def solver(self) -> SolverConfig:
        """The solver, which the refiner's own configuration sets."""
        return self.run.config.sampler.of_block(0)

    @cached_property
    def nfe(self) -> int:
        """Network evaluations per image (measured on 16 images of noise)."""
        shape, rng = (16, *self.flow.shape), torch.Generator().manual_seed(0)
        device = next(self.flow.parameters()).device
        images = torch.randn(shape, generator=rng).clamp(-1.0, 1.0).to(device)
        noise = torch.randn(shape, generator=rng).to(device)
        with torch.inference_mode():
            condition = Condition(image=images)
            return int(self.flow.transport(noise, True, self.solver, condition=condition).nfe)

    def identity(self) -> dict[str, Any]:
        """Return what decides the refinement, except noise and precision, as JSON values."""
        run = self.run
        return {"name": run.config.name, "run": run.fingerprint, **solver_identity(self.solver)}

    @torch.inference_mode()
    def sample_detail(self, decoded: Tensor, rng: torch.Generator) -> Tensor:
        """Add the detail that the decoder left out of images (B, C, H, W) in [-1, 1]."""
        self.flow.to(decoded.device)
        noise = torch.randn(decoded.shape, generator=rng).to(decoded.device)
        condition = Condition(image=decoded.half().float())  # as in training
        residual = self.flow.decode(noise, self.solver, condition=condition)
        return (decoded + self.run.standardisation.undo(residual)).clamp(-1.0, 1.0)


def open_refiner(run: Run, name: str, precision: str) -> Refiner:
    """Open the refiner `name`, a run or zoo:NAME, of the images of a run on latents.

    Raises:
        UserError: the refiner cannot be opened, is no refiner, or belongs to another autoencoder.
    """
    try:
        other = open_run(Path(name))
    except JkoflowError as error:
        raise UserError(
            f"the refiner of the run at {run.name} cannot be used ({error}); give another "
            "--refiner, or sample without one by --refiner none"
        ) from error
    if not is_refiner(other):
        raise UserError(
            f"the run at {other.name} is no refiner: its network is not conditioned on an image "
            "(velocity.image_channels=0); train one by a configuration such as cifar10-refiner"
        )
    if not same_autoencoder(run, other):
        raise UserError(
            f"refiner {other.name} was trained on images of another autoencoder than that of the "
            f"run at {run.name}; train one with the same autoencoder.weights"
        )
    return Refiner(other, precision)
