"""The reason of an error in a message of another one."""

from __future__ import annotations

#: characters of a reason, which may quote the content of a damaged file
_LONGEST = 300


def reason_of(error: BaseException) -> str:
    """Return the message of an error on one line, cut to 300 characters; else its type's name."""
    text = " ".join(str(error).split())
    return f"{text[:_LONGEST]}…" if len(text) > _LONGEST else text or type(error).__name__
