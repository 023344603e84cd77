"""Checkpoints that someone else wrote, opened lazily: names and shapes first, then tensors.

Three forms are known: safetensors, torch's zip (since 1.6) and torch's older stream. Only the
tensors that are asked for are read, so the first stage comes out of a file of many gigabytes
in as much memory as it needs.
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
"""Most bytes of tensors that are read of one checkpoint."""
_STREAM_MAGIC, _STREAM_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STATE_KEYS = ("state_dict", "model")


class Checkpoint:
    """An open checkpoint; a context manager.

    Args:
        path: a .safetensors, .ckpt, .pt, .pth or .bin file; its content decides, not its name.

    Attributes:
        form: "safetensors", "zip" or "stream".
        shapes: size of every tensor, by name.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedCheckpointError: cut off, or none of the three forms.
        UnsafeCheckpointError: its pickle asks for what no checkpoint needs.
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
        """One tensor, contiguous, in its stored type.

        Raises:
            DamagedCheckpointError: its numbers are not all there.
            ValueError: more was read of this file than `MAX_TENSOR_BYTES`.
        """
        if self.form == "safetensors":
            return self._count(self._tensors.get_tensor(name))
        note: TensorReference = self._notes[name]
        raw = self._numbers(note.storage)
        if len(raw) != note.storage.numel * note.storage.dtype.itemsize:
            raise DamagedCheckpointError(f"{self.path} cannot be used: {name} is not all there")
        if not note.numel:
            return torch.empty(note.size, dtype=note.storage.dtype)
        flat = torch.frombuffer(raw, dtype=note.storage.dtype)
        return self._count(flat.as_strided(note.size, note.stride, note.offset).clone())

    def _count(self, tensor: Tensor) -> Tensor:
        self._read += tensor.numel() * tensor.element_size()
        if self._read > MAX_TENSOR_BYTES:
            raise ValueError(
                f"{self.path} holds more than {MAX_TENSOR_BYTES >> 30} GiB of weights; give the "
                "checkpoint of the autoencoder alone"
            )
        return tensor.contiguous()

    def _open(self) -> dict[str, tuple[int, ...]]:
        head = self._file.read(9)
        self._file.seek(0)
        if head[8:9] == b"{":
            return self._open_safetensors()
        value = self._open_zip() if head[:4] == b"PK\x03\x04" else self._open_stream()
        self._notes = _notes(value)
        return {name: note.size for name, note in self._notes.items()}

    def _open_safetensors(self) -> dict[str, tuple[int, ...]]:
        self.form = "safetensors"
        try:
            self._tensors: Any = safe_open(self.path, "pt")
            names = self._tensors.keys()
            return {n: tuple(self._tensors.get_slice(n).get_shape()) for n in names}
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(
                f"it is not a whole safetensors file ({error})"
            ) from error

    def _open_zip(self) -> object:
        self.form = "zip"
        try:
            self._zip = zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, OSError, ValueError, struct.error) as error:
            raise DamagedCheckpointError(
                "it is cut off or damaged (no end of the archive); get it again"
            ) from error
        entries = {e.filename: e for e in self._zip.infolist()}
        pickles = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise DamagedCheckpointError("it is a zip archive, but not one that torch.save wrote")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}constants.pkl" in entries:
            raise DamagedCheckpointError("it is a TorchScript program; give a state dict")
        order = entries.get(f"{self._prefix}byteorder")
        if order is not None and bytes(self._entry(order, 16)) != b"little":
            raise DamagedCheckpointError("it was written on a big-endian machine")
        self._entries = entries
        raw = self._entry(entries[pickles[0]], unpickle.MAX_PICKLE_BYTES)
        return unpickle.read_pickle(io.BytesIO(raw))[0]

    def _entry(self, entry: zipfile.ZipInfo, most: int) -> bytearray:
        """The bytes of an entry; stored entries only, so that a small file cannot unfold."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
            raise DamagedCheckpointError(f"its entry {entry.filename} is not as torch writes it")
        try:
            return bytearray(self._zip.read(entry))
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, struct.error) as error:
            raise DamagedCheckpointError(f"its entry {entry.filename} is damaged") from error

    def _open_stream(self) -> object:
        self.form = "stream"
        file: IO[bytes] = self._file
        try:
            marks = [unpickle.read_pickle(file)[0], unpickle.read_pickle(file)[0]]
        except DamagedCheckpointError:
            marks = []
        if marks != [_STREAM_MAGIC, _STREAM_PROTOCOL]:
            raise DamagedCheckpointError(
                "it is neither a safetensors file nor a checkpoint that torch.save wrote"
            )
        unpickle.read_pickle(file)  # sizes of C's types on the machine that wrote it
        value, storages = unpickle.read_pickle(file)
        order, _ = unpickle.read_pickle(file)
        self._places: dict[str, int] = {}
        position, end = file.tell(), self.path.stat().st_size
        for key in order if isinstance(order, list) else []:
            if key not in storages:
                raise DamagedCheckpointError("it holds numbers of a type that is not known")
            self._places[key] = position + 8  # behind the count of its numbers
            position += 8 + storages[key].numel * storages[key].dtype.itemsize
        if position > end:
            raise DamagedCheckpointError("it is cut off; get it again")
        return value

    def _numbers(self, storage: Storage) -> bytearray:
        size = storage.numel * storage.dtype.itemsize
        if self.form == "zip":
            entry = self._entries.get(f"{self._prefix}data/{storage.key}")
            return bytearray() if entry is None else self._entry(entry, size)
        if storage.key not in self._places:
            return bytearray()
        self._file.seek(self._places[storage.key])
        return bytearray(self._file.read(min(size, self.path.stat().st_size)))


def _notes(value: object) -> dict[str, TensorReference]:
    """The tensors of a checkpoint's state dict, by name."""
    state = value
    if isinstance(value, dict):
        inner = [value[k] for k in _STATE_KEYS if isinstance(value.get(k), dict)]
        state = inner[0] if inner else value
    items = state.items() if isinstance(state, dict) else ()
    found = {k: v for k, v in items if isinstance(k, str) and isinstance(v, TensorReference)}
    if not found:
        raise DamagedCheckpointError("it holds no dictionary of tensors")
    return found
