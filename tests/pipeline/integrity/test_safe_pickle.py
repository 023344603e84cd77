"""Pickled batches: the official ones are read, and nothing that a pickle asks for is run."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline.integrity.safe_pickle import UnsafePickleError, load_batch


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes and texts as Python 2 wrote its strings, names as numpy 1 had them."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value):
        data = value.encode("ascii") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2(value: object, path: Path) -> None:
    with open(path, "wb") as file:
        Python2(file, protocol=2).dump(value)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))


def sample() -> dict[str, object]:
    random = np.random.default_rng(0)
    return {
        "data": random.integers(0, 256, (7, 3072), np.uint8),
        "labels": [3, 1, 1000],
        "mean": random.normal(size=3072),
        "fortran": np.asfortranarray(random.integers(-9, 9, (3, 4), np.int16)),
        "big endian": np.arange(5, dtype=">i4"),
        "scalar": np.float32(0.25),
        "batch_label": "training batch 1 of 5",
        "empty": np.empty((0, 3), np.int64),
        "nothing": b"",
    }


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_all_protocols_give_the_same_arrays(tmp_path, protocol):
    (tmp_path / "b").write_bytes(pickle.dumps(sample(), protocol))
    for name, value in load_batch(tmp_path / "b").items():
        expected = sample()[name]
        if isinstance(expected, np.ndarray):
            assert value.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        assert np.array_equal(value, expected), name


def test_python_2_pickles_are_read(tmp_path):
    batch = {k: v for k, v in sample().items() if k in ("data", "labels", "mean", "batch_label")}
    python2(batch, tmp_path / "b")
    assert b"numpy.core.multiarray" in (tmp_path / "b").read_bytes()
    back = load_batch(tmp_path / "b")
    assert list(back) == list(batch)
    assert np.array_equal(back["data"], batch["data"]) and np.array_equal(
        back["mean"], batch["mean"]
    )
    assert back["labels"] == [3, 1, 1000] and back["batch_label"] == b"training batch 1 of 5"


class Call:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def evil_calls(mark: Path) -> dict[str, object]:
    code = f"open({str(mark)!r}, 'w')"
    return {
        "system": Call(os.system, f"touch {mark}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "getattr": Call(getattr, [], "append"),
        "open": Call(open, str(mark), "w"),
        "import": Call(builtins.__import__, "antigravity"),
        "numpy.load": Call(np.load, str(mark)),
        "numpy.fromfile": Call(np.fromfile, str(mark)),
        "path": Path(mark),
        "object array": np.array([Call(os.system, f"touch {mark}")], dtype=object),
        "plain object array": np.array([[1], "a"], dtype=object),
        "datetime array": np.array(["2020-01-01"], "datetime64[D]"),
        "structured array": np.zeros(2, "i4,f8"),
        "set": Call(set, [1]),
    }


@pytest.mark.parametrize("name", list(evil_calls(Path("x"))))
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_names_are_errors_and_run_no_code(tmp_path, name, protocol):
    mark = tmp_path / "it-ran"
    batch = {"data": np.zeros((1, 3072), np.uint8), "labels": [1], "extra": evil_calls(mark)[name]}
    (tmp_path / "b").write_bytes(pickle.dumps(batch, protocol))
    with pytest.raises(UnsafePickleError):
        load_batch(tmp_path / "b")
    assert not mark.exists()
    if name == "system":
        pickle.loads((tmp_path / "b").read_bytes())
        assert mark.exists(), "it would have run"


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R"
EMPTY = RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R"


@pytest.mark.parametrize(
    "attack",
    [
        RECONSTRUCT + b"}X\x05\x00\x00\x00_callK\x01sb.",  # state of a function
        RECONSTRUCT + b"N}X\x05\x00\x00\x00_callK\x01s\x86b.",  # attributes of a function
        b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.",  # references as numbers
        DTYPE + b"(K\x03X\x01\x00\x00\x00|NX\x01\x00\x00\x00a}K\x01K\x01K\x00tb.",  # fields
        DTYPE + b"(K\x03X\x01\x00\x00\x00?NNNK\x01K\x01K\x00tb.",  # a byte order
        DTYPE + b"Nb.",
        EMPTY + b".",  # an array without content
        EMPTY + b"(K\x01K\x01\x85NK\x00C\x01atb.",  # and without dtype
        EMPTY + b"(K\x01K\x02\x85" + DTYPE + b"K\x00C\x01atb.",  # two bytes of one
        EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + DTYPE + b"K\x00C\x00tb.",  # a negative side
        b"cnumpy\ndtype\nX\x10\x00\x00\x00(1000000000,)u1 \x85R.",
        RECONSTRUCT + b"cos\nsystem\nK\x00\x85C\x01b\x87R.",  # another class than ndarray
        RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x02\x85K\x03K\x00C\x02abtb.",
        b"cnumpy\nndarray\n)\x81.",
        b"cbuiltins\nbytes\nJ\x00\x00\x00\x7f\x85R.",  # two gigabytes of zeros
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x0b\x00\x00\x00punycode...\x86R.",
        b"Psome id\n.",
        b"\x82\x01.",
        b"]q\x00.",
        b"K\x01.",
        b"",
        b"\x80\x04\x95",
        b"not a pickle at all",
        b"Nr\xff\xff\xff\x7f.",  # a memo of two thousand million places
    ],
)
def test_hand_written_attacks_are_errors(tmp_path, attack):
    (tmp_path / "b").write_bytes(attack)
    with pytest.raises(UnsafePickleError):
        load_batch(tmp_path / "b")
    (tmp_path / "b").write_bytes(pickle.dumps(sample(), 4))  # and nothing has been broken by it
    assert np.array_equal(load_batch(tmp_path / "b")["data"], sample()["data"])


def test_shared_containers_are_read_once(tmp_path):
    """Otherwise 40 levels would take 2⁴⁰ steps."""
    level: list[object] = [np.arange(3)]
    for _ in range(40):
        level = [level, level]
    (tmp_path / "b").write_bytes(pickle.dumps({"data": level}, 4))
    back = load_batch(tmp_path / "b")["data"]
    for _ in range(40):
        assert back[0] is back[1]
        back = back[0]
    assert np.array_equal(back[0], np.arange(3))


def test_an_array_larger_than_its_bytes_is_an_error(tmp_path):
    data = pickle.dumps({"data": np.zeros((3, 5), np.uint8)}, 2)
    (tmp_path / "b").write_bytes(data.replace(b"K\x03K\x05\x86", b"K\x03K\xff\x86"))
    with pytest.raises(UnsafePickleError, match="15 bytes that claims another size"):
        load_batch(tmp_path / "b")
    (tmp_path / "b").write_bytes(data[:-20])
    with pytest.raises(UnsafePickleError):
        load_batch(tmp_path / "b")
