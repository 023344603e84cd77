"""Entry point of `python -m pipeline`, `torchrun -m pipeline` and `accelerate launch -m pipeline`.

Python puts the working directory first on its path here, so that a folder `pipeline/` in it
hides this package. The script `jkoflow` has no such risk.
"""

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

#: the folder of this package and its siblings flows, autoencoders and eval
_HOME = Path(__file__).resolve().parents[1]

# `python -m` puts the working directory first, which may have folders of the siblings' names
if __name__ == "__main__" and not sys.flags.safe_path and Path(sys.path[0]).resolve() != _HOME:
    del sys.path[0]

from pipeline.runtime import signals  # noqa: E402


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    One of several processes ends without the interpreter's shutdown. Threads of PyTorch sometimes
    abort that shutdown ("terminate called without an active exception"), and the launcher then
    reports a failure although all results are written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run() -> NoReturn:
    """Run the command line and end this process; signals are handled before all imports."""
    signals.install()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # PyTorch prints stack traces of lost peers
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    leave(importlib.import_module("pipeline.cli.main").main())


if __name__ == "__main__":
    run()
