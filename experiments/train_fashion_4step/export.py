"""From the last stage's checkpoint to the folder that ships, and what it is judged by."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from bayesdiff import zoo as shipped
from bayesdiff.io import environment, write_json, write_text
from bayesdiff.rng import item_generator
from bayesdiff.zoo import ClassConditionalPipeline
from experiments.train_earth.train import averaged
from experiments.train_fashion_4step.distill import (
    STAGES,
    build_scheduler,
    coefficients,
    from_v,
    grid,
    target,
)
from experiments.train_fashion_ddpm.export import ID2LABEL, draw_samples, swap
from experiments.train_fashion_ddpm.train import build_unet

STEPS = STAGES[-1]
SAMPLES = 100
FINE = 64  # DDIM steps of fashion-ddpm that samples are compared with


@torch.no_grad()
def heldout_loss(student: UNet2DModel, teacher: UNet2DModel, x: Tensor, y: Tensor, seed: int) -> list[dict[str, Any]]:
    """At each of the four times: the mean squared error of v against the truth, and against two steps of the teacher.

    ``teacher`` is the student of the stage before. The draw of image i depends on (seed, time, i) only.
    """
    fine, rows = grid(2 * STEPS), []
    for k in range(STEPS):
        t, half, to = (fine[2 * k + j].expand(len(x)) for j in range(3))
        noise = torch.stack([torch.randn(x.shape[1:], generator=item_generator(seed, k, i)) for i in range(len(x))])
        a, sigma = coefficients(t)
        z = a * x + sigma * noise
        v = student(z, t, class_labels=y).sample
        truth = (v - (a * noise - sigma * x)).square().flatten(1).mean(1).double()
        taught = (v - target(from_v(teacher), z, t, half, to, y)).square().flatten(1).mean(1).double()
        rows.append(
            {
                "time": int(t[0]),
                "loss": truth.mean().item(),
                "standard_error": (truth.std() / len(x) ** 0.5).item(),
                "distillation_loss": taught.mean().item(),
            }
        )
    return rows


@torch.no_grad()
def sample_distances(student: Any, teacher: Any, count: int, seed: int) -> dict[str, float]:
    """Root mean squared difference of pixels in [0, 1] to 64 DDIM steps of fashion-ddpm from the same noise."""
    noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    classes: list[str | int] = [i % 10 for i in range(count)]
    teacher.scheduler = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing")

    def sample(pipe: Any, steps: int) -> Tensor:
        return pipe(classes, num_inference_steps=steps, latents=noise, output_type="pt").images

    fine = sample(teacher, FINE)
    few = {"student": sample(student, STEPS), "fashion-ddpm": sample(teacher, STEPS)}
    return {name: (images - fine).square().mean().sqrt().item() for name, images in few.items()}


def export(
    work: Path, out: Path, results: Path, *, dataset_size: int, images: int = 500, seed: int = 0
) -> dict[str, Any]:
    """Write the zoo folder ``out``, and results.json and samples.png into ``results``.

    Args:
        work: Checkpoints of the stages.
        out: The folder that ships; replaced as a whole.
        results: A folder.
        dataset_size: N, how many images the students were trained on.
        images: How many held-out images are looked at.
        seed: Of the draws and of the samples.
    """
    networks, states = {}, {}
    for steps in STAGES:
        weights, states[steps] = averaged(work / f"stage-{steps}")
        networks[steps] = build_unet().eval()
        networks[steps].load_state_dict(weights)
    results.mkdir(parents=True, exist_ok=True)
    last = states[STEPS]
    batch = last["settings"]["batch_size"]
    training = {
        "dataset_size": dataset_size,
        "steps": last["step"],
        "batch_size": batch,
        "training_draws": last["step"] * batch / dataset_size,
        "sampler": "ddim",
        "data": "fashion_ddpm",
    }
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new = Path(scratch) / out.name
        half = build_unet().eval()
        half.load_state_dict(networks[STEPS].state_dict())
        ClassConditionalPipeline(half.half(), build_scheduler(), ID2LABEL).save_pretrained(new)
        (new / "unet" / "diffusion_pytorch_model.safetensors").chmod((new / "model_index.json").stat().st_mode)
        write_json(new / "training.json", training)
        pipe = shipped.load_pipeline(new)
        teacher, data = shipped.load("fashion-ddpm")
        heldout = data.heldout
        assert heldout is not None  # it ships
        x, y = heldout.images[:images], heldout.labels[:images]
        record = {
            "stages": {steps: {k: v for k, v in state.items() if k != "tensors"} for steps, state in states.items()},
            "training": training,
            "heldout_images": len(x),
            "heldout_seed": seed,
            "heldout_loss": heldout_loss(pipe.unet, networks[2 * STEPS], x, y, seed),
            "samples": SAMPLES,
            "distance_to_64_steps": sample_distances(pipe, teacher, SAMPLES, seed),
            "environment": environment(),
        }
        write_text(new / "README.md", card(record))
        draw_samples(pipe, results / "samples.png", seed=seed, steps=STEPS)
        write_json(results / "results.json", record)
        swap(new, out)
    return record


def card(record: dict[str, Any]) -> str:
    """The model card."""
    training, distance, env = (record[key] for key in ("training", "distance_to_64_steps", "environment"))
    s = record["stages"][STEPS]["settings"]
    unfinished = (
        "" if training["steps"] == s["steps"] else f" (the last is **unfinished**: {s['steps']:,} were planned)"
    )
    table = "\n".join(
        f"| {row['time']} | {row['loss']:.4f} ± {row['standard_error']:.4f} | {row['distillation_loss']:.4f} |"
        for row in record["heldout_loss"]
    )
    updates = ", ".join(f"{state['step']:,}" for state in record["stages"].values())
    seconds = round(sum(state["seconds"] for state in record["stages"].values()))
    return f"""\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
