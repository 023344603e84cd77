"""The card of a shipped run: data, recipe, compute and numbers, as far as files know them."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.config.schema import Config
from pipeline.evaluation.tables import numbers
from pipeline.runs.passes import step_of

_TO_WRITE = "(to be written)"


def card(
    name: str,
    config: Config,
    manifest: dict[str, Any],
    metrics: dict[str, Any] | None,
    dtype: str,
    change: float,
) -> str:
    """The skeleton of CARD.md; what only people know is marked as to be written.

    Args:
        name: of the shipped run.
        config: its configuration.
        manifest: its flow.json.
        metrics: its metrics.json; None if it was not evaluated.
        dtype: that its weights are stored in.
        change: what the rounding changes in generated latents, root mean square.
    """
    rows, autoencoder = manifest["blocks"], manifest["autoencoder"]
    seconds = sum(row["seconds"] for row in rows)
    parameters = sum(row["parameters"] for row in rows)
    facts = [
        ("data", _data(manifest)),
        ("latents", f"{_autoencoder(autoencoder)}, shape {tuple(manifest['shape'])}"),
        ("objective", _objective(config, manifest)),
        ("blocks", f"{len(rows)}, {parameters:,} parameters in all"),
        ("training", f"{seconds:.0f} s of optimiser steps, on {_TO_WRITE}"),
        ("sampling", _sampling(config)),
        *_guide(manifest, config),
        *_refiner(manifest),
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
        lines += [f"| {key.strip()} | {value} |" for key, value in numbers(metrics)]
        lines += ["", "Measured on the weights before they were rounded."] * (dtype != "float32")
    lines += ["", "## Blocks", ""]
    lines += [
        "| block | step | movement | Ter | iterations | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(index, row) for index, row in enumerate(rows)]
    start = manifest.get("init_from")
    recipe = "The whole recipe is config.yaml."
    if start is not None:
        recipe = f"The recipe is config.yaml, after that of {start['name']}, whose blocks it took."
    lines += ["", recipe, ""]
    return "\n".join(lines)


def _data(manifest: dict[str, Any]) -> str:
    data = manifest.get("data", {})
    return f"{data.get('name', 'unknown')} ({data.get('split', 'unknown')})"


def _autoencoder(about: dict[str, Any]) -> str:
    what = about.get("weights") or about.get("name", "unknown")
    return f"autoencoder {what} (fingerprint {about['fingerprint'][:12]})"


def _objective(config: Config, manifest: dict[str, Any]) -> str:
    train, text = config.train, config.train.objective
    if text != "jko":
        text += (
            f", {train.interpolant} interpolant, {train.coupling} coupling, {train.times} times"
        )
    if "teacher" in manifest:
        taught = manifest["teacher"]
        return (
            f"distilled from {taught['name']} ({taught['objective']}, {len(taught['blocks'])} "
            f"blocks, fingerprint {taught['fingerprint']})"
        )
    velocity = config.velocity
    if velocity.classes:
        text += f", {velocity.classes} classes"
        text += f" (left out with {velocity.class_dropout:g})" * (train.objective != "jko")
    if "init_from" in manifest:
        start = manifest["init_from"]
        text += f", started from the blocks of {start['name']} ({start['objective']})"
    return text


def _guide(manifest: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    if "guide" not in manifest:
        return []
    guide, w = manifest["guide"], config.generate.guidance
    told = f"{guide['name']}, {guide['parameters']:,} parameters, {guide['seconds']:.0f} s"
    return [("guide", f"{told}; guidance {w:g}")]


def _refiner(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    if "refiner" not in manifest:
        return []
    told = manifest["refiner"]
    return [
        ("refiner", f"{told['name']}, {told['parameters']:,} parameters, {told['seconds']:.0f} s")
    ]


def _sampling(config: Config) -> str:
    push, generate = config.push, config.generate
    if generate.block_methods is not None:
        names = generate.block_methods
        steps = generate.block_steps or [generate.steps or push.steps] * len(names)
        each = [
            dataclasses.replace(push, method=name, steps=count)
            for name, count in zip(names, steps, strict=True)
        ]
        told = [f"{one.method} at {one.rtol:g}" if one.adaptive else
                f"{one.method}, {one.steps} sub-intervals" for one in each]  # fmt: skip
        return f"in the blocks: {'; '.join(told)}"
    solver = dataclasses.replace(push, method=generate.method or push.method)
    if solver.adaptive:
        return f"{solver.method} at {solver.rtol:g}"
    if generate.block_steps is not None:
        counts = ", ".join(map(str, generate.block_steps))
        return f"{solver.method}, {counts} sub-intervals in the blocks"
    return f"{solver.method}, {generate.steps or push.steps} sub-intervals a block"


def _row(index: int, row: dict[str, Any]) -> str:
    step = step_of(row)
    symbol = "h" if row.get("gamma") is None else "γ"
    text = "free" if step is None else f"{symbol} = {step:.3g}"
    movement, ter = (
        "" if row.get(key) is None else f"{row[key]:{style}}"
        for key, style in (("movement", ".3f"), ("ter", ".4f"))
    )
    told = f"| {index} | {text} | {movement} | {ter} | {row['iterations']} |"
    return f"{told} {row['seconds']:.0f} |"
