"""Malicious files: of a pickle nothing runs, nothing is written outside, and bombs stay small.

Each file is read in a child, by the readers of its kind. The child's memory and seconds are
measured. A payload would create a file, whose name the test looks for.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import random
import resource
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from safetensors.torch import save

from tests.faults.table import Table
from tests.pipeline.tiny import _SERVER, World

SECONDS, BYTES = 10.0, 2 << 30
RESULTS = ("harmless", "payload ran", "written outside", "too slow", "too large", "other end")
#: of a payload; the readers' files lie in another folder
CANARY = "payload-ran"


@dataclass(frozen=True)
class Stranger:
    """A malicious file.

    Attributes:
        kind: pickle, archive or picture.
        name: of the file, with its ending.
        make: writes it to a path.
    """

    kind: str
    name: str
    make: Callable[[Path], object]


def strangers(canary: Path) -> Iterator[Stranger]:
    """All malicious files; payloads would create `canary`."""
    yield from _pickles(canary)
    yield from _archives()
    yield from _pictures()


# ------------------------------------------------------------------ pickles


class _Call:
    """An object whose pickle calls a function by name."""

    def __init__(self, function: Any, *words: Any) -> None:
        self.call = function, words

    def __reduce__(self) -> Any:
        return self.call


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _pickles(canary: Path) -> Iterator[Stranger]:
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    calls = {
        "os system": (b"os\nsystem", touch),
        "posix system": (b"posix\nsystem", touch),
        "nt system": (b"nt\nsystem", touch),
        "eval": (b"builtins\neval", code),
        "exec": (b"builtins\nexec", code),
        "python 2 eval": (b"__builtin__\neval", code),
        "popen": (b"os\npopen", touch),
        "Popen": (b"subprocess\nPopen", touch),
        "getoutput": (b"subprocess\ngetoutput", touch),
        "run_path": (b"runpy\nrun_path", str(canary)),
        "pty": (b"pty\nspawn", touch),
        "timeit": (b"timeit\ntimeit", code),
        "runstring": (b"numpy.testing._private.utils\nrunstring", code),
        "loader": (b"pydoc\nlocate", "os.system"),
        "pip": (b"pip\nmain", "--version"),
        "torch load": (b"torch\nload", str(canary)),
        "torch hub": (b"torch.hub\nload", str(canary)),
        "jit": (b"torch.jit\nload", str(canary)),
        "numpy load": (b"numpy\nload", str(canary)),
        "open": (b"builtins\nopen", str(canary)),
        "io open": (b"io\nopen", str(canary)),
        "import": (b"builtins\n__import__", "antigravity"),
        "exit": (b"os\n_exit", 3),
        "shutil": (b"shutil\nrmtree", str(canary.parent / "victim")),
        "webbrowser": (b"webbrowser\nopen", "file:///"),
        "chdir": (b"os\nchdir", "/"),
        "ctypes": (b"ctypes\nCDLL", "libc.so.6"),
        "code": (b"code\ninteract", "x"),
    }
    for name, (function, word) in calls.items():
        argument = pickle.dumps(word, 2)[2:-1]
        plain = b"\x80\x02c" + function + b"\n" + argument + b"\x85R."
        module, _, attribute = function.partition(b"\n")
        texts = b"".join(b"\x8c" + bytes([len(part)]) + part for part in (module, attribute))
        stacked = b"\x80\x04" + texts + b"\x93" + argument + b"\x85R."
        marked = b"\x80\x02}(X\x04\x00\x00\x00data(" + argument + b"i" + function + b"\nu."
        built = b"(" + argument + b"i" + function + b"\n."
        for how, data in (
            ("called", plain),
            ("by texts", stacked),
            ("in a value", marked),
            ("as an instance", built),
        ):
            yield Stranger("pickle", f"{name} {how}", _writer(data))
    nested = b")q\x00" + b"0h\x00h\x00\x86q\x00" * 40
    reconstruct = _name("numpy.core.multiarray", "_reconstruct") + _name("numpy", "ndarray")
    bombs = {
        "nested key": b"\x80\x02}" + nested + b"K\x01s.",
        "nested keys": b"\x80\x02}(" + nested + b"K\x01u.",
        "nested element": b"\x80\x04\x8f(" + nested + b"\x90.",
        "frozen set": b"\x80\x04(" + nested + b"\x91.",
        "dictionary": b"\x80\x02(" + nested + b"K\x01d.",
        "deep": b"\x80\x02" + b"(" * 5000 + b".",
        "deeper": b"\x80\x02" + b"(" * 10**6 + b".",
        "extension": b"\x80\x02\x82\x01.",
        "no end": b"\x80\x02" + b"N0" * 5_000_000,
        "memory": b"\x80\x02]" + b"(" + b"K\x01" * 10**6 + b"e.",
        "many bytes": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",
        "many letters": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b".",
        "byte array": b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".",
        "long number": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b".",
        "frame": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b".",
        "memo": b"\x80\x02Nr" + (2**32 - 1).to_bytes(4, "little") + b".",
        "huge array": b"\x80\x02"
        + reconstruct
        + b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftC\x01b\x87R.",
        "own state": b"\x80\x02c__main__\nx\n)\x81}X\x01\x00\x00\x00aK\x01sb.",
        "digits": b"I" + b"9" * 10**6 + b"\n.",
        "long digits": b"L" + b"9" * 10**6 + b"L\n.",
    }
    for name, data in bombs.items():
        yield Stranger("pickle", name, _writer(data))


def _writer(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


# ----------------------------------------------------------------- archives

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
    return _writer(size.to_bytes(8, "little") + header + body)


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


def _archives() -> Iterator[Stranger]:
    png = _png(8, 8)
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
        "cut.gz": _writer(gzip.compress(bytes(10**6))[:-9]),
        "bomb.tar.gz": lambda path: _gz_bomb(path),
        "sparse.tar": _sparse,
        "claims.tar": _tar([(_member("a.png", size=2**40), b"")]),
        "no-end.tar": _writer(bytes(512) * 20_000),
        "pax.tar": _pax,
        "hard-link.tar": _tar([(_member("a.png", tarfile.LNKTYPE, "/etc/passwd"), b"")]),
        "link.tar": _tar(
            [(_member("a.png", tarfile.SYMTYPE, "/etc/passwd"), b""), (_member("a.png"), png)]
        ),
        "link-folder.tar": _tar(
            [(_member("x", tarfile.SYMTYPE, "/tmp"), b""), (_member("x/jkoflow-outside.png"), png)]
        ),
        "device.tar": _tar([(_member("a.png", tarfile.CHRTYPE), b"")]),
        "pipe.tar": _tar([(_member("a.png", tarfile.FIFOTYPE), b"")]),
        "class.tar": _tar([(_member("a.png"), png), (_member("a.cls"), b"../../outside")]),
        "long-class.tar": _tar([(_member("a.png"), png), (_member("a.cls"), b"x" * 10**6)]),
        "digits.tar": _tar([(_member("a.png"), png), (_member("a.cls"), b"9" * 10**6)]),
        "json.tar": _tar([(_member("a.png"), png), (_member("a.json"), b"[" * 10**6)]),
        "long-name.tar": _tar([(_member("a" * 5000 + ".png"), png)]),
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
        "wide.parquet": _parquet(png + bytes(64 << 20), 1000),
        "wide.arrow": _parquet(png + bytes(64 << 20), 1000, "arrow"),
        "images.parquet": _parquet(png, 20_000),
        "cut.parquet": _writer(b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1"),
    }
    for number, name in enumerate(out):
        found[f"out-{number}.tar"] = _tar([(_member(name), png)])
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


# ----------------------------------------------------------------- pictures


def _encoded(kind: str, side: int = 8, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, kind, **options)
    return file.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def _png(
    width: int,
    height: int,
    *chunks: bytes,
    depth: int = 8,
    colour: int = 2,
    rows: bytes | None = None,
) -> bytes:
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    data = bytes((1 + 3 * width) * height) if rows is None else rows
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", head)
        + b"".join(chunks)
        + _chunk(b"IDAT", zlib.compress(data))
        + _chunk(b"IEND", b"")
    )


def _patched(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


def _jpeg(width: int, height: int) -> bytes:
    data = _encoded("jpeg")
    place = next(data.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in data)
    return _patched(data, place + 5, height.to_bytes(2, "big") + width.to_bytes(2, "big"))


def _tiff(tags: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF of one directory: tag, type, count and value."""
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + data


