"""`python -m pipeline`, and so `torchrun -m pipeline …` and `accelerate launch -m pipeline …`."""

import logging
import os
import sys
from typing import NoReturn

from pipeline.cli.main import main


def leave(code: int) -> NoReturn:
    """End this process; one of several without taking the interpreter down.

    There PyTorch's own threads now and then abort a process ("terminate called without an active
    exception") when all of our work is done and written, and the launcher calls that a failure.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
