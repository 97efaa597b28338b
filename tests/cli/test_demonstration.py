"""``bayesdiff demo``: what a map costs, and how well it agrees with an ensemble."""

from __future__ import annotations

import json

import pytest
import torch

from bayesdiff.cli.demonstration import compare
from tests.cli import invoke


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.ProjectionWarning")  # of 100 images
def test_demo(tmp_path):
    result = invoke("demo", "--out", tmp_path, "--steps", 8, "--num-tangents", 4, "--ensemble", 4, "--images", 100)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "settings.json").read_text())
    calls = record["network_calls"]
    assert calls["plain"] == 8
    assert calls["ensemble"] == 8 + 1 + 4 * 8
    assert calls["plain"] < calls["tangents"] <= 8 + 1 + 4 * 7
    assert record["images_are_the_pipes_own"] is True
    assert "bit for bit: yes" in result.output
    # The two share nothing but the posterior: agreement is not luck.
    assert record["agreement"]["correlation"] > 0.6
    assert 0.4 < record["agreement"]["ratio_of_means"] < 2
    assert record["seconds"].keys() == {"fit", "plain", "tangents", "ensemble"}
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_compare():
    reference = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert compare(3 * reference, reference) == pytest.approx({"correlation": 1.0, "ratio_of_means": 3.0})
    other = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert abs(compare(other, reference)["correlation"]) < 0.5
