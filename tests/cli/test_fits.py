"""``bayesdiff fit`` and ``map`` on saved pipelines of diffusers and a folder of pictures, as a user has them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import bayesdiff as bd
from bayesdiff import LaplacePosterior, zoo
from tests.cli import invoke
from tests.data.conftest import pictures, write
from tests.pipelines.build import CASES


def made(name):
    return next(c for c in CASES if c.name == name).make()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of ``save_pretrained`` for each name."""
    root = tmp_path_factory.mktemp("models")

    def folder(name):
        path = root / name
        if not path.exists():
            made(name).save_pretrained(path)
        return path

    return folder


def images(folder, rows=None, **kwargs):
    return write(folder, pictures(**{"n": 4, "height": 20, "width": 24, **kwargs}), rows)


TEXTS = [{"text": t} for t in ("a sea", "a coast", "an island", "ice")]
LABELS = [{"label": i} for i in (0, 2, 1, 2)]
MODELS = {
    "sd-ddim-guided": (TEXTS, ("--prompt", "a coast", "--guidance-scale", 2)),
    "sd3": (TEXTS, ("--prompt", "a coast")),
    "dit-ddim": (LABELS, ("--class", 2, "--guidance-scale", 1)),
    "ddim-pixels": (None, ("--num-samples", 2)),
}


@pytest.mark.filterwarnings("ignore:the decoder bends")  # random decoders, and posteriors of four images
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_pipeline_from_a_folder_of_pictures_to_a_map(name, saved, tmp_path):
    rows, arguments = MODELS[name]
    data = images(tmp_path / "data", rows)
    result = invoke(
        "fit", "--model", saved(name), "--data", data, "--out", tmp_path / "posterior", "--dataset-size", 100
    )
    assert result.exit_code == 0, result.output
    assert "4 images" in result.output
    names = sorted(p.name for p in (tmp_path / "posterior").iterdir())
    assert names[1:] == ["posterior.json", "settings.json"]  # and no checkpoint
    kept = LaplacePosterior.load(tmp_path / "posterior")
    assert (kept.num_images, kept.dataset_size) == (4, 100)
    own = bd.fit(
        made(name), data, dataset_size=100, batch_size=16, generator=torch.Generator().manual_seed(0), progress=False
    )
    spread = [p.deviations(64, torch.Generator().manual_seed(0)).square().mean(0) for p in (kept, own)]
    torch.testing.assert_close(*spread, rtol=1e-3, atol=1e-3 * float(spread[1].max()))
    record = json.loads((tmp_path / "posterior/settings.json").read_text())
    assert record["command"] == "fit"
    assert record["settings"]["model"] == name
    assert str(tmp_path) not in json.dumps(record)

    few = ("--steps", 3, "--num-tangents", 2, "--seed", 5)
    out = tmp_path / "maps"
    result = invoke(
        "map", "--model", saved(name), "--posterior", tmp_path / "posterior", "--out", out, *few, *arguments
    )
    assert result.exit_code == 0, result.output
    count = 2 if name == "ddim-pixels" else 1
    record = json.loads((out / "settings.json").read_text())
    assert [s["seed"] for s in record["samples"]] == list(range(5, 5 + count))
    assert record["network_calls"]["pipe"] == 3
    std = np.load(out / "std.npz")["std"]
    with Image.open(out / "sample-00.png") as image:
        assert std.shape == (count, 3, image.height, image.width)
        pixels = np.asarray(image)
    assert std.mean() > 0
    assert (out / "figure.png").stat().st_size > 5_000
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    # The very image of the pipeline.
    pipe = made(name)
    kind = {"sd-ddim-guided": {"prompt": ["a coast"], "guidance_scale": 2.0}, "sd3": {"prompt": ["a coast"]},
            "dit-ddim": {"class_labels": [2], "guidance_scale": 1.0}, "ddim-pixels": {"batch_size": 2}}[name]  # fmt: skip
    generators = [torch.Generator().manual_seed(5 + i) for i in range(count)]
    plain = pipe(num_inference_steps=3, generator=generators, **kind).images[0]
    assert np.abs(np.asarray(plain).astype(int) - pixels).max() <= 1


