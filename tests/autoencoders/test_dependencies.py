"""What `autoencoders` needs of its dependencies."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pytorch_lightning", "lightning"):
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocked())
import autoencoders.taming
"""


def test_taming_is_used_without_pytorch_lightning() -> None:
    """taming-transformers requires Lightning, but none of the modules used here imports it."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
