"""A latent cache as one .npz or .parquet file for other programs."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from pipeline.data.latent_cache import LatentCache
from pipeline.errors import UserError
from pipeline.runtime.system import require_disk_space
from pipeline.storage import atomic

_FORMATS = (".npz", ".parquet")
_BATCH = 2048
_FLOAT = 4


def require_format(path: Path) -> None:
    """Refuse a file that could not be written, before anything is encoded.

    Raises:
        UserError: the ending is unknown, or pyarrow is missing.
    """
    if path.suffix not in _FORMATS:
        raise UserError(f"--out is {path}; expected {' or '.join(_FORMATS)}; change the ending")
    if path.suffix == ".parquet":
        _arrow()


def write_latents(cache: LatentCache, path: Path) -> None:
    """Write all latents of a cache, in the order of the images, a batch in memory at a time.

    The fields are `mean` and, of a KL autoencoder, `std` of the posteriors, float32
    (n, C_z, H_z, W_z), in the units of the decoder. Images with classes have `labels` int64 (n,),
    which a .parquet calls `label`.
    `channel_mean` and `channel_std` (C_z,) standardise: z = (mean − channel_mean) / channel_std.

    An .npz has them as arrays. A .parquet has a row per image and flat lists; its metadata entry
    `jkoflow` is JSON with the shape, both channel vectors and the data set.

    Raises:
        UserError: the ending is unknown, or pyarrow is missing.
        JkoflowError: the disk is full.
    """
    require_format(path)
    fields = 1 + cache.stochastic
    size = len(cache) * math.prod(cache.shape) * fields * _FLOAT
    require_disk_space(path.parent, size, f"the latents of {len(cache)} images")
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    atomic.write_with(path, lambda file: write(cache, file))


def _batches(cache: LatentCache) -> Iterator[dict[str, Tensor]]:
    """Yield `mean` and `std` of consecutive images."""
    for start in range(0, len(cache), _BATCH):
        stop = min(start + _BATCH, len(cache))
        batch = {"mean": cache.reader.read("mean", start, stop).float()}
        if cache.stochastic:
            batch["std"] = (cache.reader.read("log_var", start, stop).float() / 2).exp()
        yield batch


def _write_npz(cache: LatentCache, file: IO[bytes]) -> None:
    """Write the arrays of an .npz."""
    shape = (len(cache), *cache.shape)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("mean", "std") if cache.stochastic else ("mean",):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for batch in _batches(cache):
                    member.write(batch[name].contiguous().numpy().astype("<f4").tobytes())
        scale = cache.standardisation
        small = {"channel_mean": scale.mean.numpy(), "channel_std": scale.std.numpy()}
        if _has_classes(cache):
            small["labels"] = cache.labels().numpy()
        for name, values in small.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, values)


def _write_parquet(cache: LatentCache, file: IO[bytes]) -> None:
    """Write the rows of a .parquet."""
    pa, parquet = _arrow()
    vector = pa.list_(pa.float32(), math.prod(cache.shape))
    columns = {"mean": vector} | ({"std": vector} if cache.stochastic else {})
    labels = cache.labels().numpy() if _has_classes(cache) else None
    if labels is not None:
        columns["label"] = pa.int64()
    scale, identity = cache.standardisation.to_dict(), cache.reader.manifest["identity"]
    note = {"shape": list(cache.shape), "channel_mean": scale["mean"], "channel_std": scale["std"],
            "dataset": identity["dataset"], "split": identity["split"]}  # fmt: skip
    schema = pa.schema(columns, metadata={"jkoflow": json.dumps(note)})
    start = 0
    with parquet.ParquetWriter(_Counted(file), schema) as writer:
        for batch in _batches(cache):
            arrays = [
                pa.FixedSizeListArray.from_arrays(values.flatten().numpy(), type=vector)
                for values in batch.values()
            ]
            stop = start + len(batch["mean"])
            if labels is not None:
                arrays.append(pa.array(labels[start:stop]))
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            start = stop


class _Counted(io.RawIOBase):
    """Write-only stream with a position, which a parquet file needs."""

    def __init__(self, inner: IO[bytes]) -> None:
        super().__init__()
        self.inner, self.position = inner, 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the number of bytes so far."""
        return self.position

    def write(self, data: Any) -> int:  # noqa: ANN401 - any object with the buffer protocol
        """Write bytes; return their number."""
        size = self.inner.write(data)
        self.position += size
        return size


def _has_classes(cache: LatentCache) -> bool:
    """Return whether the images have classes."""
    return bool((cache.labels() >= 0).all())


def _arrow() -> Any:  # noqa: ANN401 - an untyped library
    """Import pyarrow and its parquet module; a UserError says how to install them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            "the pyarrow library is not installed; expected it for .parquet files; run: pip "
            "install 'jkoflow[data]'"
        ) from error
    return pyarrow, parquet
