"""Malicious pickles: calls of functions by name, and bombs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.strangers.stranger import Stranger, writer


class _Call:
    """An object whose pickle calls a function by name."""

    def __init__(self, function: Any, *words: Any) -> None:
        self.call = function, words

    def __reduce__(self) -> Any:
        return self.call


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def pickles(canary: Path) -> Iterator[Stranger]:
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
            yield Stranger("pickle", f"{name} {how}", writer(data))
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
        yield Stranger("pickle", name, writer(data))
