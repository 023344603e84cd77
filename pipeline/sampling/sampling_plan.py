"""What samples of a run follow: its flow, the classes, and guide and refiner, if there are any.

Without a guide, guidance is that by the class (`pipeline.sampling.class_labels`). A guide is a
second run on the
same latents, smaller or trained for less long (`flows.autoguidance`); it guides runs without
classes
too.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flows.autoguidance import guided
from flows.flow import Flow
from flows.mixed_precision import in_half
from pipeline.config.schema import GenerateConfig
from pipeline.config.validate import PRECISIONS
from pipeline.errors import JkoflowError, UserError
from pipeline.runs.passes import step_of
from pipeline.runs.run import Run, open_run, require_latents
from pipeline.runs.snapshots import open_snapshot
from pipeline.sampling.class_labels import Choice, choice_of
from pipeline.sampling.refiner import Refiner, open_refiner


@dataclass(frozen=True)
class Way:
    """How samples of a run come about.

    Attributes:
        run: the run.
        choice: the classes; None for a run without.
        guide: the run that guides, with as many blocks in use; None if none does.
        weight: w of the guidance by `guide`.
        precision: of the networks, fp32 or bf16.
        refiner: of the decoded images; None for images as they are decoded.
    """

    run: Run
    choice: Choice | None
    guide: Run | None = None
    weight: float = 1.0
    precision: str = "fp32"
    refiner: Refiner | None = None

    @cached_property
    def flow(self) -> Flow:
        """The flow that is followed; shares its weights with those of the runs."""
        own = self._evaluated(self.run.flow)
        if self.guide is None or self.weight == 1:
            return own
        return guided(own, self._evaluated(self.guide.flow), self.weight)

    def _evaluated(self, flow: Flow) -> Flow:
        """A flow in the precision asked for."""
        return in_half(flow) if self.precision == "bf16" else flow

    @property
    def evaluations(self) -> int:
        """Evaluations of a network, the run's or the guide's, that one of the field takes."""
        if self.guide is not None:
            return 1 if self.weight == 1 else 2
        return 1 if self.choice is None else self.choice.evaluations

    def describe(self) -> dict[str, Any]:
        """What decides the samples besides blocks, solver and noise; JSON-ready."""
        told: dict[str, Any] = {} if self.choice is None else {"classes": self.choice.describe()}
        if self.precision != "fp32":
            told["precision"] = self.precision
        if self.guide is not None:
            told["guide"] = {"run": self.guide.fingerprint, "guidance": self.weight}
        if self.refiner is not None:
            told["refiner"] = self.refiner.describe()
        return told

    def about(self) -> dict[str, Any]:
        """What people are told of it beside a number; JSON-ready."""
        half: dict[str, Any] = {} if self.precision == "fp32" else {"sampled_in": self.precision}
        if self.refiner is not None:
            half["refiner"] = self.refiner.about()
        if self.guide is not None:
            who = {"name": self.guide.config.name, "run": self.guide.fingerprint}
            told: dict[str, Any] = {"guidance": self.weight, "guide": who, **half}
        elif self.choice is not None:
            told = {"guidance": self.choice.guidance, **half}
        else:
            return half
        classes = {} if self.choice is None else {"classes": list(self.choice.labels) or None}
        return told | classes


def way_of(run: Run, settings: GenerateConfig) -> Way:
    """What the samples of a run follow under some settings.

    Raises:
        UserError: classes or guidance that the run does not know, no weight for a guide, a guide
            or a refiner that does not fit, or a run that is a refiner itself.
    """
    require_latents(run)
    if settings.precision not in PRECISIONS:
        raise UserError(
            f"unknown generate.precision {settings.precision!r}; choose one of "
            f"{', '.join(PRECISIONS)}"
        )
    refiner = None
    if settings.refiner is not None:
        refiner = open_refiner(run, settings.refiner, settings.precision)
    if settings.guide is None:
        choice = choice_of(run, settings)
        return Way(run, choice, precision=settings.precision, refiner=refiner)
    if settings.guidance is None:
        raise UserError("a guide needs its weight; add --guidance 2, say")
    choice = choice_of(run, dataclasses.replace(settings, guidance=None))
    try:
        guide = _open(settings.guide)
    except JkoflowError as error:
        raise UserError(
            f"the guide of the run at {run.folder} cannot be used ({error}); give another "
            "--guide, or do without by --guide none"
        ) from error
    _fits(run, guide, settings.guide)
    guide = dataclasses.replace(guide, flow=guide.flow[: len(run.flow)])
    way = Way(run, choice, guide, settings.guidance, settings.precision, refiner)
    _ = way.flow  # refuses a weight out of range
    return way


def with_guidance(
    settings: GenerateConfig,
    guidance: float | None = None,
    guide: str | None = None,
    refiner: str | None = None,
) -> GenerateConfig:
    """The settings with what `--guidance`, `--guide` and `--refiner` say; None leaves all alone.

    Args:
        settings: of the run.
        guidance: w.
        guide: a run, which needs a weight of its own, or `none`, which takes the
            configuration's guide, and its weight, away.
        refiner: a run with `velocity.beside`, or `none`, which takes the configuration's away.
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


def _open(name: str) -> Run:
    """The run, or RUN@STEP, what it was after so many steps."""
    folder, sign, step = name.rpartition("@")
    if sign and step.isdecimal() and not Path(name).exists():
        return open_snapshot(Path(folder), int(step))
    return open_run(Path(name))


def _fits(run: Run, guide: Run, name: str) -> None:
    """Refuse a guide of other latents, of other steps, or that knows nothing without a class."""
    of, theirs = (each.manifest.get("autoencoder", {}).get("fingerprint") for each in (run, guide))
    if of != theirs or not run.standardisation.agrees(guide.standardisation):
        raise UserError(
            f"the guide {name} was trained on other latents than the run at {run.folder}; train "
            "one on the same data and autoencoder"
        )
    if not _same_steps(run, guide):
        raise UserError(
            f"the guide {name} must have the objective, the interpolant and the steps of the run "
            f"at {run.folder}; train it with the same sections train and schedule (jko: with "
            "schedule.h as the run's and schedule.tolerance=0) and a smaller velocity.width"
        )
    dropped = min(spec.velocity.class_dropout for spec in guide.flow.specs)
    if guide.flow.classes and not dropped:
        raise UserError(
            f"the guide {name} never went without its class in training (class_dropout 0, as all "
            "jko and all distilled runs), and a guide is asked for that; train it with "
            "velocity.classes=0, or under fm or lfm with velocity.class_dropout=0.1"
        )


def _same_steps(run: Run, guide: Run) -> bool:
    """Whether every block of a run, all or the first in use, has its like in the guide."""
    if run.config.train.interpolant != guide.config.train.interpolant:
        return False
    ours, theirs = (each.manifest["blocks"][: len(run.flow)] for each in (run, guide))
    return len(ours) == len(theirs) and all(
        a.get("objective", "jko") == b.get("objective", "jko")
        and math.isclose(step_of(a) or 0.0, step_of(b) or 0.0, rel_tol=1e-6)
        for a, b in zip(ours, theirs, strict=True)
    )
