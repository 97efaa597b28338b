"""Free memory, given back to the system.

The C library keeps what was freed for the next allocation. A run on duals allocates and frees tensors of many sizes at every
operation, and what is kept in between grows to several times what is in use. Where tangents are large it is given back at
every network call; where they are small, clearing new pages would cost more than it is worth.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

#: Tangents of fewer bytes than this are small.
LARGE = 2**23


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library than glibc
        return None


def give_back(size: int) -> None:
    """Give free memory back to the system, if tangents of ``size`` bytes are large."""
    trim = _trim()
    if size >= LARGE and trim is not None:
        trim(0)
