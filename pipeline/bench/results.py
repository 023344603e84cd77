"""Results of a benchmark: one row a training, and their table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pipeline.bench.measure import Measured
from pipeline.bench.models import TITLES
from pipeline.bench.published import PUBLISHED, SOURCE

_HEADER = (
    "| model | NLL (nats) | MMD²-m | MMD²-1 | parameters | training (s) | batches | s / batch |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Point:
    """Metrics of a model in training.

    Attributes:
        seconds: of the optimiser so far.
        batches: so far.
        nll: of a part of the held-out samples.
        mmd_m: squared MMD at the median distance of a part of them; None without samples.
    """

    seconds: float
    batches: int
    nll: float
    mmd_m: float | None


@dataclass(frozen=True)
class Row:
    """Result of one training.

    Attributes:
        data: the data set.
        model: a key of `pipeline.bench.models.TITLES`.
        seed: of data, weights, batches and samples.
        note: origin and split of the data.
        error: reason why the training failed; None if it did not.
        parameters: trainable numbers.
        width: hidden features of the networks.
        lr: peak learning rate; 0 after an error.
        seconds: of the optimiser.
        overhead: seconds in which samples were pushed through blocks.
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


def markdown(rows: Sequence[Row], settings: Iterable[str], published: bool = False) -> str:
    """Write the tables of all data sets, with the settings and what went wrong.

    Args:
        rows: of all trainings.
        settings: sentences on the benchmark.
        published: whether the published figures stand below ours.
    """
    lines = ["# Benchmark", "", *settings, ""]
    lines += [
        "NLL is in nats per held-out sample, in the units of the data, by the exact "
        "log-determinant; ± is the standard deviation over seeds, and (±) the standard error over "
        "the samples of a single seed. MMD² is biased, with a Gaussian kernel of the median "
        "distance (m) or of width 1. Training seconds are those of the optimiser's steps (of "
        "the processors, on a CPU), and + those in which samples are pushed through finished "
        "blocks.",
        "",
    ]
    for data in dict.fromkeys(row.data for row in rows):
        group = [row for row in rows if row.data == data]
        lines += [f"## {data}", "", f"{group[0].note}.", "", *_HEADER]
        for model in dict.fromkeys(row.model for row in group):
            lines.append(_line(TITLES[model], [row for row in group if row.model == model]))
        if published:
            lines += [_published_line(*entry) for entry in PUBLISHED.get(data, ())]
        lines.append("")
        lines += _remarks(group)
    if published:
        lines += [f"Published: {SOURCE}"]
    return "\n".join(lines).rstrip() + "\n"


def outcome(row: Row) -> str:
    """Return the result of one training in words."""
    name = f"{TITLES[row.model]} on {row.data}, seed {row.seed}"
    if row.measured is None:
        return f"{name} failed: {row.error}"
    return (
        f"{name}: NLL {row.measured.nll:.3f} nats, {row.batches:,} batches in {row.seconds:.1f} "
        "seconds"
    )


def table_csv(rows: Sequence[Row]) -> str:
    """Write one line for each training, with all of its numbers."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = (
        "nll", "nll_error", "mmd_m", "mmd_1", "failures", "inversion_error", "nfe", "n", "compare"
    )  # fmt: skip
    own = (
        "data", "model", "seed", "parameters", "lr", "seconds", "overhead", "batches", "error"
    )  # fmt: skip
    writer.writerow([*own, "seconds_per_batch", *names])
    for row in rows:
        metrics = [getattr(row.measured, name, None) for name in names]
        pace = row.seconds / row.batches if row.batches else None
        writer.writerow([*(getattr(row, name) for name in own), pace, *metrics])
    return file.getvalue()


def _line(title: str, rows: Sequence[Row]) -> str:
    """Return a model's line: means over the seeds that did not fail."""
    done = [(row, row.measured) for row in rows if row.measured is not None]
    if not done:
        return f"| {title} | failed | – | – | – | – | – | – |"
    likelihoods = [metrics.nll for _, metrics in done]
    error = done[0][1].nll_error if len(done) == 1 else None
    trained = [row for row, _ in done]
    seconds = f"{fmean(row.seconds for row in trained):.1f}"
    if any(row.overhead >= 0.05 for row in trained):
        seconds += f" + {fmean(row.overhead for row in trained):.1f}"
    cells = [
        title,
        _spread(likelihoods, ".3f", error),
        _spread([m.mmd_m for _, m in done if m.mmd_m is not None], ".2e"),
        _spread([m.mmd_1 for _, m in done if m.mmd_1 is not None], ".2e"),
        f"{trained[0].parameters:,}",
        seconds,
        f"{fmean(row.batches for row in trained):,.0f}",
        f"{fmean(row.seconds / row.batches for row in trained):.2e}",
    ]
    return f"| {' | '.join(cells)} |"


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
    """Return sentences on failed trainings and on inverses that were not found."""
    lines = []
    for row in rows:
        name = f"{TITLES[row.model]}, seed {row.seed}"
        if row.error is not None:
            lines.append(f"* {name}: failed: {row.error}")
        elif row.measured is not None and row.measured.failures:
            share = row.measured.failures
            lines.append(
                f"* {name}: the inverse of {share:.2%} of {row.measured.compare:,} samples was "
                "not found; MMD leaves them out."
            )
    return [*lines, ""] if lines else []
