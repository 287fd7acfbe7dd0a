"""Freed memory is kept by the process: a stage allocates tensors of the same sizes again and again.

glibc gives memory back to the kernel as soon as it is free: every tensor of more than 128 KiB at first, and the top of
its heap later. The kernel then clears each page anew before the next tensor has it, which took a third of the time of
stages with many small tensors on some machines.
"""

from __future__ import annotations

import ctypes
import functools

LARGEST_KEPT_BYTES = 32 << 20
"""Tensors up to this size come from the heap; glibc allows no more. Larger ones go back to the kernel when freed."""

KEPT_FREE_BYTES = 256 << 20
"""Free memory at the top of the heap from which on it is given back."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the C library, once per process, to keep up to 256 MB of freed memory. False where it cannot be told."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Windows; macOS
        return False
    heap_used = set_option(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    heap_kept = set_option(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
    return bool(heap_used and heap_kept)
