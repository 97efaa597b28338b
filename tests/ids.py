"""Names of parameters in tests."""

from __future__ import annotations

import re


def named(value: object) -> str:
    """As it is printed, without addresses: processes side by side must find the same tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
