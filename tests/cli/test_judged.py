"""``bayesdiff evaluate`` and ``bayesdiff compare``, on the shipped model and on a saved pipeline with a folder of pictures."""

from __future__ import annotations

import json

import pytest

from tests.cli import invoke
from tests.cli.test_fits import images
from tests.pipelines.build import CASES


def test_the_shipped_model_is_evaluated(posterior, tmp_path):
    result = invoke(
        "evaluate", "--posterior", posterior, "--out", tmp_path, "--images", 16, "--bins", 2, "--probes", 1, "--seed", 1
    )
    assert result.exit_code == 0, result.output
    assert "log-linear, quantiles" in result.output
    assert "do not test (1)" in result.output
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["judged_on"] == 8
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["settings"]["bins"] == 2
    assert settings["settings"]["posterior"] == posterior.name
    assert (tmp_path / "calibration.png").exists()


def test_the_shipped_model_is_compared(posterior, tmp_path):
    result = invoke(
        "compare", "--posterior", posterior, "--out", tmp_path, "--images", 2, "--link", "sigmoid", "--draws", 10
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["linearized", "probit", "mc, n = 10"]
    assert "variance (1)" in result.output


def test_a_saved_pipeline_and_a_folder_of_pictures(tmp_path):
    model = tmp_path / "model"
    next(c for c in CASES if c.name == "ddim-pixels").make().save_pretrained(model)
    data, fitted = images(tmp_path / "data", n=8), tmp_path / "posterior"
    common = ("--model", model, "--data", data)
    assert invoke("fit", *common, "--out", fitted).exit_code == 0
    few = ("--timestep", 100, "--timestep", 700, "--probes", 1)
    result = invoke("evaluate", *common, "--posterior", fitted, "--out", tmp_path / "e", *few)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e" / "calibration.json").read_text())
    assert {r["t_low"] for r in found["rows"]} == {100, 700}
    result = invoke("compare", *common, "--posterior", fitted, "--out", tmp_path / "c", "--draws", 5)
    assert result.exit_code == 0, result.output
    assert str(tmp_path) not in (tmp_path / "e" / "settings.json").read_text()
    lacking = invoke("evaluate", "--model", model, "--posterior", fitted, "--out", tmp_path / "x")
    assert lacking.exit_code == 2
    assert "--data" in lacking.output
    lacking = invoke("evaluate", *common, "--out", tmp_path / "x")
    assert lacking.exit_code == 2
    assert "--posterior" in lacking.output


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("evaluate", ("--bins", 0)), ("evaluate", ("--probes", -1)), ("evaluate", ("--images", 0)), ("evaluate", ("--seed", -1)),
        ("compare", ("--link", "softmax")), ("compare", ("--draws", 1)), ("compare", ("--posterior", "nowhere")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_network_call(command, wrong, posterior, tmp_path, no_network):
    arguments = ("--posterior", posterior, *wrong) if wrong[0] != "--posterior" else wrong
    result = invoke(command, "--out", tmp_path / "x", *arguments)
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    assert result.output.startswith("error: ")
