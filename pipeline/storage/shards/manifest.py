"""Manifests of stores: names of the files, content keys, and checks of what is read.

The manifest is written last and makes a store complete.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
#: recipes of a store of images, and of a latent cache, for which it is a configuration
RECIPE, CACHE_RECIPE = "recipe.json", "recipe.yaml"
Shard = dict[str, Tensor]


def content_key(identity: dict[str, Any]) -> str:
    """Return the key of a store: 16 hex digits of the sha256 of its JSON-ready identity."""
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:05d}.safetensors"


def require_manifest(
    manifest: Any,  # noqa: ANN401 - JSON
    place: Path | str,
    what: str,
    mend: str,
) -> list[tuple[str, int, str]]:
    """Return name, number of samples and sha256 of every shard of a store, by its manifest.

    Args:
        manifest: of the store.
        place: of the store, in messages.
        what: name of the store in messages.
        mend: what to do about a damaged manifest.

    Raises:
        UserError: the manifest is damaged or has another format.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{what} {place} has another format; expected {FORMAT}; delete it and make it again"
        )
    try:
        rows = [(row["file"], row["count"], str(row["sha256"])) for row in manifest["shards"]]
        described = isinstance(manifest["key"], str) and isinstance(manifest["identity"], dict)
        total = sum(count for _, count, _ in rows)
        complete = described and bool(rows) and manifest["count"] == total
        complete = complete and all(type(count) is int and count > 0 for _, count, _ in rows)
        names = [shard_name(index) for index in range(len(rows))]
        complete = complete and [name for name, _, _ in rows] == names
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"manifest of {what} {place} is damaged; {mend}")
    return rows


def require_identity(
    manifest: dict[str, Any], identity: dict[str, Any], folder: Path | str, what: str
) -> None:
    """Raise UserError unless the manifest of a store, which `what` names, has an identity."""
    if not isinstance(manifest, dict) or manifest.get("key") != content_key(identity):
        raise UserError(
            f"{what} {folder} was made from {_differences(manifest, identity)}; delete it or "
            "choose another folder"
        )


def _differences(manifest: dict[str, Any], identity: dict[str, Any]) -> str:
    """Name the keys in which the identity of a manifest differs."""
    stored = manifest.get("identity", {})
    names = [k for k in sorted({*stored, *identity}) if stored.get(k) != identity.get(k)]
    return "other " + ", ".join(names) if names else "other contents"
