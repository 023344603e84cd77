"""A refiner: a second flow, in pixels, that draws what a decoder leaves out of an image.

A decoder gives one image for latents that many share, smoother than any of them. A refiner is a
run with `velocity.beside` (`pipeline.training.sources`): told the decoded image c, it carries
noise to a
residual r, and the image is c + r. It belongs to one autoencoder, and serves all flows on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.block import SolverConfig
from flows.flow import Flow
from flows.mixed_precision import in_half
from flows.networks.condition import Condition
from pipeline.errors import JkoflowError, UserError
from pipeline.runs.run import Run, is_refiner, open_run


@dataclass(frozen=True)
class Refiner:
    """A refiner as images are drawn with it.

    Attributes:
        run: of one block, told an image beside every sample.
        precision: of its network, fp32 or bf16.
    """

    run: Run
    precision: str = "fp32"

    @cached_property
    def flow(self) -> Flow:
        """Its flow; shares its weights with the run's."""
        return in_half(self.run.flow) if self.precision == "bf16" else self.run.flow

    @property
    def solver(self) -> SolverConfig:
        """That its run draws with: a setting of the refiner, not of the flow that it refines."""
        return self.run.config.push

    def describe(self) -> dict[str, Any]:
        """What decides the images besides what is refined, and noise; JSON-ready."""
        solver = self.solver
        grid = {"rtol": solver.rtol, "atol": solver.atol}
        grid = grid if solver.adaptive else {"steps": solver.steps}
        return {"run": self.run.fingerprint, "method": solver.method, **grid}

    def about(self) -> dict[str, Any]:
        """What people are told of it beside a number; JSON-ready."""
        return {"name": self.run.config.name, **self.describe()}

    @torch.inference_mode()
    def refine(self, decoded: Tensor, drawn: torch.Generator) -> Tensor:
        """Images with what the decoder left out.

        Args:
            decoded: (B, C, H, W), in [-1, 1].
            drawn: source of the noise, on the CPU.

        Returns:
            (B, C, H, W), in [-1, 1].
        """
        self.flow.to(decoded.device)
        noise = torch.randn(decoded.shape, generator=drawn).to(decoded.device)
        of = Condition(beside=decoded.half().float())  # as the training had them
        residual = self.flow.decode(noise, self.solver, condition=of)
        return (decoded + self.run.standardisation.undo(residual)).clamp(-1.0, 1.0)

    @torch.inference_mode()
    def nfe(self) -> int:
        """Evaluations of its network an image (measured on 16, of noise)."""
        shape, drawn = (16, *self.flow.shape), torch.Generator().manual_seed(0)
        device = next(self.flow.parameters()).device
        of = Condition(beside=torch.randn(shape, generator=drawn).clamp(-1.0, 1.0).to(device))
        noise = torch.randn(shape, generator=drawn).to(device)
        return int(self.flow.transport(noise, True, self.solver, condition=of).nfe)


def open_refiner(run: Run, name: str, precision: str) -> Refiner:
    """The refiner of a run's images.

    Args:
        run: on latents.
        name: of the refiner's run, or zoo:NAME.
        precision: of its network.

    Raises:
        UserError: no run, no refiner, or one of another autoencoder.
    """
    try:
        other = open_run(Path(name))
    except JkoflowError as error:
        raise UserError(
            f"the refiner of the run at {run.folder} cannot be used ({error}); give another "
            "--refiner, or do without by --refiner none"
        ) from error
    if not is_refiner(other):
        raise UserError(
            f"the run at {name} is no refiner: its network is told no image (velocity.beside=0); "
            "train one by a configuration such as cifar10-refiner"
        )
    of, theirs = (each.manifest.get("autoencoder", {}).get("fingerprint") for each in (run, other))
    if of != theirs:
        raise UserError(
            f"the refiner {name} was trained on what another autoencoder decodes than that of the "
            f"run at {run.folder}; train one with the same autoencoder.weights"
        )
    return Refiner(other, precision)
