"""The command line, run in this process on the shipped model with few steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bayesdiff import LaplacePosterior, UncertaintyPipeline, fit, zoo
from bayesdiff.checks import UnknownNameError
from bayesdiff.cli import app
from bayesdiff.cli.demonstration import compare


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    pipe, data = zoo.load("fashion-ddpm")
    folder = tmp_path_factory.mktemp("posterior")
    few = data.subset(slice(200))
    fit(pipe, few, dataset_size=data.dataset_size, generator=torch.Generator().manual_seed(0), progress=False).save(
        folder
    )
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_map(out, posterior, *more, samples=2):
    few = ("--num-samples", samples, "--steps", 3, "--num-tangents", 2)
    return invoke("map", "--class", "sneaker", "--out", out, "--posterior", posterior, *few, *more)


def test_map_writes_the_pipes_images_their_maps_and_what_was_run(tmp_path, posterior):
    result = run_map(tmp_path, posterior)
    assert result.exit_code == 0, result.output
    assert "Sneaker" in result.output

    pipe, _ = zoo.load("fashion-ddpm")
    plain = pipe("sneaker", num_inference_steps=3, generator=torch.Generator().manual_seed(1)).images[0]
    with Image.open(tmp_path / "sample-01.png") as image:
        assert image.mode == "L"
        assert np.abs(np.asarray(image).astype(int) - np.asarray(plain)).max() <= 1  # another batch rounds otherwise

    arrays = np.load(tmp_path / "std.npz", allow_pickle=False)
    assert arrays["std"].shape == (2, 1, 28, 28)
    assert arrays["std"].dtype == np.float32
    np.testing.assert_allclose(arrays["std"] ** 2 * 4, arrays["latent_variance"], rtol=1e-4)
    assert 0 < arrays["std"].mean() < 0.2

    record = json.loads((tmp_path / "settings.json").read_text())
    assert record["settings"]["steps"] == 3
    assert [s["seed"] for s in record["samples"]] == [0, 1]
    # 3 steps, and from the second on one call for each tangent at each refresh; one asks whether the network repeats itself.
    assert record["network_calls"] == {"pipe": 3, "all": 3 + 1 + 2 * 2}
    assert f"{record['network_calls']['all']} network calls" in result.output
    assert record["posterior"]["num_images"] == 200
    assert {"torch", "diffusers"} < record["environment"]["versions"].keys()
    assert str(tmp_path) not in json.dumps(record)
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_sample_does_not_depend_on_how_many_there_are(tmp_path, posterior):
    for samples, folder in ((1, "one"), (3, "three")):
        assert run_map(tmp_path / folder, posterior, samples=samples).exit_code == 0
    one, three = (np.load(tmp_path / folder / "std.npz")["std"] for folder in ("one", "three"))
    np.testing.assert_allclose(one[0], three[0], rtol=1e-2, atol=1e-5)
    assert np.abs(three[1] - three[0]).max() > 1e-3
    with Image.open(tmp_path / "one/sample-00.png") as a, Image.open(tmp_path / "three/sample-00.png") as b:
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_the_seed_moves_samples(tmp_path, posterior):
    assert run_map(tmp_path / "a", posterior, samples=2).exit_code == 0
    assert run_map(tmp_path / "b", posterior, "--seed", 1, samples=1).exit_code == 0
    with Image.open(tmp_path / "a/sample-01.png") as a, Image.open(tmp_path / "b/sample-00.png") as b:
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_arguments_reach_the_pipe(tmp_path, posterior):
    more = ("--guidance-scale", 2, "--scheduler", "ddpm", "--propagation", "ensemble", "--class", "bag")
    result = run_map(tmp_path, posterior, *more)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "settings.json").read_text())
    assert [s["class"] for s in record["samples"]] == ["Sneaker", "Bag"]
    assert record["network_calls"] == {"pipe": 3, "all": 3 + 1 + 2 * 3}
    pipe, _ = zoo.load("fashion-ddpm", scheduler="ddpm")
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    plain = pipe(["sneaker", "bag"], guidance_scale=2, num_inference_steps=3, generator=generators).images
    for i, image in enumerate(plain):
        with Image.open(tmp_path / f"sample-0{i}.png") as written:
            np.testing.assert_array_equal(np.asarray(written), np.asarray(image))


def test_a_saved_folder_is_a_model_too(tmp_path, posterior):
    zoo.load("fashion-ddpm")[0].save_pretrained(tmp_path / "saved")
    result = run_map(tmp_path / "maps", posterior, "--model", tmp_path / "saved")
    assert result.exit_code == 0, result.output
    result = invoke("map", "--class", "bag", "--model", tmp_path / "saved", "--out", tmp_path / "maps")
    assert result.exit_code == 2
    assert "--posterior" in result.stderr


@pytest.fixture
def no_network(monkeypatch):
    """Any call of a network is a failure of the test."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the network was called before the arguments were checked")

    from diffusers import UNet2DModel

    monkeypatch.setattr(UNet2DModel, "forward", forbidden)


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
        (("--class", "bag", "--model", "fashion"), "'fashion-ddpm', or a folder"),
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


def test_map_fits_and_keeps_a_posterior_that_can_be_given_again(tmp_path, monkeypatch):
    """The shard is cut, so that this takes a second."""
    load = zoo.load

    def few(*args, **kwargs):
        pipe, data = load(*args, **kwargs)
        return pipe, data.subset(slice(64))

    monkeypatch.setattr(zoo, "load", few)
    arguments = ("--num-samples", 1, "--steps", 2, "--num-tangents", 2, "--covariance", "ggn", "--structure", "diag")
    result = invoke("map", "--class", "bag", "--out", tmp_path / "a", *arguments)
    assert result.exit_code == 0, result.output
    kept = LaplacePosterior.load(tmp_path / "a" / "posterior")
    assert (kept.structure, kept.covariance, kept.num_images, kept.dataset_size) == ("diag", "ggn", 64, 60_000)
    again = invoke(
        "map", "--class", "bag", "--out", tmp_path / "b", "--posterior", tmp_path / "a/posterior", *arguments
    )
    assert again.exit_code == 0, again.output
    a, b = (np.load(tmp_path / x / "std.npz")["std"] for x in "ab")
    np.testing.assert_array_equal(a, b)
    assert UncertaintyPipeline(few("fashion-ddpm")[0], kept).posterior is kept
