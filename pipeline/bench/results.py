"""Results of a benchmark: one row a training, and their table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from flows.baselines.residual import FixedPoint
from pipeline.bench.measure import Measured
from pipeline.bench.models import FIXED_POINTS, TITLES
from pipeline.bench.published import PUBLISHED, SOURCE

_COST = ("parameters", "training (s)", "batches", "s / batch")
_VECTORS = ("model", "NLL (nats)", "MMD²-m", "MMD²-1", *_COST)
_IMAGES = ("model", "NLL (nats / dim)", "FID", "KID", *_COST, "NFE")
_ERRORS = (
    "± is the standard deviation over seeds, and (±) the standard error over the samples of a "
    "single seed."
)
_SECONDS = (
    "Training seconds are those of the optimiser's steps (of the processors, on a CPU), and + "
    "those of the rest of the training: samples are pushed through finished blocks, and blocks "
    "are measured."
)
_EXPLAINED = {
    _VECTORS: "NLL is in nats per held-out sample, in the units of the data, by the exact "
    "log-determinant. MMD² is biased, with a Gaussian kernel of the median distance (m) or of "
    "width 1.",
    _IMAGES: "NLL is in nats per dimension of the standardised latents of held-out images. The "
    "log-determinant is exact; for an ODE in more than 128 dimensions 16 random probes estimate "
    "it. Classes are off, and no model has guidance or a refiner. NFE is the number of network "
    "evaluations of a sample.",
}


@dataclass(frozen=True)
class Point:
    """Metrics of a model in training.

    Attributes:
        seconds: of the optimiser so far.
        batches: so far.
        nll: of a part of the held-out samples.
        mmd_m: squared MMD at the median distance of a part of them; None without samples.
        fid: FID of a few samples; None for vectors.
    """

    seconds: float
    batches: int
    nll: float
    mmd_m: float | None
    fid: float | None = None


@dataclass(frozen=True)
class Row:
    """Result of one training.

    Attributes:
        data: the data set.
        model: a key of `pipeline.bench.models.TITLES`.
        seed: of data, weights, batches and samples.
        note: origin and split of the data.
        error: reason why the training failed; None if it did not.
        parameters: number of weights.
        width: hidden features of the networks.
        lr: peak learning rate; 0 after an error.
        seconds: of the optimiser.
        overhead: seconds of the rest of the training, such as pushing samples through blocks.
        batches: of all blocks together.
        measured: metrics of the finished model; None after an error.
        curve: metrics of the model in training.
    """

    data: str
    model: str
    seed: int
    note: str
    error: str | None = None
    parameters: int = 0
    width: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    overhead: float = 0.0
    batches: int = 0
    measured: Measured | None = None
    curve: tuple[Point, ...] = ()


def markdown(
    rows: Sequence[Row], settings: Iterable[str], published: bool = False, images: bool = False
) -> str:
    """Write the tables of all data sets, with the settings and what went wrong.

    Args:
        rows: of all trainings.
        settings: sentences on the benchmark.
        published: whether the published figures stand below ours.
        images: whether the data are images.
    """
    columns = _IMAGES if images else _VECTORS
    lines = ["# Benchmark", "", *settings, "", f"{_EXPLAINED[columns]} {_ERRORS} {_SECONDS}", ""]
    for data in dict.fromkeys(row.data for row in rows):
        group = [row for row in rows if row.data == data]
        lines += [f"## {data}", "", " ".join([f"{group[0].note}.", *_references(group)]), ""]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for model in dict.fromkeys(row.model for row in group):
            chosen = [row for row in group if row.model == model]
            lines.append(_line(TITLES[model], chosen, columns))
        if published:
            lines += [_published_line(*entry) for entry in PUBLISHED.get(data, ())]
        lines.append("")
        lines += _remarks(group)
    if published and any(row.data in PUBLISHED for row in rows):
        lines += [f"Published: {SOURCE}"]
    return "\n".join(lines).rstrip() + "\n"


def outcome(row: Row) -> str:
    """Return the result of one training in words."""
    name = f"{TITLES[row.model]} on {row.data}, seed {row.seed}"
    if row.measured is None:
        return f"{name} failed: {row.error}"
    images = row.measured.images
    text = f"NLL {row.measured.nll:.3f} nats" + (" per dimension" if images else "")
    if images is not None:
        text += f", FID(n={images.n}) {images.fid:.2f}"
    return f"{name}: {text}, {row.batches:,} batches in {row.seconds:.1f} seconds"


def table_csv(rows: Sequence[Row]) -> str:
    """Write one line for each training, with all of its values."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = (
        "nll", "nll_error", "probe_error", "mmd_m", "mmd_1", "failures", "inversion_error", "nfe",
        "n", "compare",
    )  # fmt: skip
    own = (
        "data", "model", "seed", "parameters", "lr", "seconds", "overhead", "batches", "error"
    )  # fmt: skip
    pictures = ("fid", "fid_error", "reference", "kid", "kid_error", "floor")
    writer.writerow([*own, "seconds_per_batch", *names, *pictures])
    for row in rows:
        metrics = [getattr(row.measured, name, None) for name in names]
        images = getattr(row.measured, "images", None)
        metrics += [getattr(images, name, None) for name in pictures]
        pace = row.seconds / row.batches if row.batches else None
        writer.writerow([*(getattr(row, name) for name in own), pace, *metrics])
    return file.getvalue()


