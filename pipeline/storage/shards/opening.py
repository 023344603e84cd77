"""Opens stores after verification, which is remembered while their files do not change."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.errors import JkoflowError, UserError
from pipeline.integrity.digests import remember, remembered
from pipeline.storage import atomic, seal
from pipeline.storage.paths import data_root
from pipeline.storage.shards.manifest import MANIFEST, require_identity, require_manifest
from pipeline.storage.shards.reader import StoreReader

#: bytes from which the verification of a store is remembered; fewer are hashed in a moment
WORTH_REMEMBERING = 1 << 26


def open_store(folder: Path, what: str, identity: dict[str, Any] | None = None) -> StoreReader:
    """Open a complete store and verify the sha256 of every shard.

    The data root keeps size, times and inode of the verified shards of a large store. A shard that
    still has them is not hashed again, also by another process. `jkoflow verify` hashes all.

    `what` names the store in messages. An identity of None accepts any.

    Raises:
        UserError: the store is absent, incomplete, damaged, or of another format or identity.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{what} {folder} does not exist; make it first")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{what} {folder} is incomplete; run the command that makes it again"
        )
    seal.require(folder, what)
    manifest = atomic.read_json(folder / MANIFEST, f"manifest of {what}")
    mend = f"make it again by `jkoflow verify {folder} --repair`"
    rows = require_manifest(manifest, folder, what, mend)
    if identity is not None:
        require_identity(manifest, identity, folder, what)
    known = _recall(folder)
    for name, _, sha256 in rows:
        try:
            atomic.verify_file(folder / name, sha256)
        except UserError as error:  # a deleted shard alone would not be made again
            raise UserError(
                f"{name} of {what} {folder} is missing or damaged; make it again by `jkoflow "
                f"verify {folder} --repair`"
            ) from error
    states = {name: state for name, _, _ in rows if (state := remembered(folder / name))}
    if states != known and sum(int(state[0]) for state in states.values()) >= WORTH_REMEMBERING:
        with contextlib.suppress(JkoflowError):  # a data root that this process cannot write
            atomic.write_bytes(memory_file(folder), json.dumps(states).encode(), sealed=False)
    return StoreReader(folder, manifest)


def find_similar_stores(
    folder: Path, identity: dict[str, Any], varying: str, min_count: int = 1
) -> list[StoreReader]:
    """Return the whole stores in a folder whose identity differs in one key alone, longest first.

    Stores that are damaged or have fewer than `min_count` samples are left out.
    """
    stores = []
    for path in sorted(Path(folder).glob(f"*/{MANIFEST}")):
        with contextlib.suppress(UserError, OSError, TypeError, AttributeError):  # damaged
            manifest = atomic.read_json(path, "manifest")
            other = dict(manifest.get("identity"))
            if other.get(varying) == identity.get(varying) or manifest.get("count") < min_count:
                continue
            if {**other, varying: identity.get(varying)} == identity:
                stores.append(open_store(path.parent, "store"))
    return sorted(stores, key=len, reverse=True)


def memory_file(folder: Path) -> Path:
    """Return the file under the data root with the states of a store's verified shards."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return data_root() / "verified" / f"{name}.json"


def _recall(folder: Path) -> dict[str, list[int | str]]:
    """Take over the hashes of earlier processes; those of files that have changed do not count."""
    try:
        states: dict[str, list[int | str]] = json.loads(memory_file(folder).read_text())
        for name, state in states.items():
            remember(folder / name, state)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return states