def _pictures() -> Iterator[Stranger]:
    text = zlib.compress(bytes(64 << 20))
    big = (2**31 - 1).to_bytes(4, "big")
    sides = (
        (0, 0),
        (0, 8),
        (8, 0),
        (2**31 - 1, 1),
        (1, 2**31 - 1),
        (60_000, 60_000),
        (20_000, 20_000),
        (9_000, 9_000),
        (2**31 - 1, 2**31 - 1),
    )
    found: dict[str, bytes] = {f"{w}x{h}.png": _png(w, h, rows=b"") for w, h in sides}
    bmp, gif, webp = _encoded("bmp"), _encoded("gif"), _encoded("webp", lossless=True)
    tiff = [
        (256, 4, 1, 2**31 - 1),
        (257, 4, 1, 2**31 - 1),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, 1),
        (279, 4, 1, 8),
    ]
    small = [(256, 4, 1, 8), (257, 4, 1, 8), *tiff[2:]]
    found |= {
        "text.png": _png(8, 8, _chunk(b"zTXt", b"x\0\0" + text)),
        "texts.png": _png(
            8,
            8,
            *[_chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(10**6))) for i in range(100)],
        ),
        "international.png": _png(8, 8, _chunk(b"iTXt", b"x\0\1\0\0\0" + text)),
        "profile.png": _png(8, 8, _chunk(b"iCCP", b"x\0\0" + text)),
        "rows.png": _png(8, 8, rows=bytes(256 << 20)),
        "no-rows.png": _png(8, 8, rows=b""),
        "length.png": _patched(_png(8, 8), 8, big),
        "depth.png": _png(8, 8, depth=99),
        "palette.png": _png(8, 8, colour=3),
        "exif.png": _png(8, 8, _chunk(b"eXIf", b"II*\0" + b"\xff" * 10**6)),
        "frames.png": _png(8, 8, _chunk(b"acTL", big + big)),
        "wide.jpg": _jpeg(65_500, 65_500),
        "flat.jpg": _jpeg(0, 0),
        "long.jpg": _jpeg(1, 65_500),
        "cut.jpg": _encoded("jpeg", 500)[:700],
        "markers.jpg": _encoded("jpeg")[:2] + b"\xff\xe1\x00\x02" * 10**6,
        "tables.jpg": b"\xff\xd8" + b"\xff\xdb\x00\x43\x00" + bytes(64),
        "wide.bmp": _patched(bmp, 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
        "upside-down.bmp": _patched(bmp, 18, struct.pack("<ii", 8, -(2**31))),
        "flat.bmp": _patched(bmp, 18, struct.pack("<ii", 0, 0)),
        "offset.bmp": _patched(bmp, 10, b"\xff" * 4),
        "colours.bmp": _patched(bmp, 46, b"\xff\xff\xff\x7f"),
        "wide.gif": _patched(gif, 6, b"\xff\xff\xff\xff"),
        "frames.gif": _frames(3000),
        "frame.gif": gif.replace(
            b",\x00\x00\x00\x00\x08\x00\x08\x00", b",\xff\xff\xff\xff\xff\xff\xff\xff"
        ),
        "wide.tif": _tiff(tiff),
        "strips.tif": _tiff([*small[:5], (273, 4, 2**31 - 1, 8), *small[6:]]),
        "samples.tif": _tiff([*small[:6], (277, 3, 1, 65535), *small[7:]]),
        "loop.tif": b"II*\0" + struct.pack("<IH", 8, 0) + struct.pack("<I", 8),
        "text.tif": _tiff([*small, (270, 2, 2**31 - 1, 8)]),
        "big.tif": b"II+\0\x08\0\0\0" + b"\xff" * 64,
        "wide.webp": _patched(webp, 21, b"\xff\xff\xff\x0f"),
        "size.webp": _patched(webp, 4, b"\xff" * 4),
        "wide.ppm": b"P6 99999999 99999999 255\n" + bytes(100),
        "digits.ppm": b"P6 " + b"9" * 10**5 + b" 1 255\n",
        "plain.ppm": b"P3 8 8 255\n" + b"1" * 10**6,
        "comment.ppm": b"P6 #" + b"x" * 10**7,
        "flat.pgm": b"P5 0 0 255\n",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nsystem\n%%EOF\n",
        "page.png": b"%PDF-1.4\n" + bytes(100),
        "drawing.png": b"<svg><image href='file:///etc/passwd'/></svg>",
        "icon.png": _encoded("ico", 32),
        "film.png": b"RIFF\xff\xff\xff\x7fAVI " + bytes(100),
        "table.png": b"SIMPLE  =                    T" + b" " * 2850,
        "device.png": b"",
        "pipe.png": b"",
        "endless.png": b"",
        "folder.png": b"",
    }
    special = {
        "device.png": lambda path: os.symlink("/dev/zero", path),
        "pipe.png": os.mkfifo,
        "endless.png": lambda path: os.symlink(path.name, path),
        "folder.png": os.mkdir,
    }
    for name, data in found.items():
        yield Stranger("picture", name, special.get(name, _writer(data)))


