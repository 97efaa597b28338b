"""Tables of the documentation, made from the results files.

What stands between ``<!-- table: KIND-of-WHAT -->`` and ``<!-- end -->`` in a page is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from experiments import common

MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_RUN = "Not run yet.\n"


def read(path: str) -> dict[str, Any] | None:
    """The results file of an experiment, or None where there is none yet."""
    file = common.RESULTS / path / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written(page: str, tables: Mapping[str, Callable[[str], str]]) -> str:
    """A page with its tables made anew; each kind of table is told what it is of."""

    def table(match: re.Match[str]) -> str:
        kind, _, what = match[2].partition("-of-")
        return match[1] + tables[kind](what) + match[3]

    return MARKED.sub(table, page)
