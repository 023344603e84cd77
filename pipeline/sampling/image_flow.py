"""Images through a flow: inversion to noise, editing, interpolation and the path in between.

A flow is invertible up to the error of its solver, so an image x has a latent z_0 = E(x) and a
noise z_K = T(z_0), and T⁻¹(z_K) returns z_0 (`pipeline.sampling.inversion`).

Inversion follows the run's own field, without guidance: this is the map that training made.
Reference: Song et al., "Denoising diffusion implicit models" (2021), for interpolation and the
round trip; Meng et al., "SDEdit" (2022), for editing part of the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autoencoders.base import Autoencoder, to_float
from flows.networks.condition import Condition
from flows.partial import part_of
from flows.solving.solver import SolverConfig
from pipeline.errors import UserError
from pipeline.runs.run import Run
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import null_condition
from pipeline.sampling.generate import images_from_latents, images_from_noise, sample_batch
from pipeline.sampling.inversion import Inversion, round_trip
from pipeline.sampling.sampling_plan import SamplingPlan

#: images that are in memory together
_BATCH = 250
#: of an adaptive solver that inverts
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ImageFlow:
    """Flow between images and noise, as a plan samples it, with its autoencoder on a device.

    A run on a caller's own tensors has no autoencoder: its tensors (n, *shape) are its images.
    """

    plan: SamplingPlan
    autoencoder: Autoencoder | None
    device: torch.device

    @classmethod
    def open(cls, plan: SamplingPlan, device: torch.device | str = "cpu") -> ImageFlow:
        """Load the autoencoder of a plan's run, and move all networks to a device."""
        device = torch.device(device)
        autoencoder = plan.run.autoencoder() if plan.run.manifest.autoencoder else None
        if autoencoder is not None:
            autoencoder.to(device)  # type: ignore[attr-defined]
        plan.flow.to(device)
        return cls(plan, autoencoder, device)

    @property
    def run(self) -> Run:
        """The run."""
        return self.plan.run

    @cached_property
    def unguided(self) -> SamplingPlan:
        """The plan that follows the run's own field."""
        return dataclasses.replace(self.plan, guidance=1.0)

    # ---------------------------------------------------------------- images and latents

    def sample(self, n: int, seed: int) -> Tensor:
        """Sample n images uint8 (n, C, H, W): those that `jkoflow generate` writes.

        Raises:
            UserError: n is below 1.
        """
        if n < 1:
            raise UserError(f"n is {n}; expected at least 1")
        size = self.plan.settings.batch_size
        parts = [
            sample_batch(self.plan, self.autoencoder, start, min(size, n - start), seed)
            for start in range(0, n, size)
        ]
        return torch.cat(parts)

    def from_noise(self, noise: Tensor, labels: Tensor | None, seed: int) -> Tensor:
        """Carry noise (n, *shape) to images uint8 (n, C, H, W); labels are int64 (n,).

        The seed is that of the refiner's noise.
        """
        noise = self._real(noise, "noise")
        parts = []
        for start, part in _batches(noise):
            rng = generator(seed, "sample", "given", start)
            chosen = None if labels is None else labels[start : start + len(part)]
            condition = None if chosen is None else Condition(chosen, self.plan.class_guidance)
            parts.append(images_from_noise(self.plan, self.autoencoder, part, condition, rng))
        return torch.cat(parts)

    @torch.inference_mode()
    def encode(self, x: Tensor) -> Tensor:
        """Encode images (n, C, H, W) to standardised latents (n, *shape), posterior means.

        Images are uint8, or float in [-1, 1].

        Raises:
            UserError: another shape or type, or values that are not finite or out of range.
        """
        x, autoencoder = self.check_images(x), self.autoencoder
        if autoencoder is not None:
            parts = [autoencoder.encode(part.to(self.device)).mean for _, part in _batches(x)]
            x = torch.cat(parts)
        return self.run.standardisation.apply(x.to(self.device)).float().clone()

    def decode(self, z: Tensor, seed: int | None = None) -> Tensor:
        """Decode standardised latents (n, *shape) to images uint8 (n, C, H, W).

        With a seed the plan's refiner adds detail.
        """
        z = self._real(z, "latents")
        parts = []
        for start, part in _batches(z):
            rng = None if seed is None else generator(seed, "sample", "given", start)
            part = part.to(self.device)
            parts.append(images_from_latents(self.plan, self.autoencoder, part, rng))
        return torch.cat(parts)

    def check_images(self, x: Tensor) -> Tensor:
        """Return images (n, C, H, W) as float32 in [-1, 1].

        Raises:
            UserError: another shape or type, or values that are not finite or out of range.
        """
        if self.autoencoder is None:
            self._check(x, "samples", self.plan.flow.shape)
            return x.float()
        self._check(x, "images", self.autoencoder.image_shape)
        if x.dtype == torch.uint8:
            return to_float(x)
        if not x.is_floating_point():
            raise UserError(f"the images are {x.dtype}; expected uint8, or float in [-1, 1]")
        low, high = float(x.min()), float(x.max())
        if low < -1.001 or high > 1.001:
            raise UserError(
                f"the images lie between {low:g} and {high:g}; expected uint8, or float in "
                "[-1, 1]; convert them"
            )
        return x.float()

    def _real(self, x: Tensor, what: str) -> Tensor:
        """Return noise or latents (n, *shape) as float32; refuses what does not fit."""
        self._check(x, what, self.plan.flow.shape)
        if not x.is_floating_point():
            raise UserError(f"the dtype of the {what} is {x.dtype}; expected a float; convert it")
        return x.float()

    @staticmethod
    def _check(x: Tensor, what: str, shape: Sequence[int]) -> None:
        """Refuse tensors of another shape than (n, *shape), or with values that are not finite."""
        wanted = f"(n, {', '.join(map(str, shape))})"
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != tuple(shape) or not len(x):
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(
                f"the shape of the {what} is {given}; expected a tensor {wanted}; reshape it"
            )
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise UserError(f"some values of the {what} are not finite; remove NaN and inf")

    # ---------------------------------------------------------------- through the flow

    def invert(self, z_0: Tensor, labels: Tensor | None = None) -> Inversion:
        """Carry standardised latents (n, *shape) to noise and back; labels are int64 (n,).

        An adaptive solver has the tolerance 1e-6 here.
        """
        z_0, flow = z_0.to(self.device), self.unguided.flow
        parts = [
            round_trip(flow, self._solvers, part, self.condition(labels, start, len(part)))
            for start, part in _batches(z_0)
        ]
        noise, returned = (torch.cat(states) for states in zip(*parts, strict=True))
        return Inversion(z_0, noise, returned)

    def revert(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Carry noise (n, *shape) to latents (n, *shape) as `invert` returns; labels are (n,)."""
        parts = []
        for start, part in _batches(noise.to(self.device)):
            condition = self.condition(labels, start, len(part))
            parts.append(self.unguided.flow.decode(part, self._solvers, condition=condition))
        return torch.cat(parts)

    @property
    def _solvers(self) -> list[SolverConfig]:
        """Solvers of inversion."""
        return [
            dataclasses.replace(solver, rtol=_TOLERANCE, atol=_TOLERANCE)
            for solver in self.plan.solvers
        ]

    def edit(
        self, z_0: Tensor, target: Tensor, strength: float, source: Tensor | None = None
    ) -> Tensor:
        """Invert latents (n, *shape) part of the way, and sample from there with other classes.

        The part is `strength` of the flow's time. The way to the noise has the labels `source`,
        int64 (n,) or None for the null label; the way back has the labels `target` (n,) and the
        plan's guidance. The result has the shape of the latents.

        Raises:
            UserError: the run has no classes, or strength is not in (0, 1].
        """
        self.require_edit(strength)
        stop = strength * len(self.run.flow)
        there, solvers = part_of(self.unguided.flow, self.plan.solvers, 0.0, stop)
        back, back_solvers = part_of(self.plan.flow, self.plan.solvers, 0.0, stop)
        parts = []
        for start, part in _batches(z_0.to(self.device)):
            condition = self.condition(source, start, len(part))
            moved, _ = round_trip(there, solvers, part, condition)
            wanted = Condition(target[start : start + len(part)], self.plan.class_guidance)
            parts.append(back.decode(moved, back_solvers, condition=wanted))
        return torch.cat(parts)

    def require_edit(self, strength: float) -> None:
        """Raise UserError for a run without classes, or a strength that is not in (0, 1]."""
        if not self.run.flow.classes:
            raise UserError(
                f"the run at {self.run.name} was trained without classes; expected a "
                "class-conditional run, such as zoo:cifar10; edit with one of those"
            )
        if not 0 < strength <= 1:
            raise UserError(
                f"strength is {strength:g}; expected more than 0 and at most 1; choose 0.8 for "
                "most images"
            )

    def path(
        self, z: Tensor, times: Sequence[float], labels: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the samples (n, *shape) at rising or falling times, from z at the first time.

        The times lie in [0, K] for K blocks: 0 is the data, K the noise. A rising path follows the
        run's own field, and a falling one is that of sampling, with the plan's guidance; labels
        are (n,).
        """
        z = z.to(self.device)
        yield z
        for before, after in zip(times, times[1:], strict=False):
            if before != after:
                z = self._between(z, before, after, labels)
            yield z

    def _between(
        self, z: Tensor, before: float, after: float, labels: Tensor | None
    ) -> Tensor:
        reverse = after < before
        plan = self.plan if reverse else self.unguided
        flow, solvers = part_of(plan.flow, plan.solvers, min(before, after), max(before, after))
        condition = self.condition(labels, 0, len(z))
        if reverse and condition is not None:
            condition = dataclasses.replace(condition, guidance=plan.class_guidance)
        return flow.transport(z, reverse, solvers, condition=condition).z

    def condition(self, labels: Tensor | None, start: int, count: int) -> Condition | None:
        """Return the condition of samples start … start + count − 1, of labels int64 (n,) or None.

        Without labels, a class-conditional run gets the null label.

        Raises:
            UserError: the run was trained without class dropout, so that it has no null label.
        """
        if not self.run.flow.classes or labels is None:
            return null_condition(self.run, count)
        return Condition(labels[start : start + count])

    def states(self, n: int, seed: int, times: Sequence[float]) -> list[Tensor]:
        """Sample n images and decode their states at falling times, each uint8 (n, C, H, W).

        The noise is that of `sample`. Images are not refined.

        Raises:
            UserError: n is not between 1 and the plan's batch size.
        """
        size = self.plan.settings.batch_size
        if not 1 <= n <= size:
            raise UserError(f"n is {n}; expected 1 to {size} for the states of samples")
        stream = (seed, "sample", 0)
        noise = torch.randn((n, *self.plan.flow.shape), generator=generator(*stream))
        condition = self.plan.condition(0, n, *stream)
        labels = None if condition is None else condition.labels
        begin = float(len(self.run.flow))
        path = self.path(noise, [begin, *times], labels)
        next(path)
        return [self.decode(z) for z in path]


def interpolate(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Interpolate between two noises (*shape) on the sphere, n points from a to b, (n, *shape).

        sin((1 − s) θ) / sin θ · a + sin(s θ) / sin θ · b,   cos θ = ⟨a, b⟩ / (‖a‖ ‖b‖)

    Gaussian noise in D dimensions lies near the sphere of radius √D, which a straight line leaves.

    Raises:
        UserError: the shapes differ, values are not finite, or n is below 2.
    """
    if a.shape != b.shape or not a.numel():
        raise UserError(
            f"the noises have the shapes {tuple(a.shape)} and {tuple(b.shape)}; expected one "
            "shape; take both from runs on the same latents"
        )
    if n < 2:
        raise UserError(f"the number of points is {n}; expected at least 2")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UserError("the noises hold values that are not finite; remove NaN and inf")
    one, other = a.cpu().double().flatten(), b.cpu().double().flatten()
    cosine = torch.dot(one, other) / (one.norm() * other.norm()).clamp(min=1e-300)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    s = torch.linspace(0.0, 1.0, n, dtype=torch.float64)[:, None]
    if float(angle.sin()) < 1e-6:  # parallel: the sphere's arc is the straight line
        points = (1 - s) * one + s * other
    else:
        points = (((1 - s) * angle).sin() * one + (s * angle).sin() * other) / angle.sin()
    return points.to(a.dtype).to(a.device).unflatten(1, a.shape)


def _batches(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield batches of samples (n, …), each with the index of its first sample."""
    for start in range(0, len(x), _BATCH):
        yield start, x[start : start + _BATCH]
