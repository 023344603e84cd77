"""Writes pipeline/integrity/SHA256SUMS, the list of the shipped files: python -m tests.shipped"""

from __future__ import annotations

import hashlib

from pipeline.integrity.digests import HOME, LIST

FOLDERS = ("autoencoders/pretrained", "eval/references", "pipeline/zoo")


def lines() -> str:
    """Return the lines of the list, as `sha256sum` writes them."""
    files = sorted(
        path
        for folder in FOLDERS
        for path in (HOME / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    )
    digests = ((hashlib.sha256(path.read_bytes()).hexdigest(), path) for path in files)
    return "".join(f"{digest}  {path.relative_to(HOME).as_posix()}\n" for digest, path in digests)


if __name__ == "__main__":
    LIST.write_text(lines())
