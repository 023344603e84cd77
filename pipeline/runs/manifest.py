"""flow.json: what a run consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.flow import FORMAT as FLOW_FORMAT
from pipeline.errors import UserError
from pipeline.runs.directory import read_config, resuming
from pipeline.runs.passes import Pass, Row
from pipeline.storage import atomic

FORMAT = 2


def read_manifest(folder: Path) -> dict[str, Any]:
    """flow.json of a run.

    Raises:
        UserError: absent, damaged or of another format.
    """
    path = Path(folder) / "flow.json"
    if not path.is_file():
        raise UserError(
            f"the run at {folder} has no finished block yet; finish it with "
            f"`{resuming(read_config(folder), folder)}`"
        )
    manifest: dict[str, Any] = atomic.read_json(path, "flow manifest")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}; train the run again")
    return manifest


def compose(about: dict[str, Any], shape: Sequence[int], passes: Sequence[Pass]) -> dict[str, Any]:
    """flow.json of some passes.

    Args:
        about: name, standardisation, autoencoder and data.
        shape: of one sample.
        passes: in order, at least one.
    """
    whole = [number for number, entry in enumerate(passes) if entry.complete]
    plain = [dataclasses.asdict(entry) for entry in passes]
    base = {"format": FORMAT, **about, "shape": list(shape), "passes": plain}
    return select(base, whole[-1] if whole else len(passes) - 1)


def select(manifest: dict[str, Any], number: int) -> dict[str, Any]:
    """The manifest with another of its passes at the top.

    Raises:
        UserError: there is no such pass.
    """
    passes = manifest["passes"]
    if not 0 <= number < len(passes):
        raise UserError(f"pass {number} does not exist; the run has {len(passes)}, from 0 on")
    rows = passes[number]["blocks"]
    specs = [row["spec"] for row in rows]
    flow = {"format": FLOW_FORMAT, "shape": manifest["shape"], "blocks": specs}
    top = {"pass": number, "complete": passes[number]["complete"], "flow": flow, "blocks": rows}
    return {**manifest, **top}


def passes_of(manifest: dict[str, Any]) -> list[Pass]:
    """The passes of a manifest."""
    return [Pass.from_dict(plain) for plain in manifest["passes"]]


def fingerprint_of(blocks: Sequence[Row], manifest: dict[str, Any]) -> str:
    """What generated images depend on besides the seed: blocks and autoencoder."""
    shas = [row["sha256"][:12] for row in blocks]
    return "-".join([*shas, manifest["autoencoder"]["fingerprint"][:12]])


def origins_of(manifest: dict[str, Any]) -> set[str]:
    """Fingerprints of what a run was exported from, the first of them trained; none for others."""
    exported = manifest.get("exported", {})
    return {*exported.get("before", []), *([exported["from"]] if exported else [])}
