"""Where jkoflow keeps its data."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def data_root() -> Path:
    """Where assets and caches lie: `$JKOFLOW_HOME`, else the platform's cache folder."""
    home = os.environ.get("JKOFLOW_HOME")
    return Path(home).expanduser().absolute() if home else platformdirs.user_cache_path("jkoflow")
