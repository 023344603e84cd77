"""Class labels of generated samples, and of images whose likelihood is measured.

Generated samples have given classes in turn, or random ones as frequent as in the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flows.networks.condition import Condition
from pipeline.data.image_set import CLASS_NAMES
from pipeline.errors import UserError
from pipeline.runtime.rng import generator

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pipeline.config.sampling import GenerateConfig
    from pipeline.data.image_set import ImageSet
    from pipeline.runs.run import Run

#: most classes whose names an error lists
_NAMED = 20


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

        Randomly chosen classes derive from the parts of the seed, such as the number of a batch.
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
    guidance = settings.guidance if settings.guide is None and settings.guidance != 1 else None
    if not classes:
        for option, value in (("--class", labels), ("--guidance", guidance)):
            if value is not None:
                guide = " (or give a --guide)" if option == "--guidance" else ""
                raise UserError(
                    f"{option} needs a class-conditional run, but the run at {run.name} was "
                    f"trained without classes; leave it out, or train with velocity.classes{guide}"
                )
        return None
    if labels is not None and (not labels or not all(0 <= label < classes for label in labels)):
        raise UserError(
            f"--class must lie between 0 and {classes - 1} for the run at {run.name}, not "
            f"{', '.join(map(str, labels)) or 'empty'}"
        )
    dropout = min(spec.velocity.class_dropout for spec in run.flow.specs)
    if guidance is not None and not dropout:
        raise UserError(
            f"--guidance {guidance:g} needs a run that was trained with class dropout, but the "
            f"run at {run.name} was trained with class_dropout=0 (as all distilled runs); leave "
            "it out, or train with velocity.class_dropout=0.1"
        )
    return ClassLabels(tuple(labels or ()), run.manifest.class_counts())


def class_names_of(run: Run) -> list[str]:
    """Return the names of a run's classes: of its folders or its data set, or else 0, 1, …."""
    names = run.manifest.class_names or CLASS_NAMES.get(run.manifest.data.name, ())
    if len(names) == run.flow.classes:
        return list(names)
    return [str(number) for number in range(run.flow.classes)]


def parse_classes(run: Run, words: Sequence[str | int] | None) -> list[int] | None:
    """Convert the values of `--class`, which are names, numbers or `all`, to classes of a run.

    An integer is a number, also where a class has a number as its name.

    Raises:
        UserError: a value is none of these.
    """
    if not words:
        return None
    labels: list[int] = []
    names = class_names_of(run)
    for word in words:
        if isinstance(word, int):
            labels.append(word)
        elif word == "all":
            labels += range(max(run.flow.classes, 1))  # 0 is refused for a run without classes
        elif word in names:
            labels.append(names.index(word))
        elif word.isascii() and word.removeprefix("-").isdigit():
            labels.append(int(word))
        else:
            known = f" ({', '.join(names)})" if 0 < len(names) <= _NAMED else ""
            raise UserError(
                f"the class is {word!r}; expected the name or number of a class{known}, or all; "
                "choose one of them"
            )
    return labels


def condition_of(run: Run, images: ImageSet, indices: npt.NDArray[np.int64]) -> Condition | None:
    """Return the condition of images (n,) of a set; None for a run without classes.

    A folder numbers its own classes, so these are matched with the run's by name.

    Raises:
        UserError: an image has no label, or a label that the run does not have.
    """
    classes = run.flow.classes
    if not classes:
        return None
    labels = None if images.labels is None else torch.as_tensor(images.labels[indices]).long()
    if labels is not None and images.class_names is not None:
        labels = _numbers_of(run, images.class_names)[labels]
    if labels is None or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        given = "no labels"
        if labels is not None:
            given = f"labels {int(labels.min())} to {int(labels.max())}"
        raise UserError(
            f"the likelihood of a class-conditional run needs a class from 0 to {classes - 1} for "
            f"every image, but these have {given}; give their classes (classes= in Python), "
            "or evaluate with --set evaluate.nll=0"
        )
    return Condition(labels)


def null_condition(run: Run, n: int) -> Condition | None:
    """Return the condition of n samples without a class; None for a run without classes.

    Raises:
        UserError: the run was trained without class dropout, so that it has no null label.
    """
    classes = run.flow.classes
    if not classes:
        return None
    if not min(spec.velocity.class_dropout for spec in run.flow.specs):
        raise UserError(
            f"the run at {run.name} was trained with class_dropout=0; expected the class of "
            "every image; give it"
        )
    return Condition(torch.full((n,), classes))


def _numbers_of(run: Run, names: Sequence[str]) -> Tensor:
    """Return the numbers (n,) that a run gives to classes of these names."""
    known = class_names_of(run)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"the run at {run.name} has no class {unknown[0]!r}; name the subfolders as in its "
            f"training data: {', '.join(known[:10])}{', …' if len(known) > 10 else ''}"
        )
    return torch.tensor([known.index(name) for name in names])
