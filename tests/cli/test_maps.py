"""``bayesdiff map``: the pipe's own images, their maps, and a record of what was run."""

from __future__ import annotations

import json

import numpy as np
import torch
from PIL import Image

from bayesdiff import LaplacePosterior, UncertaintyPipeline, zoo
from tests.cli import invoke, run_map


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
