"""The data root: the folder of assets and caches."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def data_root() -> Path:
    """Return the data root: `$JKOFLOW_HOME`, else the cache folder of the platform."""
    home = os.environ.get("JKOFLOW_HOME")
    return Path(home).expanduser().absolute() if home else platformdirs.user_cache_path("jkoflow")
