"""Images in tables: parquet and arrow files, as the datasets library writes them.

pyarrow is an optional dependency (`pip install 'jkoflow[data]'`), imported when a table is opened.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from eval.sets.images import BATCH, Batch, decode_picture, read_ahead, require_two, stack_batch
from pipeline.integrity.limits import limit, require_size
from pipeline.integrity.reason import reason_of

SUFFIXES = (".parquet", ".arrow")
#: a batch of rows has at most this part of the limit, as its values are copied
_PART = 8
#: of a message of arrow's format with a dictionary
_DICTIONARY = 2
_USUAL = ("image", "img", "images", "picture", "jpg", "png")


class TableImages:
    """Images of a parquet or arrow file, or of all such files of a folder, in their order.

    The column holds encoded images: their bytes, or a structure with `bytes`, which is the hub's
    image type. `column` is its name; without one, it is the only such column or has a usual name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: pyarrow is missing, a file is damaged, or there is no such column.
    """

    def __init__(self, path: str | Path, column: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no table at {self.path}; check the path")
        self.files = table_files(self.path)
        tables = [Table(file) for file in self.files]
        self.column = choose_column(self.path, tables[0], column)
        for table in tables:
            if not table.has_pictures(self.column):
                raise ValueError(
                    f"{table.file} has no images in the column {self.column!r}; expected the "
                    f"columns of {Path(tables[0].file).name}; write it again"
                )
        self.counts = [len(table) for table in tables]

    def __len__(self) -> int:
        return sum(self.counts)

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """Yield the images in order, `size` at a time; a ValueError names a damaged one."""
        require_two(len(self), self.path)

        def read(job: tuple[Path, int, list[Any]]) -> Batch:
            file, first, values = job
            return stack_batch([
                _decode(value, f"image {first + i} of {file}") for i, value in enumerate(values)
            ])  # fmt: skip

        yield from read_ahead(self._jobs(size), read, 4)

    def _jobs(self, size: int) -> Iterator[tuple[Path, int, list[Any]]]:
        """Yield file, first row and encoded images of every batch."""
        for file in self.files:
            first = 0
            for rows in Table(file).rows([self.column], size):
                yield file, first, rows[self.column]
                first += len(rows[self.column])


def table_files(path: Path) -> list[Path]:
    """List the tables of a path, which is a table itself or a folder of them."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())


