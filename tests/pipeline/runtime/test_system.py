"""What freed memory does to the process, before and after `keep_freed_memory`."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import torch
from pipeline.runtime.system import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def given_back():
    tensors = [torch.ones(2**18) for _ in range(100)]  # 1 MiB each
    most = resident()
    del tensors
    return most - resident()

print(given_back(), keep_freed_memory(), given_back())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept(pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, cwd=pytestconfig.rootpath
    )
    assert done.returncode == 0, done.stderr
    before, took, after = done.stdout.split()
    assert took == "True"
    assert float(before) > 50
    assert abs(float(after)) < 5
