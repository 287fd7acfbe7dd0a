import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, runpy, sys

if sys.argv[1] == "keep":
    assert runpy.run_path("tasks/freed_memory.py")["keep_freed_memory"]()

def allocate():
    buffers = [bytearray(24 << 20) for _ in range(4)]

for _ in range(2):
    allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(way: str) -> int:
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_memory_is_allocated_again_without_the_kernel_clearing_pages() -> None:
    kept, usual = page_faults("keep"), page_faults("leave")
    assert kept < usual / 10, (kept, usual)
