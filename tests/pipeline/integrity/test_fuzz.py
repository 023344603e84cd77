"""Mutated files of every kind: the same content, or one sentence; a small set with a seed."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from eval.sets.sources import open_source
from pipeline.assets.archives import read_bytes
from pipeline.cli import main
from pipeline.integrity.arrays import read_array
from pipeline.runs import verify
from pipeline.storage import seal
from tests.faults.fuzz import FuzzError, fuzz
from tests.faults.mutations import HangError, bounded
from tests.faults.readers.every import readers
from tests.faults.readers.reader import Reader
from tests.pipeline.tiny import World

_EXAMPLES = 2


def test_every_reader_answers_by_its_content_or_a_sentence(
    trained: World, run: Path, tmp_path: Path
) -> None:
    answers = [fuzz(reader, _EXAMPLES, 0) for reader in readers(tmp_path / "r", trained, run)]
    assert len(answers) > 60
    assert sum(counter["sentence"] for counter in answers) > 60


def test_other_answers_are_failures(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""

    def explode(path: Path) -> int:
        return {0: 0}[path.read_bytes()[0]]

    def waste(path: Path) -> object:
        return np.ones(1 << 29) if path.read_bytes()[:1] != b"\0" else None

    for read, reason in ((explode, "KeyError"), (waste, "MemoryError")):
        with pytest.raises((FuzzError, ExceptionGroup)) as caught:
            fuzz(Reader("x", tmp_path / "x", bytes(9), read), 20, 0)
        assert reason in str([caught.value, *getattr(caught.value, "exceptions", ())])
    with pytest.raises(HangError), bounded(0.1):
        time.sleep(5)
    silent = Reader("x", tmp_path / "x", bytes(range(9)), Path.read_bytes, sealed=True)
    with pytest.raises(FuzzError, match="other content, silently"):
        fuzz(silent, 20, 0)
    assert sum(fuzz(dataclasses.replace(silent, sealed=False), 20, 0).values()) == 20


def test_a_header_claims_no_more_than_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(4))
    data = (tmp_path / "x.npy").read_bytes().replace(b"(4,), }     ", b"(9**9,), }  ")
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.npy is not a whole \.npy"), bounded(size=1 << 28):
        read_array(tmp_path / "x.npy")
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"small"))
    with bounded(size=1 << 28):
        assert read_bytes(tmp_path / "x.gz") == b"small"


def test_a_table_is_not_read_beyond_its_end(tmp_path: Path) -> None:
    """Its offsets lead out of its buffers, which ended the process."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"image": [b"\x89PNG" * 9] * 3})
    with pyarrow.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    data = (tmp_path / "x.arrow").read_bytes()
    offsets = np.array([0, 36, 72, 108], np.int32).tobytes()
    assert offsets in data
    wrong = np.array([0, 36, 2**30, 2**30 + 36], np.int32).tobytes()
    (tmp_path / "x.arrow").write_bytes(data.replace(offsets, wrong))
    with pytest.raises(ValueError, match="is damaged"):
        images = open_source(tmp_path / "x.arrow").images
        assert images is not None
        list(images.batches())


def test_a_manifest_names_its_own_shards_alone(trained: World, tmp_path: Path) -> None:
    """A repair removed the file that it named, outside of its folder, too."""
    cache = Path(shutil.copytree(trained.caches()[0], tmp_path / "latents" / "cache"))
    (tmp_path / "letter").write_text("dear")
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../../letter"
    (cache / "manifest.json").write_text(json.dumps(manifest))
    (cache / seal.NAME).unlink()
    verify.seal_as_it_is(cache)
    (cache / "shard-00000.safetensors").unlink()
    main.main(["verify", str(cache), "--repair"])
    assert (tmp_path / "letter").is_file()