def _references(rows: Sequence[Row]) -> list[str]:
    """Return what FID and KID of images are against; nothing for vectors."""
    for row in rows:
        if row.measured is not None and (images := row.measured.images) is not None:
            text = [f"FID(n={row.measured.compare:,}) against {images.reference}."]
            if images.floor is not None:
                text.append(
                    f"Reconstructions of as many images ({images.split}) have the FID "
                    f"{images.floor:.2f}, which a perfect flow would reach."
                )
            if images.kid_n is not None:
                text.append(f"KID against {images.kid_n:,} held-out images.")
            return text
    return []


def _line(title: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a model's line: means over the seeds that did not fail."""
    done = [(row, row.measured) for row in rows if row.measured is not None]
    if not done:
        return f"| {' | '.join([title, 'failed', *['–'] * (len(columns) - 2)])} |"
    likelihoods = [metrics.nll for _, metrics in done]
    error = done[0][1].nll_error if len(done) == 1 else None
    trained = [row for row, _ in done]
    seconds = f"{fmean(row.seconds for row in trained):.1f}"
    if any(row.overhead >= 0.05 for row in trained):
        seconds += f" + {fmean(row.overhead for row in trained):.1f}"
    metrics = [measured for _, measured in done]
    cells = [
        title,
        _spread(likelihoods, ".3f", error),
        *(_image_cells(metrics) if "FID" in columns else _vector_cells(metrics)),
        f"{trained[0].parameters:,}",
        seconds,
        f"{fmean(row.batches for row in trained):,.0f}",
        f"{fmean(row.seconds / row.batches for row in trained):.2e}",
    ]
    if "NFE" in columns:
        cells.append(f"{fmean(m.nfe for m in metrics):,.0f}")
    return f"| {' | '.join(cells)} |"


def _vector_cells(metrics: Sequence[Measured]) -> list[str]:
    return [
        _spread([m.mmd_m for m in metrics if m.mmd_m is not None], ".2e"),
        _spread([m.mmd_1 for m in metrics if m.mmd_1 is not None], ".2e"),
    ]


def _image_cells(metrics: Sequence[Measured]) -> list[str]:
    known = [m.images for m in metrics if m.images is not None]
    kids = [images for images in known if images.kid is not None]
    return [
        _spread([i.fid for i in known], ".2f", known[0].fid_error if known else None),
        _spread(
            [i.kid for i in kids if i.kid is not None], ".4f", kids[0].kid_error if kids else None
        ),
    ]


def _spread(values: Sequence[float], form: str, error: float | None = None) -> str:
    """Format the mean of values with their deviation, or with the error of a single one."""
    if not values:
        return "–"
    if len(values) > 1:
        return f"{fmean(values):{form}} ± {stdev(values):{form}}"
    alone = f" (± {error:{form}})" if error is not None and math.isfinite(error) else ""
    return f"{values[0]:{form}}{alone}"


def _published_line(model: str, nll: str) -> str:
    return f"| *{model}, published* | {nll} | | | | | | |"


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Return sentences on failed trainings, inverses and random probes."""
    lines = []
    for row in rows:
        name = f"{TITLES[row.model]}, seed {row.seed}"
        if row.error is not None:
            lines.append(f"* {name}: failed: {row.error}")
        elif row.measured is not None and row.measured.failures:
            share = row.measured.failures
            lines.append(
                f"* {name}: the inverse of {share:.2%} of {row.measured.compare:,} samples was "
                f"not found; {'FID and KID leave' if row.measured.images else 'MMD leaves'} "
                "them out."
            )
    for model in (name for name in FIXED_POINTS if any(row.model == name for row in rows)):
        known = [row.measured for row in rows if row.model == model and row.measured is not None]
        if known:
            errors = [e for measured in known if (e := measured.inversion_error) is not None]
            median = f"is {max(errors):.1e}" if len(errors) == len(known) else "is not finite"
            lines.append(
                f"* {TITLES[model]}: the inverse is a fixed point, found when its last iteration "
                f"changes no coordinate by more than {FixedPoint().tolerance:g}; the median of "
                f"‖z − T⁻¹(T(z))‖ {median}."
            )
    probes = [m.probe_error for row in rows if (m := row.measured) is not None and m.probe_error]
    if probes:
        lines.append(
            f"* The random probes have at most {max(probes):.1g} of the standard error of an NLL."
        )
    return [*lines, ""] if lines else []