def test_sigkill_and_again(saved, tmp_path):
    """A real process, killed after some images; run again it goes on, and the posterior's files are the same."""
    data = images(tmp_path / "data", TEXTS * 3, n=12)
    slow = (
        "import sys, time; from diffusers import UNet2DConditionModel as U; forward = U.forward\n"
        "def slowly(self, *a, **k): time.sleep(0.2); return forward(self, *a, **k)\n"
        "U.forward = slowly\nfrom bayesdiff.cli import app; app(sys.argv[1:])"
    )

    def command(out, code="from bayesdiff.cli import app; import sys; app(sys.argv[1:])"):
        more = ["--model", saved("sd-ddim-guided"), "--data", data, "--out", tmp_path / out, "--batch-size", 1]
        return [str(a) for a in (sys.executable, "-c", code, "fit", *more, "--checkpoint-every", 0)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    index = tmp_path / "killed/checkpoint/checkpoint.json"
    with subprocess.Popen(command("killed", slow), env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if index.exists() and json.loads(index.read_text())["images"] >= 3:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL
    assert 3 <= json.loads(index.read_text())["images"] < 12
    assert not (tmp_path / "killed/posterior.json").exists()
    again = subprocess.run(command("killed"), env=environment, capture_output=True, text=True, check=True)
    assert "going on where an earlier fit was stopped" in again.stdout
    once = subprocess.run(command("once"), env=environment, capture_output=True, text=True, check=True)
    assert "going on" not in once.stdout
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / out).iterdir() if p.name.startswith("posterior")}
        for out in ("killed", "once")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 2
    assert not index.parent.exists()


def fails(result, code, message):
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


FIT = {
    "no-folder": ({"--data": "nowhere"}, "expected a folder of images"),
    "no-model": ({"--model": "nowhere"}, "there is no model_index.json"),
    "path-as-model": ({"--model": "./no/where"}, "there is no model_index.json"),
    "seed": ({"--seed": "99999999999999999999"}, "expected --seed below 2**63"),
    "draws": ({"--draws-per-image": 0}, "--draws-per-image >= 1"),
    "device": ({"--device": "meta"}, "'meta'"),
    "dtype": ({"--dtype": "int8"}, "got 'int8'"),
    "structure": ({"--structure": "round"}, "got 'round'"),
    "seconds": ({"--checkpoint-every": -1}, "seconds >= 0"),
    "size": ({"--size": 0}, "--size >= 1"),
    "larger-than-the-images": ({"--size": 64}, "smaller than 64 × 64"),
    "dataset-size": ({"--dataset-size": 3}, "dataset_size >= the 4 images"),
}


@pytest.mark.parametrize("name", FIT)
def test_mistakes_in_fit_are_one_line(name, saved, tmp_path):
    change, message = FIT[name]
    options = {"--model": saved("sd-ddim-guided"), "--data": tmp_path / "data", "--out": tmp_path / "out", **change}
    images(tmp_path / "data", TEXTS)
    fails(invoke("fit", *[v for pair in options.items() for v in pair]), 2, message)
    assert not (tmp_path / "out/posterior.json").exists()


def test_a_posterior_is_not_replaced_unasked(saved, tmp_path):
    data = images(tmp_path / "data", TEXTS)
    command = ("fit", "--model", saved("sd-ddim-guided"), "--data", data, "--out", tmp_path / "out")
    assert invoke(*command).exit_code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    fails(invoke(*command, "--seed", 1), 2, "which has one: choose another, or replace it with --overwrite")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert invoke(*command, "--seed", 1, "--overwrite").exit_code == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} & before.keys() == {"posterior.json", "settings.json"}