def _frames(count: int) -> bytes:
    one = _encoded("gif")
    start = one.index(b",")
    return one[:start] + one[start:-1] * count + b";"


# ------------------------------------------------------------------ readers


def _readers(kind: str, path: Path) -> Iterator[Callable[[], object]]:
    """The readers that open a file of a kind."""
    from eval.sets.images import FolderImages
    from eval.sets.sources import open_source
    from pipeline.assets.archives import find_files, read_bytes
    from pipeline.config.data import DataConfig
    from pipeline.data.datasets import load_images
    from pipeline.data.image_folder import read_pictures
    from pipeline.data.imagenet32 import read_batch
    from pipeline.integrity.checkpoints import read_checkpoint
    from pipeline.integrity.safe_pickle import load_batch
    from pipeline.toy2d.picture_densities import PictureDensity

    def images(name: str, place: Path) -> None:
        data = load_images(DataConfig(name=name, path=str(place), size=8))
        data.read(0, min(len(data), 100))

    def source() -> None:
        opened = open_source(path)
        if opened.images is not None:
            for _ in zip(range(3), opened.images.batches(), strict=False):
                pass

    def opened() -> None:
        from autoencoders.weights import load_weights

        load_weights(path)

    if kind == "pickle":
        from eval.features.inception_weights import read_weights

        statistics, zipped = path.with_name("x.pkl"), path.with_name("x.ckpt")
        statistics.write_bytes(path.read_bytes())
        with zipfile.ZipFile(zipped, "w") as archive:
            for name, data in {
                "x/data.pkl": path.read_bytes(),
                "x/version": b"3\n",
                "x/byteorder": b"little",
                "x/data/0": bytes(64),
            }.items():
                archive.writestr(name, data)
        yield lambda: load_batch(path)
        yield lambda: read_batch(path)
        yield lambda: read_checkpoint(path)
        yield lambda: read_checkpoint(zipped)
        yield lambda: read_weights(zipped)
        yield lambda: open_source(statistics)
    elif kind == "picture":
        (path.parent / "other.png").write_bytes(_png(8, 8))
        yield lambda: list(FolderImages(path.parent).batches())
        yield lambda: images("folder", path.parent)
        yield lambda: read_pictures([path], (3, 8, 8))
        yield lambda: PictureDensity.from_file(path)
    else:
        scratch = path.parent / "scratch"
        scratch.mkdir(exist_ok=True)
        yield source
        yield lambda: find_files(
            path, ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"], scratch
        )
        if path.suffix == ".gz":
            yield lambda: read_bytes(path)
        elif path.suffix == ".npz":
            yield lambda: images("npz", path)
            yield lambda: read_batch(path)
        elif path.suffix == ".tar":
            yield lambda: images("webdataset", path)
        elif path.suffix in (".parquet", ".arrow"):
            yield lambda: images("hf", path)
        elif path.suffix == ".safetensors":
            yield opened
            yield lambda: read_checkpoint(path)