datasets: [fashion_mnist]
---

# fashion-4step

`fashion-ddpm` distilled to four DDIM steps: a class-conditional few-step model of Fashion-MNIST (28 × 28, greyscale).

```python
pipe, data = bayesdiff.zoo.load("fashion-4step")
pipe(["sneaker", "bag"], num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images
```

## Data and licence

The first {training["dataset_size"]:,} training images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist)
(© 2017 Zalando SE, MIT licence, in `../fashion_ddpm/LICENSE-data`). The shard of data is that of `fashion-ddpm`. The
weights are under the licence of the package, Apache-2.0.

## Training

- The network of `fashion-ddpm`, which predicts v here. Linear schedule of 1,000 steps.
- Progressive distillation (Salimans & Ho 2022): 32 DDIM steps of `fashion-ddpm` to {", ".join(map(str, STAGES))} in
  three stages of {updates} updates{unfinished} with {s["batch_size"]} images each; AdamW, learning rate
  {s["learning_rate"]:g} with {s["warmup"]} steps of warm-up and a cosine to zero in each stage; moving average of the
  weights with decay {s["ema_decay"]}. {seconds:,} seconds on one CPU core, some of them paused or shared.
- Null labels with probability 0.1, in student and teacher alike, so guidance can be used.
- The last stage drew each of N = {training["dataset_size"]:,} images M = {training["training_draws"]:.2f} times on
  average (`training.json`), at the times 999, 749, 499 and 249 only, which are those of `num_inference_steps=4` with
  the saved scheduler (trailing). At other times, so with other numbers of steps, it was not trained.

## Held-out loss

Mean squared error of v per pixel on {record["heldout_images"]:,} test images, one draw for each image and time: against
the truth (± standard error over images), and against two DDIM steps of the 8-step teacher.

| t | loss | distillation loss |
|---|---|---|
{table}

From the same noise, the root mean squared difference of pixels (range 0–1) to {FINE} DDIM steps of `fashion-ddpm` is
{distance["student"]:.4f}; that of 4 DDIM steps of `fashion-ddpm` itself is {distance["fashion-ddpm"]:.4f}
({record["samples"]:,} samples).

## Limits

Those of `fashion-ddpm`, and softer.

## Made again by

```
python -m experiments.train_fashion_4step
```

in the source repository, which takes the data from the Debian package `dataset-fashion-mnist` by default. A run goes
on where it was interrupted. Versions: {", ".join(f"{k} {v}" for k, v in env["versions"].items())}.
"""