def test_data_that_do_not_fit_the_model(saved, tmp_path):
    out = ("--out", tmp_path / "out", "--overwrite")
    images(tmp_path / "plain")
    text, classes = ("fit", "--model", saved("sd-ddim-guided"), *out), ("fit", "--model", saved("dit-ddim"), *out)
    fails(invoke(*text, "--data", tmp_path / "plain"), 2, "expected prompts for StableDiffusionPipeline")
    assert invoke(*text, "--data", tmp_path / "plain", "--prompt", "a sea").exit_code == 0
    images(tmp_path / "labels", [{"label": i} for i in (0, 2, 1, 999_999)])
    fails(invoke(*classes, "--data", tmp_path / "labels"), 2, "expected class labels from 0 to")
    (tmp_path / "empty").mkdir()
    fails(invoke(*text, "--data", tmp_path / "empty"), 2, "expected images in")
    images(tmp_path / "bad", TEXTS)
    for i in (1, 3):
        Image.new("L", (20, 20)).save(tmp_path / f"bad/{i}.png")
    result = invoke(*text, "--data", tmp_path / "bad")
    fails(result, 2, "got 2 that cannot be: 1.png: grey")
    assert "3.png: grey" in result.stderr
    assert invoke(*text, "--data", tmp_path / "bad", "--convert").exit_code == 0


def test_folders_that_are_no_models(saved, tmp_path):
    folder = tmp_path / "broken"
    made("sd-ddim-guided").save_pretrained(folder)
    images(tmp_path / "data", TEXTS)
    more = ("--data", tmp_path / "data", "--out", tmp_path / "out")
    (folder / "unet/config.json").unlink()
    fails(invoke("fit", "--model", folder, *more), 2, "a pipeline that diffusers can load")
    (folder / "model_index.json").write_text("{")
    fails(invoke("fit", "--model", folder, *more), 2, "a pipeline that diffusers can load")
    (folder / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.42.0"}')
    fails(invoke("fit", "--model", folder, *more), 2, "a pipeline that diffusers can load")


MAP = {
    "no-prompt": ("sd-ddim-guided", (), "expected --prompt for StableDiffusionPipeline, got none"),
    "class-for-text": ("sd-ddim-guided", ("--class", 1), "got --class"),
    "both": ("sd-ddim-guided", ("--prompt", "a", "--class", 1), "got both"),
    "prompt-for-classes": ("dit-ddim", ("--prompt", "a"), "which takes no text"),
    "no-class": ("dit-ddim", (), "expected --class for DiTPipeline"),
    "class-for-nothing": ("ddim-pixels", ("--class", 1), "which has no classes"),
    "class-by-an-unknown-name": ("dit-ddim", ("--class", "zebra"), "as a number"),
    "guidance-for-nothing": ("ddim-pixels", ("--guidance-scale", 2), "expected no --guidance-scale for DDIMPipeline"),
    "steps": (
        "sd-ddim-guided",
        ("--prompt", "a", "--steps", 1001),
        "expected --steps that DDIMScheduler can take, got 1001",
    ),
    "seed": ("sd-ddim-guided", ("--prompt", "a", "--seed", 10**20), "expected --seed below 2**63"),
    "device": ("sd-ddim-guided", ("--prompt", "a", "--device", "meta"), "'meta'"),
    "extra-calls": ("sd-ddim-guided", ("--prompt", "a", "--extra-calls", "inf"), "finite and > 0, got inf"),
    "scheduler-of-a-flow": ("sd3", ("--prompt", "a", "--scheduler", "ddim"), "leave it out"),
    "video-of-an-image": ("svd", (), "expected a pipeline that draws from a prompt, a class, or nothing"),
    "no-posterior": ("sd-ddim-guided", ("--prompt", "a"), "make one with bayesdiff fit"),
}


@pytest.mark.parametrize("name", MAP)
def test_mistakes_in_map_are_one_line(name, saved, tmp_path):
    model, arguments, message = MAP[name]
    fails(invoke("map", "--model", saved(model), "--out", tmp_path / "out", *arguments), 2, message)
    assert not (tmp_path / "out").exists()


def test_the_posterior_of_another_model(saved, posterior, tmp_path):
    result = invoke(
        "map", "--model", saved("sd-ddim-guided"), "--posterior", posterior, "--prompt", "a", "--out", tmp_path / "out"
    )
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_errors_of_the_models_own_code_are_one_line_too(tmp_path, posterior, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something\nof its own")

    monkeypatch.setattr(zoo.ClassConditionalPipeline, "__call__", broken)
    arguments = ("map", "--class", "bag", "--posterior", posterior, "--out", tmp_path / "out", "--steps", 2)
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
