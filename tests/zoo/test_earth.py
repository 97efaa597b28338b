"""The text-to-image models of the zoo: they load, follow their prompts, and were not trained on what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image

from bayesdiff import zoo
from bayesdiff.checks import ShapeError, UnsupportedSchedulerError

pytest.importorskip("transformers")

NAMES = ("earth-sd", "earth-sd3")
FOLDER = Path(zoo.__file__).parent
MIB = 2**20


@pytest.fixture(scope="module", params=NAMES)
def earth(request):
    return request.param, *zoo.load(request.param)


def sample(pipe, prompts, scale, steps=12, seed=0):
    """(B, H, W, 3) in [0, 1]."""
    extra = {"max_sequence_length": 24} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(
        prompts, guidance_scale=scale, num_inference_steps=steps, generator=generators, output_type="np", **extra
    ).images


def test_genuine_pipelines_in_the_asked_dtype(earth):
    name, pipe, data = earth
    assert type(pipe) is {"earth-sd": StableDiffusionPipeline, "earth-sd3": StableDiffusion3Pipeline}[name]
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    assert len(modules) == {"earth-sd": 3, "earth-sd3": 5}[name]
    for module in modules:
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    training = json.loads((FOLDER / name.replace("-", "_") / "training.json").read_text())
    assert data.dataset_size == training["dataset_size"] == 8192
    assert data.training_draws == training["steps"] * training["batch_size"] / 8192


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_samples_follow_their_prompts(earth, scale):
    """Colours that anyone would expect: sea is blue, desert is red and bright, ice is white, forest is dark green."""
    _, pipe, _ = earth
    words = [
        "open sea in the tropics",
        "desert in the tropics",
        "ice and snow in the polar south",
        "forest in the tropics",
    ]
    images = sample(pipe, [word for word in words for _ in range(3)], scale)
    sea, desert, ice, forest = images.reshape(4, -1, 3).mean(1)
    assert sea[2] > 2 * sea[0]
    assert sea.mean() < 0.3
    assert desert[0] > desert[2] + 0.1
    assert desert.mean() > 0.35
    assert ice.min() > (0.5 if scale == 1 else 0.75)  # without guidance snow is patchy, as in many of its pictures
    assert ice.max() - ice.min() < 0.1
    assert forest[1] > max(forest[0], forest[2])
    assert forest.mean() < 0.35


def test_a_saved_pipeline_is_the_same(earth, tmp_path):
    _, pipe, _ = earth
    pipe.save_pretrained(tmp_path)
    again = zoo.load_text_pipeline(tmp_path)
    assert type(again) is type(pipe)
    prompts = ["an island in the sea"]
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            same = getattr(again, name).state_dict()
            assert all(value.equal(same[key]) for key, value in module.state_dict().items())
    assert np.allclose(sample(pipe, prompts, 3.0, steps=3), sample(again, prompts, 3.0, steps=3), atol=1e-5)


def test_the_vae_keeps_held_out_images(earth):
    """To 1/20 of the range on average; and latents have the second moment of the noise."""
    _, pipe, data = earth
    x = data.heldout.images[:64]
    with torch.no_grad():
        z = pipe.vae.encode(x).latent_dist.mean
        y = pipe.vae.decode(z).sample
    assert (y - x).abs().mean() / 2 < 0.05
    scaled = (z - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor
    assert scaled.square().mean() == pytest.approx(1.0, abs=0.3)


def test_no_file_is_too_large(earth):
    name, _, _ = earth
    folders = [FOLDER / name.replace("-", "_"), FOLDER / "earth_data"]
    sizes = [file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert max(sizes) < 16 * MIB
    assert sum(sizes) < 40 * MIB


def test_held_out_longitudes_were_not_trained_on():
    """Columns of pixels, 15 to a degree: the bands are disjoint from every training patch, not only from the shard's."""
    _, data = zoo.load("earth-sd")
    bands = json.loads((FOLDER / "earth_data" / "captions.json").read_text())["heldout_longitudes"]

    def columns(part):
        return {x + i for x in part.places[:, 1].tolist() for i in range(64)}

    inside = {x for x in range(5400) for west, east in bands if west <= x / 15 - 180 < east}
    assert columns(data.heldout) <= inside
    assert not columns(data) & inside
    assert (data.num_images, data.heldout.num_images) == (512, 512)
    for part in (data, data.heldout):
        assert part.images.shape[1:] == (3, 64, 64)
        assert part.images.dtype == torch.float32
        assert part.images.min() >= -1
        assert part.images.max() <= 1
        # Few patches are nothing but sea.
        assert sum("open sea" in prompt for prompt in part.prompts) < 0.12 * part.num_images


def test_prompts_and_images_belong_together():
    _, data = zoo.load("earth-sd")
    mean = data.images.mean((2, 3))
    blue = mean[:, 2] - mean[:, 0]
    sea = torch.tensor(["open sea" in prompt for prompt in data.prompts])
    desert = torch.tensor(["desert" in prompt and "sea" not in prompt for prompt in data.prompts])
    assert blue[sea].min() > blue[desert].max()
    part = data.subset(desert)
    assert dict(part).keys() == {"images", "prompts"}
    assert part.num_images == len(part.prompts) == len(part.places) == int(desert.sum())
    assert all("desert" in prompt for prompt in part["prompts"])
    assert part.heldout is data.heldout
    with pytest.raises(KeyError, match="images"):
        data["captions"]
    with pytest.raises(ShapeError, match="3 and"):
        zoo.PromptImages(data.images[:2], data.prompts[:3], data.places[:3], 10)


def test_an_image_folder_holds_the_very_images(tmp_path):
    _, data = zoo.load("earth-sd")
    part = data.subset(slice(5, 8))
    part.write_folder(tmp_path / "images")
    rows = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == part.prompts
    pixels = np.stack([np.asarray(Image.open(tmp_path / "images" / row["file_name"])) for row in rows])
    assert torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).equal(part.images)


def test_scheduler_by_name():
    pipe, _ = zoo.load("earth-sd", scheduler="dpm++")
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(UnsupportedSchedulerError, match="FlowMatchEulerDiscreteScheduler, got 'ddim'"):
        zoo.load("earth-sd3", scheduler="ddim")


def test_missing_files_say_where_they_are(monkeypatch):
    monkeypatch.setitem(zoo._FOLDERS, "earth-sd", "elsewhere")
    with pytest.raises(zoo.ModelFilesError, match="too large for the installed package"):
        zoo.load("earth-sd")
