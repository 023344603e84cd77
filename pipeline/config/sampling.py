"""Schema of the sampler of a flow, of sampling and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from flows.solving.solver import SolverConfig
from pipeline.config.keys import constant, setting
from pipeline.config.training import Precision
from pipeline.config.values import of_block


@dataclass(frozen=True)
class SamplerConfig:
    """Solver of finished blocks: training pushes data through them, sampling inverts them.

    Attributes:
        method: euler, midpoint, heun2, heun3 or rk4 on a fixed grid; dopri5, dopri8, bosh3,
            fehlberg2 or adaptive_heun with adaptive steps. A list has one value per block, data
            side first, and the last value holds for later blocks.
        steps: sub-intervals of a fixed grid, a multiple of velocity.nets; a list as for method.
    """

    method: str | list[str] = "rk4"
    steps: int | list[int] = setting(4, least=1)

    def of_block(self, index: int) -> SolverConfig:
        """Return the solver of a block.

        Raises:
            FlowError: unknown method, or too many steps.
        """
        return SolverConfig(of_block(self.method, index), of_block(self.steps, index))

    def of_blocks(self, count: int) -> list[SolverConfig]:
        """Return the solvers of the first blocks of a flow, data side first.

        Raises:
            FlowError: unknown method, or too many steps.
        """
        return [self.of_block(index) for index in range(count)]


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling; options of `generate` and `evaluate` choose seed and classes.

    Attributes:
        n: number of images.
        batch_size: images per call of the flow; it decides the noise of each image.
        columns: of the grid.
        seed: of the noise.
        labels: classes of the images of a class-conditional run, which repeat in this order; None
            samples classes as often as they occur in the training data.
        guidance: guidance weight w. A class-conditional run follows v(∅) + w (v(class) − v(∅)); a
            run with a guide, whose velocity is g, follows g + w (v − g). null takes 1, the plain
            field.
        guide: a weaker run on the same latents for autoguidance, or RUN@STEP for a snapshot.
        refiner: a run with velocity.image_channels on the same autoencoder, which samples the
            detail that the decoder leaves out.
        precision: fp32, or bf16 for autocast of the networks; solver and guidance stay in float32.
    """

    n: int = setting(64, least=1, most=10**9)
    batch_size: int = setting(250, least=1, most=2**24)
    columns: int = constant(8)
    seed: int = constant(0)
    labels: list[int] | None = constant(None)
    guidance: float | None = None
    guide: str | None = None
    refiner: str | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation.

    Attributes:
        n: generated images.
        reference: shipped statistics, such as mnist-train, or a .npz, .safetensors or folder.
        floor: measure the reconstruction floor (rFID), too.
        kid: real images for KID, precision and recall; 0 measures none of the three. The images
            are of the test split, or of the training split if that is too small.
        nll: images of the test split whose likelihood is measured; 0 measures none.
    """

    n: int = setting(50000, least=1, most=10**9)
    reference: str = "mnist-train"
    floor: bool = True
    kid: int = constant(0)
    nll: int = setting(256, least=0)
