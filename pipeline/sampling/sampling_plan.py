"""How images of a run are sampled: flow, solvers, classes, guidance, refiner and precision.

A command opens one :class:`SamplingPlan` and passes it to everything that samples. The plan's
`identity` is written next to what was sampled or measured, and :func:`differences` compares it.

Guidance is classifier-free (`flows.networks.condition`) unless there is a guide: a second run on
the same latents, smaller or trained for a shorter time (`flows.autoguidance`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from flows.autoguidance import autoguide
from flows.flow import Flow
from flows.mixed_precision import in_mixed_precision
from flows.networks.condition import Condition
from flows.solving.solver import SolverConfig
from pipeline.config.sampling import GenerateConfig
from pipeline.runs.run import Run, require_latents
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import ClassLabels, class_labels_of
from pipeline.sampling.guide import guiding_flow, open_guide
from pipeline.sampling.refiner import Refiner, open_refiner
from pipeline.sampling.solvers import budget_steps, solver_identity, solvers_of

#: the entry `classes` of an identity whose classes are as frequent as in the training data
IN_DATA = "as in the data"
_NFE_SAMPLES = 16


@dataclass(frozen=True)
class SamplingPlan:
    """Everything that decides the images of a run, except the noise.

    Attributes:
        run: the run.
        settings: the section `generate` that the plan was opened with.
        solvers: the solver of each block, data side first.
        labels: the classes of the samples; None for a run without classes.
        guidance: the weight w; 1 follows the run's own field.
        guide: the weaker run of autoguidance, with the blocks that the run uses; or None.
        refiner: refines decoded images; or None.
    """

    run: Run
    settings: GenerateConfig
    solvers: tuple[SolverConfig, ...]
    labels: ClassLabels | None = None
    guidance: float = 1.0
    guide: Run | None = None
    refiner: Refiner | None = None

    @classmethod
    def open(cls, run: Run, settings: GenerateConfig) -> SamplingPlan:
        """Open the guide and the refiner that some settings name, and check all settings.

        Raises:
            UserError: the run is a refiner, or classes, guidance, a guide, a refiner, a precision
                or solvers do not fit the run.
            FlowError: an unknown solver, or a number of steps or a weight out of range.
        """
        require_latents(run)
        refiner = None
        if settings.refiner is not None:
            refiner = open_refiner(run, settings.refiner, settings.precision)
        plan = cls(
            run,
            settings,
            tuple(solvers_of(run)),
            class_labels_of(run, settings),
            1.0 if settings.guidance is None else settings.guidance,
            None if settings.guide is None else open_guide(run, settings),
            refiner,
        )
        _ = plan.flow, plan.condition(0, 1, 0)  # both refuse a weight that is out of range
        return plan

    @property
    def precision(self) -> str:
        """The precision of the networks, fp32 or bf16."""
        return self.settings.precision

    @cached_property
    def flow(self) -> Flow:
        """The flow that samples follow; it shares its weights with the runs."""
        flow = self._in_precision(self.run.flow)
        if self.guide is None or self.guidance == 1:
            return flow
        guide = guiding_flow(self.run, self.guide)
        return autoguide(flow, self._in_precision(guide), self.guidance)

    def _in_precision(self, flow: Flow) -> Flow:
        return in_mixed_precision(flow) if self.precision == "bf16" else flow

    @property
    def class_guidance(self) -> float:
        """The weight of classifier-free guidance, which is 1 under a guide."""
        return self.guidance if self.guide is None else 1.0

    @property
    def networks_per_evaluation(self) -> int:
        """Network evaluations that one evaluation of the velocity field takes: 1 or 2."""
        return 1 if self.guidance == 1 else 2

    @cached_property
    def nfe(self) -> int:
        """Network evaluations per sample, all blocks and the refiner (measured on 16 samples)."""
        noise = torch.randn((_NFE_SAMPLES, *self.flow.shape), generator=generator(0, "nfe"))
        device = next(self.flow.parameters()).device
        condition = self.condition(0, _NFE_SAMPLES, "nfe")
        with torch.inference_mode():
            result = self.flow.transport(
                noise.to(device), reverse=True, solver=list(self.solvers), condition=condition
            )
        refiner_nfe = 0 if self.refiner is None else self.refiner.nfe
        return int(result.nfe) * self.networks_per_evaluation + refiner_nfe

    def condition(self, first: int, count: int, *seed: int | str) -> Condition | None:
        """Return the condition of the samples first … first + count − 1 (see `ClassLabels`)."""
        if self.labels is None:
            return None
        return Condition(self.labels.of_samples(first, count, *seed), self.class_guidance)

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the images except the noise, as JSON values."""
        used, available = len(self.run.flow), len(self.run.manifest.blocks)
        guide = self.guide
        return {
            "run": self.run.fingerprint,
            "first_blocks": used if used < available else None,
            "solvers": [solver_identity(solver) for solver in self.solvers],
            "classes": None if self.labels is None else list(self.labels.in_turn) or IN_DATA,
            "guidance": self.guidance,
            "guide": guide and {"name": guide.config.name, "run": guide.fingerprint},
            "refiner": self.refiner and self.refiner.identity(),
            "precision": self.precision,
        }

    def differences(self, identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Compare an identity that was written earlier with this plan's, see `differences`.

        An export changes the fingerprint of a run. So the fingerprints that this plan's runs had
        before their export count as their present ones.
        """
        runs = [self.run, self.guide, self.refiner and self.refiner.run]
        renamed = {old: run.fingerprint for run in runs if run for old in run.origins}

        def current(entry: Any) -> Any:  # noqa: ANN401 - a JSON value
            if isinstance(entry, dict):
                return {key: current(value) for key, value in entry.items()}
            return renamed.get(entry, entry) if isinstance(entry, str) else entry

        return differences(current(dict(identity)), self.identity())

    def vary(
        self, labels: list[int] | None = None, guidance: float | None = None
    ) -> SamplingPlan:
        """Return the plan with other classes or another weight; None leaves either unchanged.

        Raises:
            UserError: they do not fit the run.
            FlowError: the weight is out of range.
        """
        settings, weight = self.settings, self.guidance
        if labels is not None:
            settings = dataclasses.replace(settings, labels=labels)
        if guidance is not None:
            settings, weight = dataclasses.replace(settings, guidance=guidance), guidance
        chosen = class_labels_of(self.run, settings)
        plan = dataclasses.replace(self, settings=settings, labels=chosen, guidance=weight)
        _ = plan.flow, plan.condition(0, 1, 0)  # both refuse a weight that is out of range
        return plan

    def within(self, nfe: int) -> SamplingPlan:
        """Return the plan with as many solver steps a block as `nfe` evaluations per sample allow.

        Raises:
            UserError: the budget is too small for one step, or a solver is adaptive.
        """
        steps = budget_steps(
            nfe,
            self.solvers,
            [block.velocity.smooth_pieces() for block in self.flow],
            self.networks_per_evaluation,
            0 if self.refiner is None else self.refiner.nfe,
        )
        solvers = tuple(dataclasses.replace(solver, steps=steps) for solver in self.solvers)
        return dataclasses.replace(self, solvers=solvers)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, each with both values; an absent key counts as None."""
    keys = dict.fromkeys([*before, *after])
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def with_guidance(
    settings: GenerateConfig,
    guidance: float | None = None,
    guide: str | None = None,
    refiner: str | None = None,
) -> GenerateConfig:
    """Apply `--guidance`, `--guide` and `--refiner` to settings; None leaves a setting unchanged.

    Guide and refiner are runs, or `none`, which removes them. A guide needs a weight of its own.
    """
    if refiner is not None:
        settings = dataclasses.replace(settings, refiner=None if refiner == "none" else refiner)
    if guide == "none" and settings.guide is not None:
        settings = dataclasses.replace(settings, guide=None, guidance=None)
    elif guide not in (None, "none"):
        settings = dataclasses.replace(settings, guide=guide, guidance=None)
    if guidance is not None:
        settings = dataclasses.replace(settings, guidance=guidance)
    return settings
