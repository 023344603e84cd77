"""A finished run → a small folder that generates the same images: what is shipped of a run.

Kept are flow.json with the pass that is used, config.yaml, the blocks in a quantise type, an
autoencoder of one's own, metrics.json, the grid of images, guide and refiner, and a card. Stages,
checkpoints, logs and other samples stay behind. The folder is a run directory like any other.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoencoders.weights import locate, shipped
from flows.flow import Flow
from flows.networks.condition import Condition
from pipeline.config.load import resolved_yaml
from pipeline.config.schema import GenerateConfig
from pipeline.errors import UserError
from pipeline.publishing.model_card import card
from pipeline.publishing.provenance import metrics_of, named, shows
from pipeline.publishing.swap_decoder import with_decoder
from pipeline.runs.directory import block_file
from pipeline.runs.manifest import compose, origins_of, passes_of
from pipeline.runs.run import Run, is_refiner, load_blocks
from pipeline.runs.zoo import is_shipped
from pipeline.runtime.rng import generator
from pipeline.sampling.sampling_plan import way_of
from pipeline.sampling.solvers import solvers_of
from pipeline.storage import atomic
from pipeline.storage.compact_weights import DTYPES, quantise

AUTOENCODER = "autoencoder.safetensors"
GUIDE = "guide"
REFINER = "refiner"
HELPERS = (GUIDE, REFINER)
_GRID = "samples/grid.png"
_INSIDE = r"blocks/block-\d+\.safetensors|autoencoder\.safetensors|config\.yaml"
#: what an export writes before its flow.json
_WRITTEN = re.compile(
    rf"{_INSIDE}|metrics\.json|CARD\.md|samples/grid\.png"
    rf"|({GUIDE}|{REFINER})/({_INSIDE}|flow\.json)"
)
_COMPARED = 64


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Attributes:
        folder: where it lies.
        bytes: of all its files.
        change: root mean square of what the rounding changes in generated (standardised) latents.
    """

    folder: Path
    bytes: int
    change: float


def export(
    run: Run, out: Path, dtype: str = "float16", autoencoder: str | None = None
) -> Exported:
    """Write what is shipped of a run.

    Args:
        run: a finished run, all its blocks in use.
        out: an empty or absent folder.
        dtype: of the stored weights, one of `quantise.DTYPES`.
        autoencoder: weights of another one with the same encoder, which decodes from now on;
            numbers and pictures of the old one stay behind.

    Raises:
        UserError: unknown type, a folder with files, a metrics.json of other blocks, a guide, a
            refiner or an autoencoder that does not fit, or an autoencoder that is not at hand.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown --dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if out.is_dir():
        atomic.remove_temporaries_below(out)  # what a killed process left
    if out.exists() and not (out.is_dir() and _unfinished(out)):
        raise UserError(f"{out} is there and not empty; choose another place with --out")
    way = way_of(run, run.config.generate)
    guide = way.guide
    _usable(run, guide)
    if autoencoder is not None:
        if way.refiner is not None:
            raise UserError(
                f"the refiner of the run at {run.folder} is of what its own autoencoder decodes; "
                "leave --autoencoder out, or the refiner by --refiner none"
            )
        before, run = run, with_decoder(run, autoencoder)
        same = run.fingerprint == before.fingerprint  # by another name
        metrics = metrics_of(before) if same else None
        if guide is not None:  # inside, even if it is shipped: that one has the old decoder
            guide = with_decoder(guide, autoencoder)
            generate = dataclasses.replace(run.config.generate, guide=str(guide.folder))
            run = dataclasses.replace(
                run, config=dataclasses.replace(run.config, generate=generate)
            )
        return _write(run, out, dtype, metrics, guide, picture=same)
    refiner = None if way.refiner is None else way.refiner.run
    return _write(run, out, dtype, metrics_of(run), guide, refiner)


def _unfinished(out: Path) -> bool:
    """Whether a folder holds nothing, or no more than an export that was killed."""
    return all(_WRITTEN.fullmatch(name) for name in _files(out))


def _files(out: Path) -> list[str]:
    return [path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()]


def _clear(out: Path) -> None:
    """Remove what an export that was killed had written: another one may write less."""
    for name in _files(out) if out.is_dir() else ():
        (out / name).unlink()


def _usable(run: Run, guide: Run | None) -> None:
    """Refuse what no export could be used of, before anything is written."""
    run.autoencoder()
    if guide is None:
        return
    guide.autoencoder()
    if len(guide.manifest["blocks"]) != len(guide.flow):
        raise UserError(
            f"the guide at {guide.folder} has {len(guide.manifest['blocks'])} blocks and the run "
            f"{len(run.flow)}; an exported run needs a guide of as many as its own"
        )


def _write(
    run: Run,
    out: Path,
    dtype: str,
    metrics: dict[str, Any] | None = None,
    guide: Run | None = None,
    refiner: Run | None = None,
    shown: bool = True,
    picture: bool = True,
) -> Exported:
    rows = []
    _clear(out)
    for index, (row, block) in enumerate(zip(run.manifest["blocks"], run.flow, strict=True)):
        name = block_file(index)
        tensors = quantise(block.state_dict(), dtype)
        rows.append({**row, "file": name, "sha256": atomic.write_tensors(out / name, tensors)})
    manifest = _manifest(run, rows, dtype, out)
    generate = run.config.generate
    if guide is not None:
        name = _helper(guide, str(generate.guide), out / GUIDE, dtype)
        generate = dataclasses.replace(generate, guide=name)
        manifest["guide"] = _about_helper(guide)
    if refiner is not None:
        name = _helper(refiner, str(generate.refiner), out / REFINER, dtype)
        generate = dataclasses.replace(generate, refiner=name)
        manifest["refiner"] = _about_helper(refiner)
    change = _change(run.flow, load_blocks(out, manifest), run)
    config = dataclasses.replace(
        run.config,
        data=dataclasses.replace(run.config.data, path=None),  # where images lay on this machine
        train=dataclasses.replace(run.config.train, init_from=None),
        autoencoder=dataclasses.replace(
            run.config.autoencoder, weights=manifest["autoencoder"]["weights"]
        ),
        generate=generate,
        evaluate=dataclasses.replace(
            run.config.evaluate, reference=named(run.config.evaluate.reference)
        ),
    )
    atomic.write_bytes(out / "config.yaml", resolved_yaml(config).encode())
    if metrics is not None:
        atomic.write_json(out / "metrics.json", metrics)
    grid = run.folder / _GRID
    if shown and picture and shows(grid, run):
        atomic.write_bytes(out / _GRID, grid.read_bytes())
    if shown:
        text = card(out.name, config, manifest, metrics, dtype, change)
        atomic.write_bytes(out / "CARD.md", text.encode())
    atomic.write_json(out / "flow.json", manifest)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Exported(out, size, change)


def _helper(other: Run, name: str, out: Path, dtype: str) -> str:
    """Name of a guide or refiner in the exported configuration: a shipped one's, or its folder."""
    if is_shipped(name):
        return name
    # it has no guide of its own; its numbers and pictures (a snapshot's run has others) are not
    # what it is for, and the run's card has it
    config = dataclasses.replace(other.config, generate=GenerateConfig())
    _write(dataclasses.replace(other, config=config), out, dtype, shown=False)
    return out.name


