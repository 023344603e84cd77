"""A trained model: images from noise, and noise, latents and likelihoods of images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoders.base import to_uint8
from flows.likelihood import log_prob
from flows.solving.divergence import Divergence
from flows.solving.estimators import make_divergence
from jkoflow.mistakes import user_errors
from pipeline.data.image_set import image_set_of
from pipeline.errors import UserError
from pipeline.evaluation.likelihood import CHUNK, SOLVER, joined, log_probs
from pipeline.runs.run import Run, open_run
from pipeline.runtime.console import no_progress
from pipeline.runtime.devices import require_device
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import class_names_of, parse_classes
from pipeline.sampling.image_flow import ImageFlow
from pipeline.sampling.inversion import Inversion
from pipeline.sampling.sampling_plan import SamplingPlan, with_guidance
from pipeline.sampling.solvers import with_solver

#: a class by its name or number, several of them, or "all"
Classes = str | int | Sequence[str | int] | Tensor


@dataclass(frozen=True)
class LogProb:
    """Log-likelihoods log p(z) of the latents of n images, and their errors.

    Attributes:
        value: in nats, float64 (n,).
        standard_error: over the probes of a random estimator, (n,); None if it is exact.
        inversion_error: ‖z_0 − T⁻¹(T(z_0))‖, (n,).
    """

    value: Tensor
    standard_error: Tensor | None
    inversion_error: Tensor


class Model:
    """Trained model with everything that decides its images: guide, refiner, guidance and solver.

    `jkoflow.load` makes one. Images are uint8 (n, C, H, W); functions that take images also accept
    floats in [-1, 1]. Latents are standardised, (n, *shape). A run on tensors takes and returns
    float tensors (n, *shape) in place of images.
    """

    def __init__(self, flow: ImageFlow) -> None:
        self._flow = flow

    def __repr__(self) -> str:
        run, plan = self.run, self._flow.plan
        parts = [f"{len(run.flow)} blocks", f"latents {self.latent_shape}"]
        parts += [f"{run.flow.classes} classes"] if run.flow.classes else []
        parts += [f"guidance {plan.guidance:g}"] if plan.guidance != 1 else []
        parts += ["refined"] if plan.refiner else []
        return f"<jkoflow.Model {run.folder.name}: {', '.join(parts)}>"

    @property
    def run(self) -> Run:
        """The run with its configuration and manifest."""
        return self._flow.run

    @property
    def plan(self) -> SamplingPlan:
        """Everything that decides the images, except the noise."""
        return self._flow.plan

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self._flow.device

    @property
    def classes(self) -> list[str]:
        """Names of the classes; an empty list for a model without classes."""
        return class_names_of(self.run)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one image."""
        return self.run.flow.shape

    @user_errors
    def to(self, device: torch.device | str) -> Model:
        """Return the model on a device, such as "cuda"; the networks are moved, not copied.

        Raises:
            UserError: there is no such device on this machine.
        """
        return Model(ImageFlow.open(self._flow.plan, require_device(str(device))))

    # ---------------------------------------------------------------- sampling

    @user_errors
    def sample(
        self,
        n: int | None = None,
        classes: Classes | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample images uint8 (n, C, H, W), byte for byte those of `jkoflow generate --npz`.

        Args:
            n: number of images; the default is that of the configuration, 64.
            classes: of the images, which repeat in this order; by default random classes, as
                frequent as in the training data.
            guidance: weight; the default is that of the run.
            seed: of the noise; the default is that of the configuration, 0.
            noise: (n, *shape) to start from, such as that of `invert`, in place of n. A
                class-conditional model without `classes` then uses the null label.

        Raises:
            UserError: an argument does not fit the run.
        """
        flow = self._vary(classes, guidance)
        seed = flow.plan.settings.seed if seed is None else seed
        if noise is None:
            return flow.sample(flow.plan.settings.n if n is None else n, seed)
        if n is not None:
            raise UserError("n and noise are both given; expected one; leave n out")
        labels = self._labels(classes, len(noise))
        if labels is None and self.run.flow.classes:
            condition = flow.condition(None, 0, len(noise))
            labels = condition.labels if condition is not None else None
        return flow.from_noise(noise, labels, seed)

    # ---------------------------------------------------------------- latents

    @user_errors
    def encode(self, x: Tensor) -> Tensor:
        """Encode images (n, C, H, W) to standardised latents (n, *shape)."""
        return self._flow.encode(x)

    @user_errors
    def decode(self, z: Tensor, seed: int | None = 0) -> Tensor:
        """Decode standardised latents (n, *shape) to images uint8 (n, C, H, W).

        A refiner adds detail from the noise of the seed; None leaves it out.
        """
        return self._flow.decode(z, seed)

    @user_errors
    def invert(self, x: Tensor, classes: Classes | None = None) -> Inversion:
        """Carry images (n, C, H, W) to their noise (n, *shape), and measure the inversion error.

        Without classes, a class-conditional model uses the null label.
        """
        z = self._flow.encode(x)
        return self._flow.invert(z, self._labels(classes, len(z)))

    @user_errors
    def edit(
        self,
        x: Tensor,
        to: Classes,
        strength: float = 0.8,
        classes: Classes | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Turn images (n, C, H, W) into another class; returns uint8 (n, C, H, W).

        Args:
            x: images.
            to: the class of the results.
            strength: how far towards the noise the images are inverted, in (0, 1]; a larger part
                changes more.
            classes: of the images; by default the null label stands for them.
            guidance: weight of the way back; the default is that of the run.
            seed: of the refiner's noise.

        Raises:
            UserError: the model has no classes, or an argument does not fit.
        """
        self._flow.require_edit(strength)
        z, flow = self._flow.encode(x), self._vary(None, guidance)
        target = self._labels(to, len(z))
        if target is None:
            raise UserError("the class `to` is None; expected the name or number of a class")
        z = flow.edit(z, target, strength, self._labels(classes, len(z)))
        return flow.decode(z, seed)

    # ---------------------------------------------------------------- likelihood

    @user_errors
    def log_prob(
        self,
        x: Tensor,
        classes: Classes | None = None,
        divergence: str = "exact",
        probes: int = 1,
    ) -> LogProb:
        """Compute log p(z) of the latents of images (n, C, H, W), as `jkoflow likelihood` does.

        Float images are rounded to uint8 first.

        Args:
            x: images.
            classes: of the images; a class-conditional model needs them.
            divergence: exact, hutchinson or finite-difference.
            probes: of a random estimator; 2 or more give a standard error.

        Raises:
            UserError: classes are missing, or an argument does not fit.
        """
        estimator = make_divergence(divergence, probes=probes)
        x = self._flow.check_images(x)
        labels = self._labels(classes, len(x))
        if self._flow.autoencoder is None:
            return self._log_prob_of_tensors(x, labels, estimator)
        given = None if labels is None else labels.numpy()
        images = image_set_of(to_uint8(x).cpu().numpy(), given, "images")
        parts = log_probs(self.run, images, len(x), estimator, self.device, no_progress)
        value, inversion, error = joined(parts)
        return LogProb(value, error, inversion)

    def _log_prob_of_tensors(
        self, x: Tensor, labels: Tensor | None, estimator: Divergence
    ) -> LogProb:
        z, flow = self._flow.encode(x), self._flow
        if labels is None and flow.unguided.flow.classes:
            raise UserError(
                f"the run at {self.run.name} has classes; expected that of every sample; give "
                "classes, such as [0] for all"
            )
        condition = flow.condition(labels, 0, len(z))
        rng = generator(0, "likelihood", "probes")
        result = log_prob(
            flow.unguided.flow, z, estimator, 1, SOLVER, rng, CHUNK, condition
        )
        value, inversion, error = joined([result])
        return LogProb(value, error, inversion)

    # ---------------------------------------------------------------- arguments

    def _vary(self, classes: Classes | None, guidance: float | None) -> ImageFlow:
        """Return the flow with other classes or another weight."""
        labels = parse_classes(self.run, _words(classes))
        if labels is None and guidance is None:
            return self._flow
        plan = self._flow.plan.vary(labels, guidance)
        plan.flow.to(self.device)
        return ImageFlow(plan, self._flow.autoencoder, self.device)

    def _labels(self, classes: Classes | None, n: int) -> Tensor | None:
        """Return one label for each of n images, int64 (n,); the classes repeat in their order."""
        labels = parse_classes(self.run, _words(classes))
        if labels is None:
            return None
        plan = self._flow.plan.vary(labels, None)
        assert plan.labels is not None
        return plan.labels.of_samples(0, n)


def _words(classes: Classes | None) -> list[str | int] | None:
    """Return classes as `parse_classes` takes them."""
    if classes is None:
        return None
    if isinstance(classes, (Tensor, np.ndarray, np.generic)):
        classes = classes.tolist()
    try:
        one = isinstance(classes, str) or not isinstance(classes, Iterable)
        given: Iterable[Any] = [classes] if one else classes  # type: ignore[assignment]
        words = [word if isinstance(word, str) else index(word) for word in given]
    except TypeError as error:
        raise UserError(
            f"classes is {classes}; expected names or whole numbers of classes, or all"
        ) from error
    if not words:
        raise UserError("classes is empty; expected the name or number of a class, or all")
    return words


@user_errors
def load(
    run: str | Path,
    *,
    guide: str | None = None,
    refiner: str | None = None,
    guidance: float | None = None,
    method: str | None = None,
    steps: int | str | None = None,
    blocks: int | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Load a trained model from a run directory, zoo:NAME or hf://owner/name.

    The other arguments are the options of `jkoflow generate`; the defaults are those of the run.

    Raises:
        UserError: no such run or device, or an option does not fit the run.
        JkoflowError: a file cannot be read or fetched.
    """
    place = require_device(str(device))
    opened = open_run(Path(run), blocks)
    if opened.config.points is not None:
        raise UserError(
            f"the run at {opened.name} is on points in the plane; expected a run on images or "
            "tensors; `jkoflow toy2d` samples and plots it"
        )
    opened = with_solver(opened, None if steps is None else str(steps), method)
    settings = with_guidance(opened.config.generate, guidance, guide, refiner)
    return Model(ImageFlow.open(SamplingPlan.open(opened, settings), place))
