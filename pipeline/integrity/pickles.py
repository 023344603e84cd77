"""An unpickler with budgets, the base of the readers of pickles of unknown origin.

A subclass binds names to stand-ins in `find_class`. This class bounds operations, seconds of
computing, copied bytes, depth, and the keys of dictionaries and sets. The hash of a nested tuple
takes time exponential in its depth.
"""

from __future__ import annotations

import pickle
import time
from typing import IO, Any

from pipeline.integrity.limits import require_size

MAX_OPCODES = 3_000_000
MAX_SECONDS = 8.0
MAX_DEPTH = 1000
MAX_KEY = 1000
_INTERVAL = 1024
_TEXT = (str, bytes, bytearray)
_BASE: Any = pickle._Unpickler  # the one in C cannot be bounded


class BudgetError(ValueError):
    """Error of a pickle that needs more work, depth or other keys than data do."""


def require_small_key(key: object) -> None:
    """Check a key of a dictionary or an element of a set, before it is hashed.

    Raises:
        BudgetError: it is a tuple with more than `MAX_KEY` parts, those of its parts included.
    """
    waiting, parts = [key], 0
    while waiting:
        parts += 1
        if parts > MAX_KEY:
            raise BudgetError(f"it has a key of more than {MAX_KEY} parts")
        part = waiting.pop()
        if isinstance(part, (tuple, frozenset)):
            waiting.extend(part)


class _Counted(dict[int, Any]):
    """Table of opcodes that counts its look-ups."""

    def __init__(self, table: dict[int, Any], unpickler: Any) -> None:  # noqa: ANN401
        super().__init__(table)
        self.unpickler, self.count = unpickler, 0
        self.deadline = time.thread_time() + MAX_SECONDS

    def __getitem__(self, opcode: int) -> Any:  # noqa: ANN401
        self.count += 1
        if self.count % _INTERVAL == 0 and time.thread_time() > self.deadline:
            raise BudgetError(f"it takes longer than {MAX_SECONDS:g} seconds")
        if self.count > MAX_OPCODES:
            raise BudgetError(f"it has more than {MAX_OPCODES} operations")
        if len(self.unpickler.metastack) > MAX_DEPTH:
            raise BudgetError(f"it is nested deeper than {MAX_DEPTH}")
        return super().__getitem__(opcode)


class BoundedUnpickler(_BASE):
    """Unpickler with budgets.

    Args:
        file: of the pickle; a `BytesIO` allocates no more than it holds.
        encoding: of the strings of Python 2.
    """

    dispatch: Any

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self.dispatch = _Counted(self.dispatch | _CHECKED, self)
        self.copied = 0

    def get_extension(self, code: int) -> None:
        """Refuse the extension registry, which looks up names of its own."""
        raise BudgetError("it uses the extension registry, which data do not need")

    def check(self, opcode: int) -> None:
        """Check the keys that the next operation hashes, and the bytes that it may copy."""
        stack = self.stack
        if opcode in (pickle.REDUCE[0], pickle.BUILD[0]):
            parts = stack[-1] if isinstance(stack[-1], tuple) else ()
            self.copied += sum(len(part) for part in parts if isinstance(part, _TEXT))
            require_size(self.copied, "the pickle")
            return
        if opcode == pickle.SETITEM[0]:
            keys = stack[-2:-1]
        else:
            keys = stack[0::2] if opcode in (pickle.SETITEMS[0], pickle.DICT[0]) else stack
        for key in keys:
            require_small_key(key)


def _checked(opcode: int) -> Any:  # noqa: ANN401
    """Return the operation of an opcode, after a check of its operands."""
    operation = _BASE.dispatch[opcode]

    def run(unpickler: BoundedUnpickler) -> None:
        unpickler.check(opcode)
        operation(unpickler)

    return run


_CHECKED = {
    code[0]: _checked(code[0])
    for code in (
        pickle.SETITEM, pickle.SETITEMS, pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET,
        pickle.REDUCE, pickle.BUILD,
    )
}  # fmt: skip
