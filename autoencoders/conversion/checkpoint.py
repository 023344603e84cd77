"""Lazy reader of untrusted checkpoints: names and shapes first, then single tensors.

There are three formats: safetensors, torch's zip (since 1.6) and torch's older stream. Only the
requested tensors are read, so a first stage is read from a file of many gigabytes in as much
memory as it needs.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoencoders.conversion import unpickle
from autoencoders.conversion.unpickle import (
    DamagedCheckpointError,
    Storage,
    TensorReference,
    UnsafeCheckpointError,
)

MAX_TENSOR_BYTES = 16 << 30
"""Limit of the bytes of tensors read from one checkpoint."""
_STREAM_MAGIC, _STREAM_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STATE_KEYS = ("state_dict", "model")


class Checkpoint:
    """Open checkpoint; a context manager.

    Args:
        path: a .safetensors, .ckpt, .pt, .pth or .bin file; its content decides on the format.

    Attributes:
        form: "safetensors", "zip" or "stream".
        shapes: shape of every tensor, by name.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedCheckpointError: it is truncated, or of another format.
        UnsafeCheckpointError: its pickle uses names that no checkpoint needs.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}; check the path")
        self.path, self._read = path, 0
        self._file = open(path, "rb")
        try:
            self.shapes = self._open()
        except (DamagedCheckpointError, UnsafeCheckpointError) as error:
            self._file.close()
            raise type(error)(f"{path} cannot be used: {error}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Read one tensor of shape (*shape,), contiguous, in its stored dtype.

        Raises:
            DamagedCheckpointError: the tensor is incomplete.
            ValueError: more than `MAX_TENSOR_BYTES` were read from this file.
        """
        if self.form == "safetensors":
            return self._count(self._tensors.get_tensor(name))
        reference: TensorReference = self._references[name]
        storage = reference.storage
        raw = self._storage_bytes(storage)
        if len(raw) != storage.numel * storage.dtype.itemsize:
            raise DamagedCheckpointError(f"{self.path} cannot be used: {name} is incomplete")
        if not reference.numel:
            return torch.empty(reference.size, dtype=storage.dtype)
        flat = torch.frombuffer(raw, dtype=storage.dtype)
        strided = flat.as_strided(reference.size, reference.stride, reference.offset)
        return self._count(strided.clone())

    def _count(self, tensor: Tensor) -> Tensor:
        """Add a tensor to the bytes read, and return it contiguous."""
        self._read += tensor.numel() * tensor.element_size()
        if self._read > MAX_TENSOR_BYTES:
            raise ValueError(
                f"{self.path} holds more than {MAX_TENSOR_BYTES >> 30} GiB of weights; expected "
                "the checkpoint of an autoencoder only"
            )
        return tensor.contiguous()

    def _open(self) -> dict[str, tuple[int, ...]]:
        """Detect the format and read names and shapes."""
        head = self._file.read(9)
        self._file.seek(0)
        if head[8:9] == b"{":
            return self._open_safetensors()
        value = self._open_zip() if head[:4] == b"PK\x03\x04" else self._open_stream()
        self._references = _references(value)
        return {name: reference.size for name, reference in self._references.items()}

    def _open_safetensors(self) -> dict[str, tuple[int, ...]]:
        """Open a safetensors file; return the shapes."""
        self.form = "safetensors"
        try:
            self._tensors: Any = safe_open(self.path, "pt")
            names = self._tensors.keys()
            return {n: tuple(self._tensors.get_slice(n).get_shape()) for n in names}
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(
                f"it is not a complete safetensors file ({error})"
            ) from error

    def _open_zip(self) -> object:
        """Open torch's zip format; return its pickled value."""
        self.form = "zip"
        try:
            self._zip = zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, OSError, ValueError, struct.error) as error:
            raise DamagedCheckpointError(
                "it is truncated or damaged (no end of the archive); download it again"
            ) from error
        entries = {e.filename: e for e in self._zip.infolist()}
        pickles = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise DamagedCheckpointError("it is a zip archive, but not one of torch.save")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}constants.pkl" in entries:
            raise DamagedCheckpointError("it is a TorchScript program; expected a state dict")
        order = entries.get(f"{self._prefix}byteorder")
        if order is not None and bytes(self._entry(order, 16)) != b"little":
            raise DamagedCheckpointError("it is big-endian; expected little-endian tensors")
        self._entries = entries
        raw = self._entry(entries[pickles[0]], unpickle.MAX_PICKLE_BYTES)
        return unpickle.read_pickle(io.BytesIO(raw))[0]

    def _entry(self, entry: zipfile.ZipInfo, most: int) -> bytearray:
        """Read an entry, which must be uncompressed, so that a small file cannot expand."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
            raise DamagedCheckpointError(
                f"its entry {entry.filename} has {entry.file_size} bytes, or is compressed; "
                f"expected at most {most} bytes, uncompressed"
            )
        try:
            return bytearray(self._zip.read(entry))
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, struct.error) as error:
            raise DamagedCheckpointError(f"its entry {entry.filename} is damaged") from error

    def _open_stream(self) -> object:
        """Open torch's older stream format; return its pickled value."""
        self.form = "stream"
        file: IO[bytes] = self._file
        try:
            header = [unpickle.read_pickle(file)[0], unpickle.read_pickle(file)[0]]
        except DamagedCheckpointError:
            header = []
        if header != [_STREAM_MAGIC, _STREAM_PROTOCOL]:
            raise DamagedCheckpointError(
                "it is neither a safetensors file nor a checkpoint of torch.save"
            )
        unpickle.read_pickle(file)  # sizes of C types on the machine of origin
        value, storages = unpickle.read_pickle(file)
        order, _ = unpickle.read_pickle(file)
        self._positions: dict[str, int] = {}
        position, end = file.tell(), self.path.stat().st_size
        for key in order if isinstance(order, list) else []:
            if key not in storages:
                raise DamagedCheckpointError("it holds a storage of an unknown dtype")
            self._positions[key] = position + 8  # after the number of elements
            position += 8 + storages[key].numel * storages[key].dtype.itemsize
        if position > end:
            raise DamagedCheckpointError("it is truncated; download it again")
        return value

    def _storage_bytes(self, storage: Storage) -> bytearray:
        """Read the bytes of a storage; empty if it is missing."""
        size = storage.numel * storage.dtype.itemsize
        if self.form == "zip":
            entry = self._entries.get(f"{self._prefix}data/{storage.key}")
            return bytearray() if entry is None else self._entry(entry, size)
        if storage.key not in self._positions:
            return bytearray()
        self._file.seek(self._positions[storage.key])
        return bytearray(self._file.read(min(size, self.path.stat().st_size)))


def _references(value: object) -> dict[str, TensorReference]:
    """Return the tensors of a checkpoint's state dict, by name."""
    state = value
    if isinstance(value, dict):
        inner = [value[k] for k in _STATE_KEYS if isinstance(value.get(k), dict)]
        state = inner[0] if inner else value
    items = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in items if isinstance(k, str) and isinstance(v, TensorReference)}
    if not tensors:
        raise DamagedCheckpointError("it holds no dictionary of tensors")
    return tensors
