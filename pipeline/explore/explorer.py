"""Computations of the explorer: samples between two seeds, and what a flow says of an image."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from autoencoders.base import Autoencoder
from flows.solving.estimators import make_divergence
from pipeline.data.image_folder import prepare
from pipeline.data.image_set import image_set_of
from pipeline.errors import UserError
from pipeline.evaluation.likelihood import EXACT_UP_TO, log_probs
from pipeline.integrity.pictures import open_picture
from pipeline.runs.run import Run, require_latents
from pipeline.runtime.console import no_progress
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import class_names_of
from pipeline.sampling.generate import images_from_latents
from pipeline.sampling.image_flow import ImageFlow
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.sampling.solvers import with_solver
from pipeline.storage import atomic

#: images of one grid
SHOWN = 16
#: random probes of a likelihood whose exact divergence takes too long
_PROBES = 4


@dataclass(frozen=True)
class Choice:
    """Settings of one grid.

    Attributes:
        label: class of all images; None chooses classes as often as in the training data.
        guidance: weight w; 1 follows the flow itself.
        seed: of the noise.
        other: second seed.
        mix: from the noise of the first seed, 0, to that of the second one, 1.
        steps: solver steps per block; None takes the run's solver.
        blocks: number of first blocks that are used; 0 uses all.
        passed: number of blocks that the noise has passed when it is shown; −1 is all.
    """

    label: int | None = None
    guidance: float = 1.0
    seed: int = 0
    other: int = 1
    mix: float = 0.0
    steps: int | None = None
    blocks: int = 0
    passed: int = -1


@dataclass(frozen=True)
class InvertedImage:
    """An image x, its latents z and its noise.

    Attributes:
        image: x as the autoencoder takes it, uint8 (C, H, W).
        reconstruction: the decoded z, uint8 (C, H, W).
        noise: the noise of z, with one tile per channel, uint8 (1, H_z, C_z·W_z).
        from_noise: the image of that noise, uint8 (C, H, W).
        text: the norm of the noise and the inversion error, in Markdown.
    """

    image: Tensor
    reconstruction: Tensor
    noise: Tensor
    from_noise: Tensor
    text: str


class Explorer:
    """Explorer of a run, on the CPU or a device; one computation runs at a time.

    Args:
        run: a finished run on images.
        device: of the networks.
        name: of the run on the command line; None is its directory.

    Raises:
        UserError: the run is a refiner.
    """

    def __init__(self, run: Run, device: torch.device, name: str | None = None) -> None:
        require_latents(run)
        self.run, self.device, self.name = run, device, name or str(run.folder)
        self._lock = threading.Lock()
        self._plan = lru_cache(maxsize=16)(self._open_plan)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty for a run without classes."""
        return class_names_of(self.run)

    @property
    def can_guide(self) -> bool:
        """Whether the run can follow a weight other than 1."""
        dropout = min(spec.velocity.class_dropout for spec in self.run.flow.specs)
        guide = self.run.config.generate.guide is not None
        return guide or bool(self.run.flow.classes and dropout)

    @property
    def steps(self) -> int | None:
        """Solver steps of the first block; None for an adaptive solver."""
        solver = self.run.config.sampler.of_block(0)
        return None if solver.adaptive else solver.steps

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder of the run, on the device."""
        model = self.run.autoencoder()
        model.to(self.device)  # type: ignore[attr-defined]
        return model

    def warm_up(self) -> None:
        """Load the networks by a first grid in the background, while the page is made."""

        def work() -> None:
            with contextlib.suppress(Exception):  # the page shows the sentence of an error
                given = self.run.config.generate.guidance
                self.sample(Choice(guidance=1.0 if given is None else given))

        threading.Thread(target=work, daemon=True).start()

    @torch.inference_mode()
    def sample(self, choice: Choice) -> Tensor:
        """Sample images, uint8 (n, C, H, W); at mix 0 they are those of `jkoflow generate`.

        The noise cos(πm/2) z + sin(πm/2) z' between two seeds is standard normal for every mix m.

        Raises:
            UserError: a value does not fit the run.
            SolveError: the solver fails.
        """
        with self._lock:
            plan = self._plan(choice.label, choice.guidance, choice.steps, choice.blocks)
            count, last = min(SHOWN, plan.settings.batch_size), len(plan.flow)
            rng = generator(choice.seed, "sample", 0)
            noise = torch.randn((count, *plan.flow.shape), generator=rng)
            if choice.mix > 0:
                second = generator(choice.other, "sample", 0)
                angle = min(choice.mix, 1.0) * math.pi / 2
                other = torch.randn(noise.shape, generator=second)
                noise = math.cos(angle) * noise + math.sin(angle) * other
            condition = plan.condition(0, count, choice.seed, "sample", 0)
            states = plan.flow.trajectory(
                noise.to(self.device), True, list(plan.solvers), condition
            )
            passed = last if choice.passed < 0 else min(choice.passed, last)
            state = next(islice(states, passed, None))
            refined = rng if passed == last else None
            return images_from_latents(plan, self.autoencoder, state, refined)

    def read(self, path: Path) -> Tensor:
        """Read an image file as the autoencoder takes it, uint8 (1, C, H, W).

        Raises:
            UserError: the file is no image.
        """
        channels, height, width = self.run.manifest.require_autoencoder().image_shape
        try:
            with open_picture(path) as opened:
                pixels = prepare(opened, max(height, width), "L" if channels == 1 else "RGB")
        except Exception as error:  # decoders raise many kinds of errors
            raise UserError(
                f"{Path(path).name} is no image that can be read; give a PNG, JPEG, WebP, GIF, "
                "BMP, PPM or TIFF file"
            ) from error
        return torch.from_numpy(pixels)[None]

    @torch.inference_mode()
    def invert(self, image: Tensor, label: int | None = None) -> InvertedImage:
        """Reconstruct an image uint8 (1, C, H, W), carry it to its noise, and return.

        Raises:
            UserError: the run needs the class of the image.
            SolveError: the solver fails.
        """
        with self._lock:
            flow = self._flow(1.0)
            labels = None if label is None else torch.tensor([label])
            inversion = flow.invert(flow.encode(image), labels)
            noise, shape = inversion.noise.cpu(), self.run.flow.shape
            tiles = noise[0].reshape(shape if len(shape) == 3 else (1, 1, -1))
            tiles = ((tiles.clamp(-3, 3) + 3) / 6 * 255).round().byte()
            return InvertedImage(
                image[0],
                flow.decode(inversion.latents)[0],
                torch.cat(list(tiles), 1)[None],
                flow.decode(inversion.returned)[0],
                f"* ‖noise‖ = {float(noise.norm()):.2f}; √D = "
                f"{math.sqrt(self.run.flow.dim):.2f} is expected\n"
                f"* inversion error {float(inversion.error):.1e} (MSE of the latents)\n",
            )

    def edit(
        self, image: Tensor, target: int, strength: float, label: int | None = None
    ) -> Tensor:
        """Turn an image uint8 (1, C, H, W) of a class, or any, into another class; same shape.

        Raises:
            UserError: the run has no classes, needs that of the image, or the strength is not in
                (0, 1].
            SolveError: the solver fails.
        """
        with self._lock:
            flow = self._flow(self.run.config.generate.guidance)
            source = None if label is None else torch.tensor([label])
            edited = flow.edit(flow.encode(image), torch.tensor([target]), strength, source)
            return flow.decode(edited, seed=0)

    def likelihood(self, image: Tensor, label: int | None = None) -> str:
        """Measure an image uint8 (1, C, H, W) as `jkoflow likelihood` does; returns Markdown.

        Raises:
            UserError: the run needs the class of the image.
            SolveError: the solver fails.
        """
        if label is None and self.run.flow.classes:
            return "* choose the class of the image to measure its likelihood\n"
        given = None if label is None else torch.tensor([label]).numpy()
        with self._lock:
            kind = "exact" if self.run.flow.dim <= EXACT_UP_TO else "hutchinson"
            divergence = make_divergence(kind, probes=_PROBES)
            images = image_set_of(image.numpy(), given, "image")
            (result,) = log_probs(self.run, images, 1, divergence, self.device, no_progress)
        value, error = float(result.value), result.standard_error
        spread = "" if error is None else f" ± {float(error):.1f}"
        return (
            f"* log p(z) = {value:.2f}{spread} nats, {value / result.dim:.4f} per dimension "
            f"(D = {result.dim})\n* {self._rank(value)}\n"
        )

    def _flow(self, guidance: float | None) -> ImageFlow:
        """Return the map between images and noise with the run's own solver."""
        plan = self._plan(None, 1.0 if guidance is None else guidance, None, 0)
        return ImageFlow(plan, self.autoencoder, self.device)

    def _open_plan(
        self, label: int | None, guidance: float, steps: int | None, blocks: int
    ) -> SamplingPlan:
        run = self.run
        if blocks:
            run = dataclasses.replace(run, flow=run.flow[:blocks])
        settings = dataclasses.replace(
            run.config.generate,
            labels=None if label is None else [label],
            guidance=guidance if self.can_guide else run.config.generate.guidance,
        )
        run = with_solver(run, None if steps is None or self.steps is None else str(steps))
        plan = SamplingPlan.open(run, settings)
        plan.flow.to(self.device)
        return plan

    def _rank(self, value: float) -> str:
        """Say where a log-likelihood stands among those of `jkoflow likelihood`."""
        path = self.run.folder / "likelihood.json"
        ranking = atomic.read_json(path, "measurement") if path.is_file() else {}
        if ranking.get("run") != self.run.fingerprint:
            return (
                "its place in the test split is unknown; `jkoflow likelihood --run "
                f"{self.name}` measures the split"
            )
        values = [row["log_prob"] for row in ranking["ranking"]]
        above = sum(other > value for other in values)
        return f"{above} of {len(values)} images of {ranking['data']} are more likely"
