"""Export: a finished run → a small folder that generates the same images, ready to be shipped.

An export is a run directory itself. It holds the pass in use, the configuration, the blocks in a
compact dtype, and the autoencoder unless it ships with the package. It also holds metrics.json,
the grid of images, guide and refiner, and a model card.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoencoders.weights import locate_weights, shipped_weights
from flows.flow import Flow
from flows.networks.condition import Condition
from flows.solving.solver import SolverConfig
from pipeline.config.plain import resolved_yaml
from pipeline.config.sampling import GenerateConfig
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.publishing.model_card import model_card
from pipeline.publishing.provenance import metrics_of, reference_name, shows_samples_of
from pipeline.publishing.swap_decoder import with_decoder
from pipeline.runs.directory import block_file, mean_file, write_manifest
from pipeline.runs.manifest import ExportRecord, HelperRecord, Manifest
from pipeline.runs.passes import BlockRow, SharedFile, splits
from pipeline.runs.run import Run, is_refiner, load_blocks
from pipeline.runs.zoo import is_shipped
from pipeline.runtime.rng import generator
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.sampling.solvers import solvers_of
from pipeline.storage import atomic, seal
from pipeline.storage.lock import locked
from pipeline.storage.shared_weights import DTYPES, quantise_blocks

AUTOENCODER = "autoencoder.safetensors"
GUIDE = "guide"
REFINER = "refiner"
_GRID = "samples/grid.png"
_INSIDE = r"blocks/(block|mean)-\d+\.safetensors|autoencoder\.safetensors|config\.yaml"
#: the files that an export writes before its flow.json
_WRITTEN = re.compile(
    rf"{_INSIDE}|{seal.NAME}|metrics\.json|CARD\.md|samples/grid\.png"
    rf"|({GUIDE}|{REFINER})/({_INSIDE}|flow\.json)"
)
_COMPARED = 64


@dataclass(frozen=True)
class Exported:
    """Folder of an export, and the size of all its files.

    `change` is the root mean square change of generated (standardised) latents by the rounding.
    """

    folder: Path
    bytes: int
    change: float


def export(
    plan: SamplingPlan, out: Path, dtype: str = "float16", autoencoder: str | None = None
) -> Exported:
    """Write the files of a finished run that are shipped into an empty or absent folder.

    The weights are stored in a dtype of `shared_weights.DTYPES`. `autoencoder` names weights with
    the same encoder, whose decoder replaces the run's. Metrics and pictures of the run's own
    decoder are then left out.

    Raises:
        UserError: the dtype is unknown, the folder has files, metrics.json is of other blocks or
            of another plan, or the guide or an autoencoder cannot be exported.
        JkoflowError: another process writes the folder.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    with locked(out, "the export at"):
        return _export(plan, out, dtype, autoencoder)


def _export(plan: SamplingPlan, out: Path, dtype: str, autoencoder: str | None) -> Exported:
    """Write the files of `export` while no other process does."""
    if out.is_dir():
        atomic.remove_temporaries_below(out)  # temporary files of a killed process
    killed = out.is_dir() and all(_WRITTEN.fullmatch(name) for name in _files(out))
    if out.exists() and not killed:
        raise UserError(f"{out} exists and is not empty; choose another place with --out")
    _require_exportable(plan)
    if autoencoder is None:
        return _write_export(plan, out, dtype, metrics_of(plan), picture=True)
    if plan.refiner is not None:
        raise UserError(
            f"the refiner of the run at {plan.run.name} refines images of the run's own "
            "autoencoder; leave --autoencoder out, or the refiner by --refiner none"
        )
    swapped = _with_decoder(plan, autoencoder)
    same = swapped.run.fingerprint == plan.run.fingerprint  # the same weights by another name
    return _write_export(swapped, out, dtype, metrics_of(plan) if same else None, picture=same)


def _with_decoder(plan: SamplingPlan, autoencoder: str) -> SamplingPlan:
    """Swap the decoder of a plan's run and of its guide."""
    run, guide, settings = with_decoder(plan.run, autoencoder), plan.guide, plan.settings
    if guide is not None:  # a shipped guide names the old decoder, so the export holds a copy
        guide = with_decoder(guide, autoencoder)
        settings = dataclasses.replace(settings, guide=str(guide.folder))
    return dataclasses.replace(plan, run=run, guide=guide, settings=settings)


def _files(out: Path) -> list[str]:
    return [path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()]


def _require_exportable(plan: SamplingPlan) -> None:
    """Refuse a plan whose export could not be used, before anything is written."""
    guide = plan.guide
    plan.run.autoencoder()
    if guide is None:
        return
    guide.autoencoder()
    if len(guide.manifest.blocks) != len(guide.flow):
        raise UserError(
            f"the guide at {guide.name} has {len(guide.manifest.blocks)} blocks and the run "
            f"{len(plan.run.flow)}; an exported run needs a guide of as many blocks as its own"
        )


