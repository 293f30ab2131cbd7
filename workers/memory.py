"""Tell glibc's malloc to keep freed memory, for processes that allocate the same large tensors again and again.

By default blocks over 32 MiB, and often smaller ones, go back to the kernel at once and are zeroed page by page when
they are asked for again: on two cores that costs a forward pass of SmolLM2 up to 30 %.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Call once, before the first tensor. Does nothing where the C library has no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _NEVER)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_TOP_PAD, 256 * 2**20)
