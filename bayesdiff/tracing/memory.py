"""Free memory, given back to the system.

The C library keeps what was freed for the next allocation. A run on duals allocates and frees tensors of many sizes at every
operation, and what is kept in between grows to several times what is in use. What the next step takes again is better kept,
since clearing new pages costs as much as the arithmetic on them; what goes beyond some bytes is given back.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

#: Tangents of fewer bytes than this are small.
LARGE = 2**23
#: So many bytes are kept for the next step.
HELD = 2**27
#: Of small tensors: after so many network calls of a run, what goes beyond so many bytes is given back.
CALLS, LEFT = 32, 2**23
#: Where Linux says how many pages are resident, its second number.
RESIDENT = Path("/proc/self/statm")

_after = 0  # bytes that were resident when memory was last given back, or fewer


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim if RESIDENT.exists() else None
    except (OSError, AttributeError, TypeError):  # another C library than glibc
        return None


def _resident() -> int:
    return int(RESIDENT.read_text().split()[1]) * mmap.PAGESIZE


def give_back(size: int, held: int = HELD) -> None:
    """Give free memory back to the system, if tangents of ``size`` bytes are large, and it may be more than ``held`` bytes."""
    global _after
    trim = _trim()
    if size < LARGE or trim is None:
        return
    _after = min(_after, _resident())
    if _resident() > _after + held:
        trim(0)
        _after = _resident()


def tidy(call: int) -> None:
    """Give free memory back every :data:`CALLS` network calls.

    What a run keeps of each call is small and lies between what the call freed, whose pages a long run would collect: in 1,000
    steps of a small network three times what it keeps.
    """
    if call % CALLS == 0:
        give_back(LARGE, LEFT)
