"""Malicious archives: bombs, lies about sizes, links, and names that lead outside."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from tests.faults.strangers.pictures import png
from tests.faults.strangers.stranger import Stranger, writer

ZEROS = 3 << 30  # more than any reader may unpack


def _zip(members: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return make


def _deflated(size: int) -> bytes:
    """A raw deflate stream of zeros; the block of 16 MiB is compressed once."""
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    first, block = (
        squeezer.compress(bytes(1 << 24)) + squeezer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    return first + block * ((size >> 24) - 1) + squeezer.flush()


def _zip_bomb(name: str, size: int) -> Callable[[Path], object]:
    """A zip whose directory says that its member unpacks to many zeros, as it does."""

    def make(path: Path) -> None:
        _zip({name: _deflated(size)}, zipfile.ZIP_STORED)(path)
        data = bytearray(path.read_bytes())
        for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            at = data.index(mark) + place
            data[at : at + 2] = zipfile.ZIP_DEFLATED.to_bytes(2, "little")
            data[at + 14 : at + 18] = size.to_bytes(4, "little")
        path.write_bytes(data)

    return make


def _lying_zip(name: str) -> Callable[[Path], object]:
    """A zip whose directory claims fewer bytes than its member unpacks to."""

    def make(path: Path) -> None:
        _zip({name: bytes(64 << 20)})(path)
        data = bytearray(path.read_bytes())
        for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
            at = data.index(mark) + place
            data[at : at + 4] = (100).to_bytes(4, "little")
        path.write_bytes(data)

    return make


def _header(shape: tuple[int, ...], dtype: str = "|u1", extra: str = "") -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, {extra}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _tar(
    members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w"
) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            for member, data in members:
                member.size = member.size or len(data)
                tar.addfile(member, io.BytesIO(data) if data else None)

    return make


def _member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0
) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


def _sparse(path: Path) -> None:
    """A tar with a sparse member (GNU) of a terabyte."""
    member = _member("a.png", tarfile.GNUTYPE_SPARSE)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 0)
    block[483:495] = tarfile.itn(2**40, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + bytes(1024))


def _gz_bomb(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(1 << 24)) * (ZEROS >> 24))


def _tensors(
    header: bytes, body: bytes = b"", length: int | None = None
) -> Callable[[Path], object]:
    size = len(header) if length is None else length
    return writer(size.to_bytes(8, "little") + header + body)


def _parquet(value: bytes, rows: int, kind: str = "parquet") -> Callable[[Path], object]:
    """A table whose rows all refer to one large value."""

    def make(path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        indices = pyarrow.array(np.zeros(rows, np.int32))
        column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([value]))
        if kind == "parquet":
            parquet.write_table(
                pyarrow.table({"image": column}),
                path,
                dictionary_pagesize_limit=1 << 30,
                store_schema=False,
            )
            return
        with pyarrow.ipc.new_file(path, pyarrow.schema([("image", column.type)])) as writer:
            writer.write_batch(pyarrow.record_batch({"image": column}))

    return make


def archives() -> Iterator[Stranger]:
    picture = png(8, 8)
    wanted = "train-images-idx3-ubyte"
    arrays = io.BytesIO()
    np.save(arrays, np.zeros((4, 8, 8, 3), np.uint8))
    whole = arrays.getvalue()
    huge = _header((2**20, 2**12, 2**8, 3))
    out = ["../outside.png", "/tmp/jkoflow-outside.png", "a/../../outside.png", "..\\outside.png"]
    found: dict[str, Callable[[Path], object]] = {
        "bomb.zip": _zip_bomb(wanted, ZEROS),
        "bomb.npz": _zip_bomb("arr_0.npy", ZEROS),
        "claims.npz": _zip({"arr_0.npy": huge}),
        "negative.npz": _zip({"arr_0.npy": _header((-1, 2, 2, 3))}),
        "objects.npz": _zip({"arr_0.npy": _header((1, 1, 1, 3), "|O") + pickle.dumps([1])}),
        "code.npz": _zip({"arr_0.npy": _header((1,), extra="'x': __import__('os')")}),
        "nested-header.npz": _zip({"arr_0.npy": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535}),
        "long-header.npz": _zip(
            {"arr_0.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 10**6}
        ),
        "lying.npz": _lying_zip("arr_0.npy"),
        "lying.zip": _lying_zip(wanted),
        "many.zip": _zip({f"{i}": b"" for i in range(60_000)}, zipfile.ZIP_STORED),
        "lzma.zip": _zip({wanted: bytes(64 << 20)}, zipfile.ZIP_LZMA),
        "bzip2.zip": _zip({wanted: bytes(64 << 20)}, zipfile.ZIP_BZIP2),
        "moments.npz": _zip(
            {"mu.npy": _header((2**40,), "<f8"), "sigma.npy": _header((2**20, 2**20), "<f8")}
        ),
        "bomb.gz": _gz_bomb,
        "cut.gz": writer(gzip.compress(bytes(10**6))[:-9]),
        "bomb.tar.gz": lambda path: _gz_bomb(path),
        "sparse.tar": _sparse,
        "claims.tar": _tar([(_member("a.png", size=2**40), b"")]),
        "no-end.tar": writer(bytes(512) * 20_000),
        "pax.tar": _pax,
        "hard-link.tar": _tar([(_member("a.png", tarfile.LNKTYPE, "/etc/passwd"), b"")]),
        "link.tar": _tar(
            [(_member("a.png", tarfile.SYMTYPE, "/etc/passwd"), b""), (_member("a.png"), picture)]
        ),
        "link-folder.tar": _tar(
            [
                (_member("x", tarfile.SYMTYPE, "/tmp"), b""),
                (_member("x/jkoflow-outside.png"), picture),
            ]
        ),
        "device.tar": _tar([(_member("a.png", tarfile.CHRTYPE), b"")]),
        "pipe.tar": _tar([(_member("a.png", tarfile.FIFOTYPE), b"")]),
        "class.tar": _tar([(_member("a.png"), picture), (_member("a.cls"), b"../../outside")]),
        "long-class.tar": _tar([(_member("a.png"), picture), (_member("a.cls"), b"x" * 10**6)]),
        "digits.tar": _tar([(_member("a.png"), picture), (_member("a.cls"), b"9" * 10**6)]),
        "json.tar": _tar([(_member("a.png"), picture), (_member("a.json"), b"[" * 10**6)]),
        "long-name.tar": _tar([(_member("a" * 5000 + ".png"), picture)]),
        "header.safetensors": _tensors(b"{}", length=2**60),
        "deep.safetensors": _tensors(b"[" * 10**6),
        "many.safetensors": _tensors(
            b"{"
            + b",".join(
                b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**5)
            )
            + b"}"
        ),
        "overlap.safetensors": _tensors(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "claims.safetensors": _tensors(
            b'{"images":{"dtype":"U8","shape":[1099511627776,3,8,8],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "empty.safetensors": _tensors(
            b'{"images":{"dtype":"U8","shape":[1099511627776,3,0,8],"data_offsets":[0,0]}}'
        ),
        "network.safetensors": _network,
        "wide.parquet": _parquet(picture + bytes(64 << 20), 1000),
        "wide.arrow": _parquet(picture + bytes(64 << 20), 1000, "arrow"),
        "images.parquet": _parquet(picture, 20_000),
        "cut.parquet": writer(b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1"),
    }
    for number, name in enumerate(out):
        found[f"out-{number}.tar"] = _tar([(_member(name), picture)])
        found[f"out-{number}.zip"] = _zip({name.replace("outside.png", wanted): b"x"})
    found["nested.zip"] = _zip({wanted + ".gz": gzip.compress(whole)})
    for name, make in found.items():
        yield Stranger("archive", name, make)


def _pax(path: Path) -> None:
    member = _member("a.png")
    member.pax_headers = {"size": str(2**50), "path": "../outside.png"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, None)


def _network(path: Path) -> None:
    """Weights that claim a network of terabytes, with a digest that is right."""
    import json

    from autoencoders.weights import DESCRIPTION
    from pipeline.integrity.digests import BLANK, stamp
    from tests.autoencoders.models import config

    described = config().to_dict() | {"ch": 8192, "ch_mult": [64, 64]}
    notes = {"architecture": described, "seal": BLANK}
    path.write_bytes(stamp(save({"x": torch.zeros(1)}, {DESCRIPTION: json.dumps(notes)})))
