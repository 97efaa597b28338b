"""The cost experiment, small."""

from __future__ import annotations

import json

import pytest

from experiments.cost import __main__ as cost


@pytest.mark.filterwarnings("ignore:the network's response is not well known")
def test_cost_times_a_map_against_the_images_alone(tmp_path, monkeypatch, shipped):
    monkeypatch.setattr(cost, "fitted", lambda seed: shipped[1])
    cost.main(samples=1, steps=4, draws=[4], out=tmp_path)
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["calls_ratio"] > 1
    assert row["overhead"] == pytest.approx(row["seconds"] / row["plain"] / row["calls_ratio"])