def _about_helper(other: Run) -> dict[str, Any]:
    """What flow.json and the card say of a guide or a refiner."""
    rows = other.manifest["blocks"]
    sums = {key: sum(row[key] for row in rows) for key in ("parameters", "seconds")}
    return {"name": other.config.name, "run": other.fingerprint, **sums}


def _manifest(run: Run, rows: list[dict[str, Any]], dtype: str, out: Path) -> dict[str, Any]:
    """flow.json with one pass only, the one in use, and no paths of this machine."""
    made = ("format", "shape", "passes", "pass", "complete", "flow", "blocks", *HELPERS)
    about = {key: value for key, value in run.manifest.items() if key not in made}
    if "init_from" in about:
        about["init_from"] = {**about["init_from"], "run": about["init_from"]["name"]}
    if "teacher" in about:
        about["teacher"] = {**about["teacher"], "run": about["teacher"]["name"]}
    decoder = about["autoencoder"]["fingerprint"][:12]
    before = sorted(name for name in origins_of(run.manifest) if name.endswith(decoder))
    about["exported"] = {"from": run.fingerprint, "before": before, "dtype": dtype}
    used = passes_of(run.manifest)[run.manifest["pass"]]
    recipe = dict(used.recipe)
    if recipe.get("init_from") and not is_shipped(recipe["init_from"]):
        recipe["init_from"] = about.get("init_from", {}).get("name")
    alone = dataclasses.replace(used, base=None, kept=0, blocks=rows, recipe=recipe)
    wanted = about["autoencoder"]
    if wanted.get("name") == "pretrained" and wanted["weights"] not in shipped():
        about["autoencoder"] = {**wanted, "weights": AUTOENCODER}
        if is_refiner(run):  # which decodes nothing itself: it lies in the run that is refined
            return compose(about, run.manifest["shape"], [alone])
        data = locate(str(run.autoencoder_weights())).read_bytes()
        atomic.write_bytes(out / AUTOENCODER, data)
    return compose(about, run.manifest["shape"], [alone])


@torch.inference_mode()
def _change(before: Flow, after: Flow, run: Run) -> float:
    """Root mean square between what both flows make of the same noise."""
    noise = torch.randn((_COMPARED, *before.shape), generator=generator(0, "export"))
    labels = torch.arange(_COMPARED) % max(1, before.classes)
    of = Condition(labels) if before.classes else None
    if is_refiner(run):
        of = Condition(beside=noise.clamp(-1, 1))
    solvers = solvers_of(run, run.config.generate)
    made = [flow.cpu().decode(noise, solvers, condition=of) for flow in (before, after)]
    return float((made[0] - made[1]).square().mean().sqrt())
