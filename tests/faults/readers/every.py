"""All readers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.faults.readers.archives import archive_readers
from tests.faults.readers.documents import document_readers
from tests.faults.readers.pickles import pickle_readers
from tests.faults.readers.pictures import picture_readers
from tests.faults.readers.reader import Reader
from tests.faults.readers.runs import run_readers
from tests.faults.readers.tables import table_readers
from tests.faults.readers.tensors import tensor_readers
from tests.pipeline.tiny import World


def readers(root: Path, world: World, run: Path) -> Iterator[Reader]:
    """All readers; their files lie below a new folder.

    Args:
        root: the folder.
        world: its caches and its autoencoder are read.
        run: a finished run of it.
    """
    root.mkdir(parents=True)
    yield from tensor_readers(root, world)
    yield from archive_readers(root / "archives")
    yield from picture_readers(root / "pictures")
    yield from pickle_readers(root / "pickles")
    yield from table_readers(root / "tables")
    yield from document_readers(root / "documents", world)
    yield from run_readers(root / "runs", world, run)