class Table:
    """Table of one file; its rows are read in batches, or by the groups that they are stored in.

    Args:
        file: a local file, or the name of `source` in messages.
        source: open parquet file of another file system; None opens the local file.

    Raises:
        ValueError: pyarrow is missing, or the file is damaged, compressed arrow, or too large.
    """

    def __init__(self, file: Path | str, source: IO[bytes] | None = None) -> None:
        pyarrow = _pyarrow()
        self.file = file
        self.largest = 0  # bytes of the largest group of rows, which no cell exceeds
        self.groups: list[int] = []  # rows of every group, or batch of an arrow file
        try:
            if str(file).endswith(".parquet"):
                from pyarrow.parquet import ParquetFile

                self.parquet = ParquetFile(source or file, memory_map=source is None)
                self.schema = self.parquet.schema_arrow
                meta = self.parquet.metadata
                for group in range(meta.num_row_groups):
                    require_size(meta.row_group(group).total_byte_size, file)
                    self.largest = max(self.largest, meta.row_group(group).total_byte_size)
                    self.groups.append(meta.row_group(group).num_rows)
                self.count = meta.num_rows
            else:
                self.parquet = None
                self.batches = _arrow_batches(Path(file))
                self.groups = [len(batch) for batch in self.batches]
                self.schema = self.batches[0].schema
                self.count = sum(self.groups)
            self.columns = list(self.schema.names)  # decodes them
        except (pyarrow.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file} is not a complete table ({reason_of(error)}); write it again"
            ) from error

    def __len__(self) -> int:
        return int(self.count)

    def require_column(self, name: str) -> None:
        """Raise ValueError unless the table has a column."""
        if name not in self.columns:
            raise ValueError(
                f"{self.file} has the columns {', '.join(self.columns)}; expected {name!r} among "
                "them"
            )

    def class_names(self, column: str) -> list[str] | None:
        """Return the names of a column's classes, if the datasets library has noted them."""
        notes = (self.schema.metadata or {}).get(b"huggingface")
        try:
            names = json.loads(notes or b"{}")["info"]["features"][column]["names"]
        except (ValueError, KeyError, TypeError):
            return None
        return [str(name).replace("/", "-") for name in names]

    def pictures(
        self, column: str, others: Sequence[str] = ()
    ) -> Iterator[tuple[bytes, list[Any], str | None]]:
        """Yield every encoded image, its values of other columns, and its path.

        Raises:
            ValueError: the file is damaged, or a cell has no image.
        """
        first = 0
        for rows in self.rows([column, *others], BATCH):
            for i, value in enumerate(rows[column]):
                path = value.get("path") if isinstance(value, dict) else None
                content = _bytes(value, f"image {first + i} of {self.file}")
                yield content, [rows[key][i] for key in others], path
            first += len(rows[column])

    def group_pictures(
        self, group: int, column: str, rows: Collection[int]
    ) -> Iterator[tuple[int, bytes]]:
        """Yield row and encoded image of some rows of a group, counted from its first one.

        Few rows are decoded at once, so the memory is that of the group as it is stored.

        Raises:
            ValueError: the file is damaged, or a cell has no image.
        """
        pyarrow, first = _pyarrow(), 0
        try:
            for batch in self._group_batches(group, column):
                for row in range(first, first + len(batch)):
                    if row in rows:
                        (value,) = _values(batch.slice(row - first, 1))[column]
                        yield row, _bytes(value, f"row {row} of group {group} of {self.file}")
                first += len(batch)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(self.file, error) from error

    @property
    def is_mapped(self) -> bool:
        """Whether rows are read from a map of the file, without decoding their group."""
        return self.parquet is None

    def group_bytes(self, group: int) -> int:
        """Return the bytes of a group of a parquet file, as its index claims them."""
        return int(self.parquet.metadata.row_group(group).total_byte_size)

    def _group_batches(self, group: int, column: str) -> Iterator[Any]:
        """Yield the rows of a group in batches within a part of the limit."""
        if self.parquet is None:
            yield self.batches[group].select([column])
            return
        few = max(1, min(BATCH, limit() // _PART // max(1, self.group_bytes(group))))
        yield from self.parquet.iter_batches(few, row_groups=[group], columns=[column])

    def has_pictures(self, column: str) -> bool:
        """Return whether a column can hold encoded images."""
        if column not in self.columns:
            return False
        types = _pyarrow().types
        kind = self.schema.field(column).type
        if types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and self._is_binary(kind.field(index).type)
        return self._is_binary(kind)

    def has_classes(self, column: str) -> bool:
        """Return whether a column can hold classes: integers, true and false, or texts."""
        types, kind = _pyarrow().types, self.schema.field(column).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        fitting = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string)
        return any(fits(kind) for fits in fitting)

    def _is_binary(self, kind: Any) -> bool:  # noqa: ANN401 - pyarrow is untyped
        """Return whether a type is that of bytes."""
        types = _pyarrow().types
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def rows(self, columns: list[str], size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield the values of some columns, at most `size` rows at a time.

        Cells may share one large value, so fewer rows are decoded at once where a group of rows
        is large.

        Raises:
            ValueError: the file is damaged.
        """
        pyarrow = _pyarrow()
        try:
            if self.parquet is not None:
                yield from self._parquet_rows(columns, size)
            else:
                for batch in self.batches:
                    for start in range(0, len(batch), size):
                        yield _values(batch.slice(start, size).select(columns))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _damaged(self.file, error) from error

    def _parquet_rows(self, columns: list[str], size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield the values of some columns of a parquet file, within a part of the limit."""
        most = limit() // _PART
        few = max(1, min(size, most // max(1, self.largest)))
        waiting, count, total = {name: list[Any]() for name in columns}, 0, 0
        for batch in self.parquet.iter_batches(few, columns=columns):
            if count and (count + len(batch) > size or total + batch.nbytes > most):
                yield waiting
                waiting, count, total = {name: [] for name in columns}, 0, 0
            for name, values in _values(batch).items():
                waiting[name] += values
            count, total = count + len(batch), total + batch.nbytes
        if count:
            yield waiting


def _damaged(file: Path | str, error: Exception) -> ValueError:
    """Return the error of a file that pyarrow cannot read."""
    reason = reason_of(error)
    return ValueError(f"{file} is damaged ({reason}); write it again")


def _pyarrow() -> Any:  # noqa: ANN401 - pyarrow is untyped
    """Import pyarrow; a ValueError says how to install it."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            "the pyarrow library is not installed; expected it for parquet and arrow files; "
            "run: pip install 'jkoflow[data]'"
        ) from error
    return pyarrow


def _values(batch: Any) -> dict[str, list[Any]]:  # noqa: ANN401 - pyarrow is untyped
    """Return the values of a batch by column; a damaged batch would be read beyond its end."""
    batch.validate(full=True)
    values: dict[str, list[Any]] = batch.to_pydict()
    return values


def _arrow_batches(file: Path) -> list[Any]:
    """Map the record batches of an arrow file, a stream or a file with an index.

    Raises:
        ValueError: they are compressed, so that they may unpack to any size.
    """
    import pyarrow

    source = pyarrow.memory_map(str(file))
    start = 8 if source.read(6) == b"ARROW1" else 0  # a stream follows, and an index its end
    source.seek(start)
    for message in pyarrow.ipc.MessageReader.open_stream(source):
        if message.type in ("record batch", "dictionary") and _is_compressed(message.metadata):
            raise ValueError(
                f"{file} is a compressed table; expected a plain one; write it without compression"
            )
    source.seek(start)
    return list(pyarrow.ipc.open_stream(source))


def _is_compressed(metadata: Any) -> bool:  # noqa: ANN401 - pyarrow is untyped
    """Return whether a message's batch has a compression, by the tables of its flatbuffer."""
    data = memoryview(metadata)

    def follow(place: int) -> int:
        return place + struct.unpack_from("<I", data, place)[0]

    def field(table: int, index: int) -> int:
        """Return the place of a field of a table; 0 if it is absent."""
        fields = table - struct.unpack_from("<i", data, table)[0]
        if struct.unpack_from("<H", data, fields)[0] < 6 + 2 * index:
            return 0
        offset = int(struct.unpack_from("<H", data, fields + 4 + 2 * index)[0])
        return table + offset if offset else 0

    try:
        message = follow(0)
        batch = follow(field(message, 2))
        if data[field(message, 1)] == _DICTIONARY:
            batch = follow(field(batch, 1))
        return field(batch, 3) != 0
    except (struct.error, IndexError):
        return True  # it is damaged


def choose_column(path: Path | str, table: Table, column: str | None) -> str:
    """Return the column of images: `column`, else the only such one, or one of a usual name.

    Raises:
        ValueError: there is no such column, it holds no encoded images, or several columns do and
            none has a usual name.
    """
    fitting = [name for name in table.columns if table.has_pictures(name)]
    if column is not None:
        if column not in fitting:
            raise ValueError(
                f"{path} has no images in the column {column!r} (columns: "
                f"{', '.join(table.columns)}); expected encoded images, as bytes or as the hub's "
                "image type"
            )
        return column
    if not fitting:
        raise ValueError(
            f"{path} has no column of images (columns: {', '.join(table.columns)}); expected one "
            "of encoded images, as bytes or as the hub's image type"
        )
    usual = [name for name in _USUAL if name in fitting]
    if len(fitting) > 1 and not usual:
        raise ValueError(
            f"{path} has {len(fitting)} columns of images ({', '.join(fitting)}); expected one, "
            f"or one named {', '.join(_USUAL[:-1])} or {_USUAL[-1]}; rename the column "
            "of images, or set data.columns"
        )
    return (usual or fitting)[0]


def _decode(value: Any, name: str) -> Tensor:  # noqa: ANN401 - a cell of a table
    """Decode a cell as uint8 (C, H, W)."""
    return decode_picture(BytesIO(_bytes(value, name)), name)


def _bytes(value: Any, name: str) -> bytes:  # noqa: ANN401 - a cell of a table
    """Return the bytes of a cell."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"{name} has no bytes; expected an encoded image; write the table again")
    return data
