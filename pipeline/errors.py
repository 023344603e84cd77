"""The two kinds of failure that the command line reports."""

from __future__ import annotations


class JkoflowError(Exception):
    """Something went wrong that the caller could not have prevented; exit code 1."""

    exit_code = 1


class UserError(JkoflowError):
    """The caller's mistake (a config, a path, an argument); exit code 2.

    The message is one plain sentence: what was expected, what was found, what to do.
    """

    exit_code = 2