def _write_export(
    plan: SamplingPlan, out: Path, dtype: str, metrics: dict[str, Any] | None, picture: bool
) -> Exported:
    """Write an export; flow.json comes last and so marks a complete one."""
    run, settings = plan.run, plan.settings
    for left in _files(out):  # by a killed export, which may have written more
        (out / left).unlink()
    seal.start(out)
    manifest, change = _write_weights(run, list(plan.solvers), out, dtype)
    if plan.guide is not None:
        name = _write_helper(plan.guide, str(settings.guide), out / GUIDE, dtype)
        settings = dataclasses.replace(settings, guide=name)
        manifest = dataclasses.replace(manifest, guide=_helper_record(plan.guide))
    if plan.refiner is not None:
        name = _write_helper(plan.refiner.run, str(settings.refiner), out / REFINER, dtype)
        settings = dataclasses.replace(settings, refiner=name)
        record = _helper_record(plan.refiner.run)
        manifest = dataclasses.replace(manifest, refiner=record)
    config = _portable_config(run, manifest, settings)
    atomic.write_bytes(out / "config.yaml", resolved_yaml(config).encode())
    if metrics is not None:
        atomic.write_json(out / "metrics.json", metrics)
    grid = run.folder / _GRID
    if picture and shows_samples_of(grid, plan):
        atomic.write_bytes(out / _GRID, grid.read_bytes())
    text = model_card(out.name, config, manifest, plan.identity(), metrics, dtype, change)
    atomic.write_bytes(out / "CARD.md", text.encode())
    write_manifest(out, manifest)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Exported(out, size, change)


def _write_helper(run: Run, name: str, out: Path, dtype: str) -> str:
    """Write a guide or a refiner without figures and card; return its name in the configuration.

    A shipped run keeps its name, and nothing is written.
    """
    if is_shipped(name):
        return name
    manifest, _ = _write_weights(run, solvers_of(run), out, dtype)
    config = _portable_config(run, manifest, GenerateConfig())
    atomic.write_bytes(out / "config.yaml", resolved_yaml(config).encode())
    write_manifest(out, manifest)
    return out.name


def _write_weights(
    run: Run, solvers: list[SolverConfig], out: Path, dtype: str
) -> tuple[Manifest, float]:
    """Write rounded blocks, and the autoencoder if it does not ship with the package.

    The manifest, which is not written yet, and the change by the rounding are returned.
    """
    groups = quantise_blocks([block.state_dict() for block in run.flow], dtype)
    known = iter(run.manifest.blocks)
    rows: list[BlockRow] = []
    for number, group in enumerate(groups):
        mean = None
        if group.mean:
            name = mean_file(number)
            mean = SharedFile(name, atomic.write_tensors(out / name, group.mean))
        for tensors in group.blocks:
            name = block_file(len(rows))
            sha256 = atomic.write_tensors(out / name, tensors)
            row = dataclasses.replace(next(known), file=name, sha256=sha256, mean=mean)
            rows.append(row)
    manifest = _manifest(run, rows, dtype, out)
    return manifest, _change(run, load_blocks(out, manifest), solvers)


def _portable_config(run: Run, manifest: Manifest, settings: GenerateConfig) -> Config:
    """Remove paths of this machine from a run's configuration."""
    config = run.config
    weights = manifest.require_autoencoder().weights
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=None),
        train=dataclasses.replace(config.train, init_from=None),
        autoencoder=dataclasses.replace(config.autoencoder, weights=weights),
        generate=settings,
        evaluate=dataclasses.replace(
            config.evaluate, reference=reference_name(config.evaluate.reference)
        ),
    )


def _helper_record(run: Run) -> HelperRecord:
    """Return the entry of flow.json that describes a guide or a refiner."""
    rows = run.manifest.blocks
    parameters, seconds = sum(row.parameters for row in rows), sum(row.seconds for row in rows)
    return HelperRecord(run.config.name, run.fingerprint, parameters, seconds)


def _manifest(run: Run, rows: list[BlockRow], dtype: str, out: Path) -> Manifest:
    """Compose the manifest of the pass in use alone, without paths of this machine."""
    known, autoencoder = run.manifest, run.manifest.require_autoencoder()
    start, source = known.init_from, known.derived_from
    recipe = dict(known.current.recipe)
    if recipe.get("init_from") and not is_shipped(recipe["init_from"]):
        recipe["init_from"] = None if start is None else start.name
    if start is not None:
        start = dataclasses.replace(start, run=start.name)
    if source is not None:
        source = dataclasses.replace(source, run=source.name)
    decoder = autoencoder.fingerprint[:12]
    before = sorted(name for name in known.origins if name.endswith(decoder))
    if autoencoder.name == "pretrained" and autoencoder.weights not in shipped_weights():
        autoencoder = dataclasses.replace(autoencoder, weights=AUTOENCODER)
        if not is_refiner(run):  # the autoencoder of a refiner lies in the run that it refines
            data = locate_weights(str(run.autoencoder_weights())).read_bytes()
            atomic.write_bytes(out / AUTOENCODER, data)
    alone = dataclasses.replace(
        known.current, base=None, parts=splits(known.passes, known.number), kept=0,
        blocks=tuple(rows), recipe=recipe,
    )  # fmt: skip
    return dataclasses.replace(
        known,
        autoencoder=autoencoder,
        init_from=start,
        derived_from=source,
        exported=ExportRecord(run.fingerprint, dtype, before),
        guide=None,
        refiner=None,
        passes=(alone,),
        number=0,
    )


@torch.inference_mode()
def _change(run: Run, rounded: Flow, solvers: list[SolverConfig]) -> float:
    """Measure the root mean square change of latents that both flows make of the same noise."""
    flow = run.flow
    noise = torch.randn((_COMPARED, *flow.shape), generator=generator(0, "export"))
    labels = torch.arange(_COMPARED) % max(1, flow.classes)
    condition = Condition(labels) if flow.classes else None
    if is_refiner(run):
        condition = Condition(image=noise.clamp(-1, 1))
    before, after = (
        each.cpu().decode(noise, solvers, condition=condition) for each in (flow, rounded)
    )
    return float((before - after).square().mean().sqrt())
