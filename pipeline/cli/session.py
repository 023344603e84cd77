"""Functions that several commands share: error messages, settings and the accelerator."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, NoReturn

import typer

from pipeline.errors import JkoflowError
from pipeline.runtime import heartbeat
from pipeline.runtime.signals import SENTENCE

_DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:N or mps. Default: the best of this machine."),
]
#: the end of click's message about a word that it does not know
_SUGGESTION = re.compile(r"\.? Did you mean (.*)\?$")
#: the value of `--device` of the command that runs
_device: ContextVar[str | None] = ContextVar("device", default=None)


def explain(error: Exception) -> tuple[str, int]:
    """Describe an error in one sentence; return it with the exit code 2 (user error) or 1."""
    if isinstance(error, typer.Abort):
        return SENTENCE, 130
    if type(error).__name__ == "NoArgsIsHelpError":
        return "no command given; see --help", 2
    if hasattr(error, "format_message"):  # errors of typer, from its own copy of click or another
        message = _SUGGESTION.sub(r" (did you mean \1?)", error.format_message().rstrip("."))
        return f"{message}; see --help", 2
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


def fail_once(message: str, code: int) -> int:
    """Print an error on one of several processes, end the others too, and return the exit code."""
    if heartbeat.claims_error():
        fail(message, code)
    heartbeat.leave(message, code)
    return code


def discard_temporaries() -> None:
    """Remove the files and locks of this process, as far as it has imported their modules."""
    for name, function in (("atomic", "discard_temporaries"), ("lock", "release_all")):
        module = sys.modules.get(f"pipeline.storage.{name}")
        if module is not None:
            getattr(module, function)()


def end_process(message: str, code: int) -> NoReturn:
    """End this process, from any thread, because another rank has died or failed."""
    with contextlib.suppress(OSError):
        discard_temporaries()
    fail_once(message, code)
    os._exit(code)


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


def make_accelerator(device: str | None = None, shards: bool = False) -> Any:  # noqa: ANN401
    """Return the accelerator on a device, or on that of `--device`; ranks watch each other.

    Args:
        device: None is that of `--device`.
        shards: whether the command trains a network that the ranks may share by FSDP.
    """
    from pipeline.runtime import devices

    accelerator = devices.make_accelerator(device or _device.get(), shards)
    heartbeat.start(accelerator.process_index, accelerator.num_processes, end_process)
    return accelerator


def on_device(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the option `--device`, which `make_accelerator` follows."""

    @functools.wraps(command)
    def run(*, device: str | None = None, **options: Any) -> None:  # noqa: ANN401
        if device is not None:  # a mistake is an error of every command, used or not
            from pipeline.runtime.devices import require_device

            require_device(device)
        token = _device.set(device)
        try:
            command(**options)
        finally:
            _device.reset(token)

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter(
        "device", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_DeviceOption
    )
    parameters = [*signature.parameters.values(), option]
    setattr(run, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
