"""glibc keeps memory that torch frees, instead of giving it back and faulting it in again each step."""

from __future__ import annotations

import ctypes

# parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap and never trim it; return whether the C library took it.

    A training step on the CPU frees and takes the same activations again. By default glibc serves
    them by ``mmap``, so every step page-faults them anew (``benchmarks/training_step.py`` shows the cost).
    Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    largest = 2**31 - 1
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, largest), mallopt(_M_TOP_PAD, 256 << 20)])
