"""Errors that the command line reports in one sentence."""

from __future__ import annotations


class JkoflowError(Exception):
    """Failure that the caller could not have prevented; exit code 1."""

    exit_code = 1


class UserError(JkoflowError, ValueError):
    """Mistake of the caller in a configuration, a path or an argument; exit code 2.

    It is a ValueError in Python. The message is one plain sentence: "X is Y; expected Z; do W".
    """

    exit_code = 2
