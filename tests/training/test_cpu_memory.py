"""Memory that is freed is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from llama2_chat.cpu_memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    return [torch.ones(16 * 2**20) for _ in range(3)]  # 3 x 64 MiB
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_step_needs_no_new_pages() -> None:
    """Pages that the system had to map for five steps after ten equal ones, with the setting and without."""
    faults = {}
    for mode in ("kept", "returned"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True
        )
        faults[mode] = int(done.stdout)
    assert faults["kept"] < 100 < 1000 < faults["returned"]
