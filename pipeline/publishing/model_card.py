"""Model cards: data, recipe, compute and metrics of an exported run, as far as files hold them."""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import Config
from pipeline.evaluation.tables import metric_rows
from pipeline.runs.manifest import AutoencoderRecord, HelperRecord, Manifest
from pipeline.runs.passes import BlockRow

_TO_WRITE = "(to be written)"


def model_card(
    name: str,
    config: Config,
    manifest: Manifest,
    sampling: dict[str, Any],
    metrics: dict[str, Any] | None,
    dtype: str,
    change: float,
) -> str:
    """Write the text of CARD.md, with marks where the author has to complete it.

    `sampling` is the identity of the run's sampling plan, `metrics` the content of metrics.json if
    it was evaluated. `change` is that of generated latents by the rounding to `dtype`.
    """
    rows, autoencoder = manifest.blocks, manifest.require_autoencoder()
    seconds = sum(row.seconds for row in rows)
    parameters = sum(row.parameters for row in rows)
    guides = [manifest.guide] if manifest.guide else []
    refiners = [manifest.refiner] if manifest.refiner else []
    facts = [
        ("data", f"{manifest.data.name} ({manifest.data.split})"),
        ("latents", f"{_autoencoder(autoencoder)}, shape {manifest.shape}"),
        ("objective", _objective(config, manifest)),
        ("blocks", f"{len(rows)}, {parameters:,} parameters in all"),
        ("training", f"{seconds:.0f} s of optimiser steps, on {_TO_WRITE}"),
        ("sampling", _solvers(sampling["solvers"])),
        *(("guide", f"{_helper(guide)}; guidance {sampling['guidance']:g}") for guide in guides),
        *(("refiner", _helper(refiner)) for refiner in refiners),
        ("weights", f"{dtype}; rounding moves generated latents by {change:.1e} (RMS, std 1)"),
        ("licence", f"of the weights: {_TO_WRITE}; of the data: {_TO_WRITE}"),
    ]
    lines = [f"# {name}", "", _TO_WRITE, "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in facts]
    lines += ["", "## Numbers", ""]
    if metrics is None:
        lines.append("Not measured; `jkoflow evaluate` before `jkoflow export` puts them here.")
    else:
        lines += ["| | |", "|---|---|"]
        lines += [f"| {key.strip()} | {value} |" for key, value in metric_rows(metrics)]
        lines += ["", "Measured on the weights before they were rounded."] * (dtype != "float32")
    lines += ["", "## Blocks", ""]
    lines += [
        "| block | step | movement | Ter | iterations | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(index, row) for index, row in enumerate(rows)]
    start = manifest.init_from
    recipe = "The whole recipe is config.yaml."
    if start is not None:
        recipe = f"The recipe is config.yaml, after that of {start.name}, whose blocks it took."
    lines += ["", recipe, ""]
    return "\n".join(lines)


def _autoencoder(record: AutoencoderRecord) -> str:
    weights = record.weights or record.name
    return f"autoencoder {weights} (fingerprint {record.fingerprint[:12]})"


def _objective(config: Config, manifest: Manifest) -> str:
    train = config.train
    text: str = train.objective
    if text != "jko":
        options = config.regression
        text += (
            f", {options.interpolant} interpolant, {options.coupling} coupling, "
            f"{options.times} times"
        )
    source = manifest.derived_from
    if source is not None:
        fingerprint = "-".join(sha256[:12] for sha256 in source.blocks)
        return (
            f"{source.how} from {source.name} ({source.objective}, {len(source.blocks)} blocks, "
            f"fingerprint {fingerprint})"
        )
    velocity = config.velocity
    if velocity.classes:
        text += f", {velocity.classes} classes"
        text += f" (left out with {velocity.class_dropout:g})"
    start = manifest.init_from
    if start is not None:
        text += f", started from the blocks of {start.name} ({start.objective})"
    return text


def _helper(record: HelperRecord) -> str:
    return f"{record.name}, {record.parameters:,} parameters, {record.seconds:.0f} s"


def _solvers(solvers: list[dict[str, Any]]) -> str:
    """Format the solvers of the blocks; one stands for all that are equal."""
    texts = [
        f"{each['method']}, {each['steps']} sub-intervals"
        if "steps" in each
        else each["method"]
        for each in solvers
    ]
    if len(set(texts)) == 1:
        return texts[0] + " a block" * ("steps" in solvers[0])
    return f"in the blocks: {'; '.join(texts)}"


def _row(index: int, row: BlockRow) -> str:
    step = row.step
    symbol = "h" if row.gamma is None else "γ"
    text = "free" if step is None else f"{symbol} = {step:.3g}"
    movement, ter = (
        "" if value is None else f"{value:{style}}"
        for value, style in ((row.movement, ".3f"), (row.ter, ".4f"))
    )
    cells = [str(index), text, movement, ter, str(row.iterations), f"{row.seconds:.0f}"]
    return f"| {' | '.join(cells)} |"
