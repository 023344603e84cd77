"""Plug-ins: installed packages that register their own networks, autoencoders or data sets.

A package names a module in the entry-point group `jkoflow.plugins`. The import of the module calls
`jkoflow.register`. Plug-ins are loaded once, before the first configuration is read.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from pipeline.errors import UserError

GROUP = "jkoflow.plugins"


@cache
def load_plugins() -> tuple[str, ...]:
    """Import all plug-ins, and return their names.

    Raises:
        UserError: a plug-in raises an error at its import.
    """
    names = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            entry.load()
        except Exception as error:
            raise UserError(
                f"the plug-in {entry.name} ({entry.value}) could not be imported "
                f"({type(error).__name__}: {error}); repair or uninstall its package"
            ) from error
        names.append(entry.name)
    return tuple(names)
