"""Entry point of `python -m jkoflow`, `torchrun -m jkoflow` and `accelerate launch -m jkoflow`."""

import sys
from pathlib import Path

# `python -m` puts the working directory first, which may have folders of the packages' names
if not sys.flags.safe_path and sys.path and not (Path(sys.path[0]) / "pipeline/facade").is_dir():
    del sys.path[0]

from pipeline.__main__ import run  # noqa: E402

if __name__ == "__main__":
    run()
