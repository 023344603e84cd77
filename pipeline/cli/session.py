"""Functions that several commands share: error messages, settings and the accelerator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from pipeline.errors import JkoflowError
from pipeline.runtime.signals import SENTENCE


def explain(error: Exception) -> tuple[str, int]:
    """Describe an error in one sentence; return it with the exit code 2 (user error) or 1."""
    if isinstance(error, typer.Abort):
        return SENTENCE, 130
    if type(error).__name__ == "NoArgsIsHelpError":
        return "no command given; see --help", 2
    if hasattr(error, "format_message"):  # errors of typer, from its own copy of click or another
        return f"{error.format_message()}; see --help", 2
    if isinstance(error, JkoflowError):
        return str(error), error.exit_code
    if isinstance(error, (ValueError, FileNotFoundError)):
        return str(error), 2
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}", 1
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def fail(message: str, code: int) -> int:
    """Print an error as the last line of stderr and return the exit code."""
    sentence = " ".join(message.split())
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return code


def load_settings(config: str, overrides: list[str] | None) -> Any:  # noqa: ANN401 - imported late
    """Load a configuration with overrides."""
    from pipeline.config.load import load_config

    return load_config(config, overrides or [])


def override_settings(config: Any, overrides: list[str] | None, sections: Sequence[str]) -> Any:  # noqa: ANN401
    """Return a configuration with overrides of the given sections or keys."""
    from pipeline.config.load import overridden

    return overridden(config, overrides or [], sections)


def replace_in_section(config: Any, section: str, **values: Any) -> Any:  # noqa: ANN401
    """Return a configuration with new values in a section; None keeps the old value."""
    import dataclasses

    changed = replace_given(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})


def replace_given(settings: Any, **values: Any) -> Any:  # noqa: ANN401
    """Return settings with new values; None keeps the old value."""
    import dataclasses

    given = {key: value for key, value in values.items() if value is not None}
    return dataclasses.replace(settings, **given)


def make_accelerator() -> Any:  # noqa: ANN401 - imported late, so that --help is quick
    """Return the accelerator: the device and the ranks of this process.

    `accelerate launch` starts several processes on GPUs, but only one on a CPU. On CPUs,
    `torchrun` starts them, and `cpu=True` makes accelerate join their process group.
    """
    import os
    import warnings

    import torch
    from accelerate import Accelerator

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(cpu=True) if several and not torch.cuda.is_available() else Accelerator()
