"""Readers of tables: npy, text, tar shards, parquet and arrow."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.tabular.load import load_table
from tests.faults.readers.parts import images_of, npy, picture_of, statistics, tar_of
from tests.faults.readers.reader import RNG, Reader


def _table(name: str, path: Path) -> Any:
    table = load_table(DataConfig(name=name, path=str(path)))
    return {split: rows.read(0, len(rows)) for split, rows in table.rows.items()}


def _packed(name: str, path: Path) -> Any:
    shutil.rmtree(Path(path.parent / "home"), ignore_errors=True)
    return images_of(name, path, size=8)


def table_readers(root: Path) -> Iterator[Reader]:
    gas, boone = RNG.normal(size=(120, 19)), RNG.normal(size=(120, 43))
    yield Reader("npy of GAS", root / "ethylene_CO.npy", npy(gas), partial(_table, "gas"))
    yield Reader("npy of MINIBOONE", root / "data.npy", npy(boone), partial(_table, "miniboone"))
    rows = "\n".join(" ".join(f"{x:.3f}" for x in row) for row in np.tile(gas, (4, 1)))
    text = f"head\n{rows}\n".encode()
    yield Reader("text of GAS", root / "ethylene_CO.txt", text, partial(_table, "gas"))
    samples = {f"{i}.{k}": v for i in range(3) for k, v in
               (("png", picture_of("png")), ("cls", str(i).encode()))}  # fmt: skip
    yield Reader("webdataset", root / "w.tar", tar_of(samples), partial(_packed, "webdataset"),
                 names=("image", "packed"))
    labels = {f"{i}.{k}": v for i in range(3) for k, v in
              (("png", picture_of("png")), ("json", b'{"label": 1}'))}  # fmt: skip
    yield Reader(
        "webdataset json", root / "v.tar", tar_of(labels), partial(_packed, "webdataset"),
        names=("image", "packed"),
    )  # fmt: skip
    import importlib.util

    if importlib.util.find_spec("pyarrow") is None:
        return
    import pyarrow
    from pyarrow import parquet

    notes = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({
        "image": [{"bytes": picture_of("png"), "path": f"{i}.png"} for i in range(3)],
        "label": [0, 1, 0],
    }).replace_schema_metadata({"huggingface": json.dumps(notes)})  # fmt: skip
    file = io.BytesIO()
    parquet.write_table(table, file)
    yield Reader("parquet", root / "x.parquet", file.getvalue(), partial(_packed, "hf"),
                 names=("packed", "image"))  # fmt: skip
    yield Reader("parquet set", root / "y.parquet", file.getvalue(), statistics)
    for name, opened in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        sink = io.BytesIO()
        with opened(sink, table.schema) as writer:
            writer.write_table(table)
        yield Reader(
            f"arrow {name}", root / f"{name}.arrow", sink.getvalue(), partial(_packed, "hf"),
            names=("packed", "image"),
        )
