"""Recipes of sampled images: what opens their sampling plan again, with their number and seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.config.sampling import GenerateConfig, SamplerConfig
from pipeline.errors import UserError
from pipeline.runs.run import open_run
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage.paths import absolute
from pipeline.storage.records import well_formed


def recipe_of(plan: SamplingPlan, n: int, seed: int) -> dict[str, Any]:
    """Return the recipe of n images of a plan, as JSON values; its paths are absolute."""
    settings = plan.settings
    guide, refiner = absolute_guide(settings.guide), absolute(settings.refiner)
    generate = dataclasses.replace(settings, guide=guide, refiner=refiner)
    used, available = len(plan.run.flow), len(plan.run.manifest.blocks)
    return {
        "n": n,
        "seed": seed,
        "blocks": used if used < available else None,
        "data_path": absolute(plan.run.config.data.path),
        "generate": dataclasses.asdict(generate),
        "sampler": {
            "method": [solver.method for solver in plan.solvers],
            "steps": [solver.steps for solver in plan.solvers],
        },
    }


def absolute_guide(guide: str | None) -> str | None:
    """Return the full path of a guide, which may be RUN@STEP."""
    folder, sign, step = (guide or "").rpartition("@")
    if sign and step.isdecimal() and not Path(str(guide)).exists():
        return f"{absolute(folder)}@{step}"
    return absolute(guide)


def open_recipe(run: Path, recipe: dict[str, Any], place: Path) -> tuple[SamplingPlan, int, int]:
    """Open the plan of a recipe; return it with the number and the seed of the images.

    Args:
        run: directory of the run.
        recipe: of :func:`recipe_of`.
        place: of the recipe, in messages.

    Raises:
        UserError: the recipe is of another form, or the run, its guide or its refiner is broken.
    """
    with well_formed(place):
        opened = open_run(run, recipe["blocks"], images=True)
        settings = GenerateConfig(**recipe["generate"])
        sampler = SamplerConfig(**recipe["sampler"])
        config = dataclasses.replace(
            opened.config,
            data=dataclasses.replace(opened.config.data, path=recipe["data_path"]),
            generate=settings,
            sampler=sampler,
        )
        try:
            plan = SamplingPlan.open(dataclasses.replace(opened, config=config), settings)
        except ValueError as error:
            raise UserError(f"{place} cannot be followed ({error}); sample again") from error
        return plan, int(recipe["n"]), int(recipe["seed"])
