import threading

import numpy as np
import pytest

from lmq_tasks.peak_memory import PeakMemory

MEGABYTE = 1 << 20


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
