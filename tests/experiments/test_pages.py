"""Tables of the pages are those of the results files that lie beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import evidence, readme
from experiments.calibration import tables
from experiments.pages import MARKED, NOT_RUN, written

ROOT = Path(__file__).parents[2]
WRITERS = {
    **dict.fromkeys(evidence.PAGES, evidence.TABLES),
    **dict.fromkeys(readme.PAGES, readme.TABLES),
    tables.PAGE: tables.TABLES,
}


@pytest.mark.parametrize("page", WRITERS, ids=str)
def test_a_page_has_the_figures_of_the_results(page, monkeypatch):
    monkeypatch.setattr("experiments.common.RESULTS", ROOT / "experiments/results")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert MARKED.search(text)
    assert written(text, WRITERS[page]) == text


@pytest.mark.parametrize("page", WRITERS, ids=str)
def test_a_table_that_is_not_run_yet_says_so(page, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.common.RESULTS", tmp_path)
    assert NOT_RUN in written((ROOT / page).read_text(encoding="utf-8"), WRITERS[page])
