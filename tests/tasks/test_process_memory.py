import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lmq_tasks.process_memory import PeakMemory, give_back_freed_memory, keep_freed_memory

MEGABYTE = 1 << 20

PROGRAM = """
import resource, runpy, sys

if sys.argv[1] == "keep":
    assert runpy.run_path("tasks/process_memory.py")["keep_freed_memory"]()

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_memory_that_is_free_between_what_is_in_use_is_given_back() -> None:
    keep_freed_memory()
    blocks = [bytearray(b"1" * MEGABYTE) for _ in range(400)]
    kept = blocks[::4]
    del blocks
    before = resident_bytes()
    give_back_freed_memory()
    assert before - resident_bytes() > 200 * MEGABYTE
    assert all(block[-1] == ord("1") for block in kept)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_peak_of_a_stage_alone_is_its_own():
    with PeakMemory() as before:
        first = before.read()
    if first is None:
        pytest.skip("this system does not set its high-water mark back")
    with PeakMemory() as memory:
        held = np.ones(300 * MEGABYTE, dtype=np.uint8)
        assert held.any()
        del held
        high = memory.read()
    with PeakMemory() as after:
        low = after.read()
    assert high - first > 250 * MEGABYTE
    assert high - low > 250 * MEGABYTE


def test_nothing_is_known_of_stages_that_share_a_process():
    inside, finished = threading.Event(), threading.Event()
    found = []

    def other() -> None:
        with PeakMemory() as memory:
            inside.set()
            finished.wait(60)
            found.append(memory.read())

    thread = threading.Thread(target=other)
    with PeakMemory() as memory:
        thread.start()
        assert inside.wait(60)
        assert memory.read() is None
    finished.set()
    thread.join(60)
    assert found == [None]
