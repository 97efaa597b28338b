"""The distilled few-step model of the zoo: four steps of it are worth many of its teacher's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bayesdiff import zoo

FOLDER = Path(zoo.__file__).parent


@pytest.fixture(scope="module")
def student():
    return zoo.load("fashion-4step")


def test_it_is_the_teachers_class_and_data_and_its_own_count_of_draws(student):
    pipe, data = student
    _, teachers = zoo.load("fashion-ddpm")
    assert type(pipe) is zoo.ClassConditionalPipeline
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert data.images.equal(teachers.images)
    training = json.loads((FOLDER / "fashion_4step" / "training.json").read_text())
    assert data.dataset_size == training["dataset_size"] == 8192
    assert data.training_draws == pytest.approx(training["steps"] * training["batch_size"] / 8192)
    assert (teachers.dataset_size, teachers.training_draws) == (60_000, pytest.approx(8000 * 64 / 60_000))
    assert data.subset([0]).training_draws == data.training_draws


def test_four_steps_are_nearer_to_many_than_the_teachers_four(student):
    """From the same noise, in the root mean square over pixels."""
    pipe, _ = student
    teacher, _ = zoo.load("fashion-ddpm")
    teacher.scheduler = zoo.build_scheduler("ddim", dict(teacher.scheduler.config) | {"timestep_spacing": "trailing"})
    noise = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(1))

    def sample(model, steps):
        classes = [i % 10 for i in range(20)]
        return model(classes, num_inference_steps=steps, latents=noise, output_type="pt").images

    fine = sample(teacher, 50)
    ours, theirs = ((sample(model, 4) - fine).square().mean().sqrt() for model in (pipe, teacher))
    assert ours < 0.95 * theirs


def test_a_trouser_in_four_steps(student):
    pipe, _ = student
    images = pipe(
        ["trouser"] * 4, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    image = images.mean(0)
    assert image[:, 9:19].mean() > 3 * max(image[:, :5].mean(), image[:, -5:].mean())


def test_a_saved_pipeline_is_the_same(student, tmp_path):
    pipe, _ = student
    pipe.save_pretrained(tmp_path)
    again = zoo.load_pipeline(tmp_path)
    noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    one, two = (p("bag", num_inference_steps=4, latents=noise, output_type="pt").images for p in (pipe, again))
    assert torch.allclose(one, two, atol=1e-6)