def read_all(
    root: Path, count: int, seed: int, world: World, table: Table, say: Any = print
) -> None:
    """Make malicious files and read them; count the ends by kind.

    Args:
        root: a new folder.
        count: number of files, chosen by a seed; all if there are fewer.
        seed: of the choice.
        world: its environment is used.
        table: gets the counts.
        say: receives a line for every end that must not be.
    """
    root.mkdir(parents=True)
    canary, victim, said = root / CANARY, root / "victim", root / "said"
    victim.mkdir()
    outside = [root / "outside.png", root / "outside", Path("/tmp/jkoflow-outside.png")]
    every = list(strangers(canary))
    if count < len(every):
        every = random.Random(seed).sample(every, count)
    for number, stranger in enumerate(every):
        folder = root / f"{number}" / "files"
        folder.mkdir(parents=True)
        path = folder / stranger.name.replace(" ", "-")
        stranger.make(path)
        said.write_text("")
        before = {p for p in root.rglob("*") if not p.is_relative_to(folder)}
        env = {**world.environment, "JKOFLOW_HOME": str(folder / "home")}
        process: Any = _SERVER.Process(target=_read, args=(stranger.kind, path, env, said))
        process.start()
        process.join(60 * SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        result, reason = _judge(process.exitcode, said.read_text())
        new = {p for p in root.rglob("*") if not p.is_relative_to(folder)} - before
        if canary.exists() or not victim.is_dir():
            result = "payload ran"
            canary.unlink(missing_ok=True)
            victim.mkdir(exist_ok=True)
        elif new or any(os.path.lexists(p) for p in outside):
            result, reason = "written outside", str([*new, *outside][:4])
        table.add(stranger.kind, "files")
        table.add(stranger.kind, result)
        if result != "harmless":
            say(f"{result}: {stranger.kind} {stranger.name}: {reason}")
        shutil.rmtree(folder.parent)


def _judge(code: int | None, said: str) -> tuple[str, str]:
    lines = said.splitlines()
    if code != 0 or not lines:
        return "other end", f"exit code {code}: {said[-300:]}"
    seconds, size = (float(word) for word in lines[0].split())
    if lines[1:]:
        return "other end", lines[1][:300]
    if seconds > SECONDS:
        return "too slow", f"{seconds:.1f} s"
    if size > BYTES:
        return "too large", f"{size / 2**30:.1f} GiB"
    return "harmless", f"{seconds:.1f} s, {size / 2**20:.0f} MiB"


def _read(kind: str, path: Path, env: dict[str, str], said: Path) -> None:
    """Read a file in this child; write the slowest reader's seconds, memory, and other ends."""
    from pipeline.assets.download import DamagedError
    from pipeline.errors import JkoflowError

    os.environ.update(env)
    os.chdir(path.parent)
    torch.set_num_threads(1)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * BYTES,) * 2)  # spares the machine
    before, slowest, others = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, []
    for read in _readers(kind, path):
        begun = time.process_time()
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                read()
        except (JkoflowError, ValueError, OSError, DamagedError) as error:
            if not str(error):
                others.append(f"{type(error).__name__} without words")
        except BaseException as error:  # noqa: BLE001 - of a reader that met what it did not expect
            others.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        slowest = max(slowest, time.process_time() - begun)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    said.write_text("\n".join([f"{slowest:.2f} {grown}", *others]))
    os._exit(0)
