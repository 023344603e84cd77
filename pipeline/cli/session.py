"""What the verbs of the command line share: words, bars, errors, and configurations.

Heavy imports happen inside the functions, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from pipeline.errors import JkoflowError

INTERRUPTED = (
    "interrupted; what was finished is kept, run the same command again (train: with --resume)"
)


def explain(error: Exception) -> tuple[str, int]:
    """One sentence about any error, and the exit code: 2 for the caller's mistake, 1 else."""
    if isinstance(error, typer.Abort):
        return INTERRUPTED, 1
    if hasattr(error, "format_message"):  # typer's own errors, of whichever click it carries
        return f"{error.format_message() or 'no command given'}; see --help", 2
    if isinstance(error, JkoflowError):
        return str(error), error.exit_code
    if isinstance(error, (ValueError, FileNotFoundError)):
        return str(error), 2
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}", 1
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def fail(message: str, code: int) -> int:
    """Print the last line of stderr; returns the exit code."""
    sentence = " ".join(message.split())
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return code


def load(config: str, overrides: list[str] | None) -> Any:  # noqa: ANN401 - imported late
    """A configuration with its overrides."""
    from pipeline.config.load import load_config

    return load_config(config, overrides or [])


def override(config: Any, overrides: list[str] | None, sections: Sequence[str]) -> Any:  # noqa: ANN401
    """A run's configuration with overrides of some of its sections."""
    from pipeline.config.load import overridden

    return overridden(config, overrides or [], sections)


def with_section(config: Any, section: str, **values: Any) -> Any:  # noqa: ANN401
    """The configuration with new values in a section; None leaves a value as it is."""
    import dataclasses

    changed = replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})


def replace(settings: Any, **values: Any) -> Any:  # noqa: ANN401
    """A section with new values; None leaves a value as it is."""
    import dataclasses

    given = {key: value for key, value in values.items() if value is not None}
    return dataclasses.replace(settings, **given)


def make_accelerator() -> Any:  # noqa: ANN401 - imported late, so that --help is quick
    """Device and processes, as accelerate finds them.

    `accelerate launch` starts several processes on GPUs, but only one on a CPU; there torchrun
    starts them, and accelerate is told that they belong together.
    """
    import os
    import warnings

    import torch
    from accelerate import Accelerator

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(cpu=True) if several and not torch.cuda.is_available() else Accelerator()
