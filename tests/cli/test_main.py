"""Options and mistakes: found before the first network call, told in one line."""

from __future__ import annotations

import pytest
import torch

from bayesdiff import zoo
from bayesdiff.checks import UnknownNameError
from tests.cli import invoke, run_map


def test_help_names_the_commands_and_their_options():
    assert {"fit", "map", "demo"} <= set(invoke("--help").output.split())
    text = invoke("map", "--help").output
    for option in (
        "--class",
        "--num-tangents",
        "--extra-calls",
        "--batch-invariant",
        "--recursion-samples",
        "--posterior",
    ):
        assert option in text


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--class", "snaeker"), r"got 'snaeker'; did you mean 'sneaker'?"),
        (("--class", "bag", "--class", "zebra"), "got 'zebra'"),
        (("--class", "bag", "--steps", 0), "expected --steps >= 1, got 0"),
        (("--class", "bag", "--num-samples", 0), "expected --num-samples >= 1, got 0"),
        (("--class", "bag", "--seed", -1), "expected --seed >= 0, got -1"),
        (("--class", "bag", "--scheduler", "dimm"), "got 'dimm'; did you mean 'ddim'"),
        (("--class", "bag", "--model", "fashion"), "'earth-sd3', or a folder"),
        (("--class", "bag", "--propagation", "magic"), "'ensemble', 'bayesdiff', 'bayesdiff-centered', got 'magic'"),
        (("--class", "bag", "--propagation", "ensemble", "--num-tangents", 1), "expected --num-tangents >= 2, got 1"),
        (("--class", "bag", "--structure", "round"), "got 'round'"),
        (("--class", "bag", "--covariance", "round"), "got 'round'"),
        (("--class", "bag", "--dtype", "int8"), "got 'int8'"),
        (("--class", "bag", "--device", "abacus"), "got 'abacus'"),
        (("--class", "bag", "--refresh", 0), "expected --refresh >= 1, got 0"),
    ],
)
def test_mistakes_are_one_line_and_found_first(arguments, message, tmp_path):
    out = tmp_path / "maps"
    result = invoke("map", "--out", out, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("command", [("map", "--class", "bag"), ("demo",)])
def test_a_folder_that_cannot_be_written_is_found_first(command, tmp_path):
    file = tmp_path / "file"
    file.touch()
    result = invoke(*command, "--out", file / "maps")  # nobody, root included, can make a folder below a file
    assert result.exit_code == 2
    assert result.stderr.startswith("error: expected a folder that can be written")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("no_network")
def test_posteriors_that_do_not_fit_are_found_first(tmp_path, posterior):
    result = run_map(tmp_path / "maps", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "posterior" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    pipe, _ = zoo.load("fashion-ddpm")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.1)
    pipe.save_pretrained(tmp_path / "other")
    result = run_map(tmp_path / "maps", posterior, "--model", tmp_path / "other")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_debug_shows_the_error_itself(tmp_path):
    result = invoke("map", "--class", "zebra", "--out", tmp_path, "--debug")
    assert isinstance(result.exception, UnknownNameError)
