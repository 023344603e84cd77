"""Push: a run → a repository of the Hugging Face hub, with its card as README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.integrity import hub
from pipeline.publishing.export import export
from pipeline.runs.directory import read_manifest
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage import atomic
from pipeline.storage.records import well_formed

CARD = "CARD.md"
README = "README.md"


def push(plan: SamplingPlan, name: str, dtype: str = "float16", private: bool = False) -> str:
    """Export a run and upload the export to `owner/name`; return the address of the repository.

    Raises:
        UserError: the run cannot be exported.
        ValueError: the name is malformed, or the hub refuses it or cannot be reached.
    """
    repository, _ = hub.split(name if hub.is_hub(name) else f"hf://{name}")
    hub.library()
    with atomic.scratch_folder() as scratch:
        folder = export(plan, scratch / repository.split("/")[1], dtype).folder
        (folder / README).write_text(readme(folder))  # unsealed, since the hub edits it
        return hub.upload(folder, name, private)


def readme(folder: Path) -> str:
    """Return the card of an export with the metadata that the hub reads."""
    card = (folder / CARD).read_text()
    return f"---\n{yaml.safe_dump(_metadata(folder), sort_keys=False)}---\n\n{card}"


def _metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of the card: library, task, tags, data set and FID."""
    manifest = read_manifest(folder)
    data = manifest.data.name
    metadata: dict[str, Any] = {
        "library_name": "jkoflow",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["jkoflow", "normalizing-flow", "neural-ode", manifest.blocks[-1].objective],
        "datasets": [data],
    }
    if (folder / "metrics.json").is_file():
        with well_formed(folder / "metrics.json"):
            fid = atomic.read_json(folder / "metrics.json", "metrics")["fid"]
            metric = {"type": "fid", "value": fid["value"], "name": f"FID (n = {fid['n']})"}
        task = {"type": "unconditional-image-generation"}
        result = {"task": task, "dataset": {"type": data, "name": data}, "metrics": [metric]}
        metadata["model-index"] = [{"name": folder.name, "results": [result]}]
    return metadata
