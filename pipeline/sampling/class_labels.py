"""Classes: labels of the samples that a flow trains on, and of those that it generates.

Training takes the labels from the latent cache; they stay with their samples from stage to stage.
Generation takes the classes that it is told, in turn, or draws them as often as they stand in the
training data, whose counts are kept in flow.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flows.networks.condition import Condition
from pipeline.errors import UserError
from pipeline.runtime.rng import generator

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pipeline.config.schema import GenerateConfig
    from pipeline.data.image_set import ImageSet
    from pipeline.runs.run import Run


@dataclass(frozen=True)
class ClassLabels:
    """Classes of generated samples.

    Attributes:
        in_turn: sample i is of class in_turn[i mod len(in_turn)]; an empty tuple chooses classes
            at random, as often as in the training data.
        counts: the number of training samples of each class.
    """

    in_turn: tuple[int, ...]
    counts: tuple[int, ...]

    def of_samples(self, first: int, count: int, *seed: int | str) -> Tensor:
        """Return the classes of the samples first … first + count − 1, int64 (count,).

        Args:
            first: the number of the first sample.
            count: the number of samples.
            seed: parts from which randomly chosen classes derive, such as the number of a batch.
        """
        if self.in_turn:
            numbers = torch.arange(first, first + count) % len(self.in_turn)
            return torch.tensor(self.in_turn)[numbers]
        weights = torch.tensor(self.counts, dtype=torch.float64)
        rng = generator(*seed, "classes")
        return torch.multinomial(weights, count, replacement=True, generator=rng)


def class_labels_of(run: Run, settings: GenerateConfig) -> ClassLabels | None:
    """Return the classes that some settings ask for; None for a run without classes.

    Raises:
        UserError: the run has no classes but settings ask for a class or for guidance, a class is
            out of range, or guidance without a guide is asked of a run that was trained without
            class dropout.
    """
    classes, labels = run.flow.classes, settings.labels
    guidance = settings.guidance if settings.guide is None else None
    if not classes:
        for option, value in (("--class", labels), ("--guidance", guidance)):
            if value is not None:
                guide = " (or give a --guide)" if option == "--guidance" else ""
                raise UserError(
                    f"{option} needs a class-conditional run, but the run at {run.folder} was "
                    f"trained without classes; leave it out, or train with velocity.classes{guide}"
                )
        return None
    if labels is not None and (not labels or not all(0 <= label < classes for label in labels)):
        raise UserError(
            f"--class must lie between 0 and {classes - 1} for the run at {run.folder}, not "
            f"{', '.join(map(str, labels)) or 'empty'}"
        )
    dropout = min(spec.velocity.class_dropout for spec in run.flow.specs)
    if guidance not in (None, 1) and not dropout:
        raise UserError(
            f"--guidance {guidance:g} needs a run that was trained with class dropout, but the "
            f"run at {run.folder} was trained with class_dropout=0 (as all jko and all distilled "
            "runs); leave it out, or train under fm or lfm with velocity.class_dropout=0.1"
        )
    return ClassLabels(tuple(labels or ()), tuple(run.manifest["classes"]["counts"]))


def names_of(run: Run) -> list[str]:
    """The names of a run's classes: of the folders that it was trained on, else 0, 1, …."""
    return run.manifest.get("class_names") or [str(number) for number in range(run.flow.classes)]


def parse_classes(run: Run, words: Sequence[str] | None) -> list[int] | None:
    """The values of `--class`, names, numbers or `all`, as classes of a run.

    Raises:
        UserError: anything else.
    """
    if not words:
        return None
    labels: list[int] = []
    names = names_of(run)
    for word in words:
        if word == "all":
            labels += range(max(run.flow.classes, 1))  # a run without classes is refused later
        elif word in names:
            labels.append(names.index(word))
        elif word.isascii() and word.removeprefix("-").isdigit():
            labels.append(int(word))
        else:
            raise UserError(f"--class takes the name or number of a class, or all, not {word!r}")
    return labels


def condition_of(run: Run, images: ImageSet, numbers: npt.NDArray[np.int64]) -> Condition | None:
    """The condition of some images of a set whose likelihood is measured.

    A folder numbers the classes that it has, so those are matched by name.

    Args:
        run: for one without classes there is no condition.
        images: the set.
        numbers: of the images, (n,).

    Raises:
        UserError: an image has no label, or one that the run does not know.
    """
    classes = run.flow.classes
    if not classes:
        return None
    labels = images.labels
    some = None if labels is None else torch.as_tensor(labels[numbers]).long()
    if some is not None and images.class_names is not None:
        some = _by_name(run, images.class_names)[some]
    if some is None or not 0 <= int(some.min()) <= int(some.max()) < classes:
        what = "no labels" if some is None else f"labels {int(some.min())} to {int(some.max())}"
        raise UserError(
            f"the likelihood of a class-conditional run needs a class from 0 to {classes - 1} for "
            f"every image, but these have {what}; take images with classes (or evaluate with "
            "--set evaluate.nll=0)"
        )
    return Condition(some)


def _by_name(run: Run, names: Sequence[str]) -> Tensor:
    """The numbers (n,) under which a run knows classes; its own are 0, 1, … if it has no names."""
    known = names_of(run)
    strange = [name for name in names if name not in known]
    if strange:
        raise UserError(
            f"the run at {run.folder} knows no class {strange[0]!r}; name the subfolders as those "
            f"that it was trained on: {', '.join(known[:10])}{', …' if len(known) > 10 else ''}"
        )
    return torch.tensor([known.index(name) for name in names])
