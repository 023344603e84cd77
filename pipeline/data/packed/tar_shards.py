"""Images of tar shards, as webdataset writes them."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from pipeline.data.image_folder import ENDINGS
from pipeline.data.packed.places import Place, class_name, relative_name, split_folder, split_of
from pipeline.errors import UserError
from pipeline.integrity.limits import require_size
from pipeline.integrity.reason import reason_of


def tar_places(system: Any, files: dict[str, dict[str, Any]]) -> Iterator[Place]:  # noqa: ANN401
    """Yield the images of tar shards; members of one key are one sample, with `.cls` its class.

    Raises:
        UserError: a file is not a complete tar file.
    """
    splits = {name: split_of(name) for name in files}
    named = any(splits.values())
    for name, info in files.items():
        file, split = str(info["name"]), splits[name] or ("train" if named else "")
        try:
            with system.open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
                for key, parts, offsets in _samples(archive, file):
                    ending = next((e for e in parts if e in ENDINGS), None)
                    if ending is None:
                        continue
                    label, content = _tar_label(parts), parts[ending]
                    folder = f"{label}/" if label is not None else ""
                    own = relative_name(f"{folder}{key}{ending}").as_posix()
                    sha256 = hashlib.sha256(content).hexdigest()
                    own = f"{split}/{own}" if split else own
                    # a class may be called train
                    part = split or ("" if folder else split_folder(own))
                    yield Place(own, file, offsets[ending], len(content), sha256, part)
                if info["size"] < archive.offset + tarfile.BLOCKSIZE:
                    raise EOFError("it ends without the block of zeros of a whole one")
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{file} is not a complete tar file ({reason_of(error)})") from error


def _samples(
    archive: tarfile.TarFile, file: str
) -> Iterator[tuple[str, dict[str, bytes], dict[str, int]]]:
    """Yield key, parts by ending and their offsets of every sample, whose parts are neighbours."""
    key, parts, offsets = "", dict[str, bytes](), dict[str, int]()
    for member in archive:
        if not member.isreg():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        own = f"{folder}/{stem}" if folder else stem
        if own != key and parts:
            yield key, parts, offsets
            parts, offsets = {}, {}
        require_size(member.size + sum(map(len, parts.values())), f"{member.name} of {file}")
        stream: IO[bytes] | None = archive.extractfile(member)
        key, ending = own, f".{ending.lower()}"
        parts[ending] = b"" if stream is None else stream.read()
        offsets[ending] = member.offset_data
    if parts:
        yield key, parts, offsets


def _tar_label(parts: dict[str, bytes]) -> str | None:
    """Return the class of a sample: its `.cls`, or the entry `label` of its `.json`."""
    if ".cls" in parts:
        text = parts[".cls"].decode(errors="replace").strip()
        return class_name(int(text) if re.fullmatch("-?[0-9]+", text) else text, None)
    try:
        content = json.loads(parts.get(".json", b"null"))
    except (ValueError, RecursionError):
        return None
    value = content.get("label") if isinstance(content, dict) else None
    return None if value is None else class_name(value, None)
