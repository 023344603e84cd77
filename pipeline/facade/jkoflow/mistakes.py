"""Mistakes of the caller are a `UserError` in Python where the command line ends with 2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from pipeline.errors import JkoflowError, UserError

P = ParamSpec("P")
R = TypeVar("R")


def user_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function whose ValueError and FileNotFoundError are a UserError; a decorator."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except JkoflowError:
            raise
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error

    return call
