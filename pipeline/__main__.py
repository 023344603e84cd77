"""`python -m pipeline`, and so `accelerate launch -m pipeline …`."""

import sys

from pipeline.cli import main

sys.exit(main())
