"""Every tiny genuine pipeline, exact responses: the plain pipe's bits, and its derivative at what it returns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines import Case
from tests.pipelines.build import CASES
from tests.pipelines.judge import measure

#: Relative error of the worst draw, float32.
BAR, BAR_WITH_KINKS = 2e-3, 5e-2


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_tangents_at_what_a_pipeline_returns_are_central_differences_of_it(case: Case) -> None:
    found = measure(case)
    assert found.same
    assert found.error <= max(BAR_WITH_KINKS if case.kinks else BAR, 2 * found.bend), found


def test_the_table_of_the_docs_has_every_pipeline() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    assert [c.name for c in CASES if f"| {c.name} |" not in page] == []
