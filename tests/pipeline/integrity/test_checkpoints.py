"""Checkpoints as data: whatever a pickle asks for, nothing of it is run."""

from __future__ import annotations

import builtins
import collections
import copyreg
import functools
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.integrity.checkpoints import Inert, read_checkpoint

#: what ran, told by functions of this file that a payload calls
RAN: list[str] = []


def touch(what: str = "called", *_: object, **__: object) -> str:
    RAN.append(what)
    return what


class Payload:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class WithState:
    """Pickles as itself; its state, its creation and its filling each say when they run."""

    def __new__(cls, *_: object) -> WithState:
        touch("new")
        return super().__new__(cls)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return (copyreg.__newobj__, (WithState,), {"a": 1}, iter([1]), iter([("k", 2)]))

    def __setstate__(self, state: object) -> None:
        touch("setstate")

    def append(self, item: object) -> None:
        touch("append")

    def __setitem__(self, key: object, value: object) -> None:
        touch("setitem")


def payloads(marker: Path) -> dict[str, object]:
    """Objects whose pickles do something when they are trusted."""
    shell = f"echo ran > {marker}"
    source = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, shell),
        "eval": Payload(builtins.eval, source),
        "exec": Payload(builtins.exec, source),
        "open": Payload(builtins.open, str(marker), "w"),
        "subprocess": Payload(subprocess.call, shell, ),
        "import": Payload(builtins.__import__, "antigravity"),
        "nested reduce": Payload(touch, Payload(touch, Payload(os.system, shell))),
        "getattr chain": Payload(Payload(getattr, Payload(getattr, os, "path"), "exists"), "x"),
        "partial": Payload(functools.partial, touch, "partial"),
        "own function": Payload(touch, "own"),
        "map": Payload(collections.deque, Payload(map, touch, ["map"])),
        "torch.load": Payload(torch.load, str(marker)),
        "torch.save": Payload(torch.save, 1, str(marker)),
        "torch.hub": Payload(torch.hub.load, "someone/something", "model"),
        "state": WithState(),
    }  # fmt: skip


NAMES = [n for n in payloads(Path("x")) if n != "getattr chain"]
#: torch refuses names of these modules; all others are inert, and the tensors are still read
REFUSED = {"os.system", "nested reduce", "state"}


def write(path: Path, value: object, form: str) -> Path:
    content = {"state_dict": {"encoder.weight": torch.arange(6.0)}, "extra": value}
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compress: bool = False) -> None:
    """Write a zip checkpoint again with its entries changed."""
    with zipfile.ZipFile(path) as old:
        entries = {n: old.read(n) for n in old.namelist()}
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as new:
        for name, data in entries.items():
            new.writestr(name, change(name, data))


@pytest.fixture(autouse=True)
def nothing_ran_before() -> None:
    RAN.clear()


@pytest.mark.parametrize("form", ["zip", "stream"])
@pytest.mark.parametrize("name", NAMES)
def test_a_payload_never_runs(tmp_path: Path, name: str, form: str) -> None:
    marker = tmp_path / "marker"
    path = write(tmp_path / "bad.ckpt", payloads(marker)[name], form)
    RAN.clear()
    if name in REFUSED:
        with pytest.raises(ValueError, match="cannot be used"):
            read_checkpoint(path)
    else:
        assert torch.equal(read_checkpoint(path)["encoder.weight"], torch.arange(6.0))
    assert not RAN and not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "own function", "partial", "state"])
def test_the_payloads_do_run_when_they_are_trusted(tmp_path: Path, name: str) -> None:
    # the control of the test above: what it shows to be inert is live ammunition
    marker = tmp_path / "marker"
    data = pickle.dumps(payloads(marker)[name])
    RAN.clear()
    value = pickle.loads(data)
    if name == "partial":
        value()
    assert RAN or marker.exists()


RAW = {
    "names from the memo": (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x01x\x85R."
    ),
    "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0ceval.__call__\x93\x8c\x011\x85R.",
    "instance opcode": b"(Vx\nios\nsystem\n.",
    "object opcode": b"(cos\nsystem\nVx\no.",
    "system of os": b"cos\nsystem\n(X\x01\x00\x00\x00xtR.",
    "extension": b"\x80\x02\x82\x01.",
    "memory": b"Nr\xff\xff\xff\x7f.",
    "attribute of a class": b"cx\ny\n}X\x03\x00\x00\x00getNsb.",
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_handmade_opcodes_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.zeros(5)}, path)
    rewrite(path, lambda entry, data: RAW[name] if entry.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="cannot be used|holds no dictionary"):
        read_checkpoint(path)
    assert not hasattr(Inert, "get")


def test_names_are_bound_for_one_file_only(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(write(tmp_path / "x.ckpt", Payload(touch, "own"), "zip"))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("form", ["zip", "stream"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)  # fmt: skip
def test_tensors_come_out_as_torch_itself_reads_them(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    base = (torch.arange(24.0) % 7).to(dtype).reshape(4, 6)
    tensors = {
        "plain": base.clone(), "view": base[1:3, ::2], "transposed": base.t(), "same": base,
        "scalar": base[2, 3], "empty": base[:0], "parameter": torch.nn.Parameter(
            base.clone(), requires_grad=False),
    }  # fmt: skip
    path = tmp_path / "x.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    expected, actual = torch.load(path, weights_only=True), read_checkpoint(path)
    assert set(actual) == set(tensors)
    for name, tensor in expected.items():
        assert actual[name].dtype == dtype and torch.equal(actual[name], tensor.detach())


def test_a_defaultdict_beside_the_weights_is_read(tmp_path: Path) -> None:
    value = collections.defaultdict(list, {"a": 1})
    path = write(tmp_path / "x.ckpt", value, "zip")
    assert torch.equal(read_checkpoint(path)["encoder.weight"], torch.arange(6.0))


@pytest.mark.parametrize("form", ["zip", "stream", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_file_that_is_cut_off(tmp_path: Path, form: str, share: float) -> None:
    path = tmp_path / "x.ckpt"
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(5000)}, path)
    else:
        torch.save({"w": torch.zeros(5000)}, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="x.ckpt cannot be used"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "compress", "words"),
    [
        (lambda n, d: d, True, "is compressed"),  # a small file could unfold to any size
        (lambda n, d: b"" if n.endswith("data.pkl") else d, False, "cannot be used"),
        (lambda n, d: b"N." if n.endswith("data.pkl") else d, False, "no dictionary of tensors"),
    ],
)
def test_an_archive_that_was_tampered_with(
    tmp_path: Path, change: Callable[[str, bytes], bytes], compress: bool, words: str
) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.zeros(50)}, path)
    rewrite(path, change, compress)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is no checkpoint",
        pickle.dumps({"a": 1}),
        struct.pack("<Q", 1 << 40) + b"{",
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be used .*expected a safetensors file or"):
        read_checkpoint(path)


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match="cannot be used"):
        read_checkpoint(path)
