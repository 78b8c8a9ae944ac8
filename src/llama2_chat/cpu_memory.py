"""Memory of training and scoring on the CPU: what a step frees, the next step takes again."""

from __future__ import annotations

import ctypes

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed, instead of giving them back to the system at once.

    A training step allocates the same activations as the one before it, and memory fresh from the system is zeroed
    and mapped page by page as it is first written: with eight layers of 576 that took a sixth of a step's time. It is
    a setting of the process, known to glibc alone; what is computed is the same.

    Returns:
        Whether the C library has taken it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # Large blocks from the heap, whose top is never given back.
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
