"""From a checkpoint to the folder that ships: weights, data shard, model card, and what they were checked by.

The moving average of the weights is stored in float16. What is reported is measured on the network as it
is loaded again from that folder, and a comparison with the float32 weights shows what the rounding costs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from bayesdiff.io import atomic_path, environment, write_figure, write_json, write_text
from bayesdiff.rng import item_generator
from bayesdiff.zoo import ClassConditionalPipeline
from experiments.train_fashion_ddpm.train import build_scheduler, build_unet, fashion_mnist, to_model_space

# The names in Fashion-MNIST's README; after a comma, other names that are understood.
ID2LABEL = {
    0: "T-shirt/top, T-shirt",
    1: "Trouser, trousers",
    2: "Pullover",
    3: "Dress",
    4: "Coat",
    5: "Sandal",
    6: "Shirt",
    7: "Sneaker",
    8: "Bag",
    9: "Ankle boot, boot",
}
SHARD_PER_CLASS, HELDOUT_PER_CLASS = 200, 100
DECILES = 10
BATCH = 256

DATA_LICENSE = """\
The images in data.npz are a part of Fashion-MNIST
(https://github.com/zalandoresearch/fashion-mnist), which comes under this licence:

The MIT License (MIT)

Copyright © 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the “Software”), to deal in the Software without restriction, including
without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED “AS IS”, WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE
USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True)
class Checkpoint:
    """What a training run has left: its averaged weights and its account of itself."""

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    step: int
    seconds: float


def read_checkpoint(work: Path) -> Checkpoint:
    """Read the newest complete checkpoint in ``work``."""
    state = json.loads((work / "state.json").read_text())
    with safe_open(work / state["tensors"], framework="pt") as file:
        weights = {k.removeprefix("ema."): file.get_tensor(k) for k in file.keys() if k.startswith("ema.")}  # noqa: SIM118
    return Checkpoint(weights, state["settings"], state["step"], state["seconds"])


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices of the first ``count`` images of each class, in the order of the data set."""
    chosen = torch.cat([(labels == c).nonzero().flatten()[:count] for c in labels.unique()])
    return chosen.sort().values


def write_shard(path: Path, data: Path) -> Tensor:
    """Write the training shard and the held-out images; returns the held-out images' indices in the test set."""
    train, train_labels = fashion_mnist(data, "train")
    test, test_labels = fashion_mnist(data, "t10k")
    shard = first_of_each_class(train_labels, SHARD_PER_CLASS)
    heldout = first_of_each_class(test_labels, HELDOUT_PER_CLASS)
    with atomic_path(path) as temporary:
        np.savez_compressed(
            temporary,
            train_images=train[shard].numpy(),
            train_labels=train_labels[shard].to(torch.uint8).numpy(),
            heldout_images=test[heldout].numpy(),
            heldout_labels=test_labels[heldout].to(torch.uint8).numpy(),
            dataset_size=np.int64(len(train)),
        )
    return heldout


@dataclass(frozen=True)
class Check:
    """Test images and one seeded draw of (t, ε) for each of them in each decile of the schedule.

    The draw of image i depends on (seed, decile, i) only.
    """

    images: Tensor  # (N, 28, 28) uint8
    labels: Tensor  # (N,) int64
    seed: int
    device: str

    def predictions(self, unet: UNet2DModel, decile: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ε, ε_θ) in batches, float32 ``(b, 1, 28, 28)``."""
        scheduler = build_scheduler()
        width = scheduler.config.num_train_timesteps // DECILES
        for rows in torch.arange(len(self.images)).split(BATCH):
            t = torch.empty(len(rows), dtype=torch.int64)
            noise = torch.empty(len(rows), 1, 28, 28)
            for k, i in enumerate(rows.tolist()):
                generator = item_generator(self.seed, decile, i)
                t[k] = decile * width + torch.randint(width, (), generator=generator)
                noise[k] = torch.randn(1, 28, 28, generator=generator)
            x_t = scheduler.add_noise(to_model_space(self.images[rows]), noise, t)
            with torch.no_grad():
                output = unet(
                    x_t.to(self.device), t.to(self.device), class_labels=self.labels[rows].to(self.device)
                ).sample
            yield noise, output.cpu()

    def loss(self, unet: UNet2DModel) -> list[dict[str, float]]:
        """Mean squared error of ε per element for each decile of t, with its standard error over images."""
        rows = []
        for decile in tqdm(range(DECILES), desc="held-out loss", unit="decile"):
            errors = [(output - noise).square().flatten(1).mean(1) for noise, output in self.predictions(unet, decile)]
            error = torch.cat(errors).double()
            rows.append({"loss": error.mean().item(), "standard_error": (error.std() / len(error) ** 0.5).item()})
        return rows

    def rounding(self, full: UNet2DModel, shipped: UNet2DModel) -> dict[str, float]:
        """What float16 storage changes: of the output, and of the loss, on the same draws at every decile."""
        change, loss_full, loss_shipped = 0.0, 0.0, 0.0
        for decile in tqdm(range(DECILES), desc="float32 against float16", unit="decile"):
            pairs = zip(self.predictions(full, decile), self.predictions(shipped, decile), strict=True)
            for (noise, a), (_, b) in pairs:
                change = max(change, (a - b).abs().max().item())
                loss_full += (a - noise).square().sum(dtype=torch.float64).item()
                loss_shipped += (b - noise).square().sum(dtype=torch.float64).item()
        count = DECILES * self.images.numel()
        return {
            "images": len(self.images),
            "largest_change_of_output": change,
            "loss_float32": loss_full / count,
            "loss_float16": loss_shipped / count,
        }


def draw_samples(
    pipe: ClassConditionalPipeline, path: Path, *, columns: int = 8, seed: int = 0, steps: int = 50
) -> None:
    """A picture of some samples of each class: DDIM, seeds ``seed`` + 0, 1, …; none was picked."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(desc="samples")
    count = len(pipe.class_names)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count * columns)]
    classes = [c for c in range(count) for _ in range(columns)]
    images = pipe(classes, num_inference_steps=steps, generator=generators, output_type="np").images
    rows = images[..., 0].reshape(count, columns, *images.shape[1:3])
    figure = Figure(figsize=(0.55 * columns + 1.3, 0.55 * count), layout="constrained")
    axes = figure.subplots(count, columns, gridspec_kw={"wspace": 0, "hspace": 0})
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    for name, line, row in zip(pipe.class_names, axes, rows, strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    write_figure(path, figure)


def swap(new: Path, out: Path) -> None:
    """Put the folder ``new`` in the place of ``out``; if that fails, ``out`` is as it was."""
    if not out.exists():
        os.replace(new, out)
        return
    old = new.with_name(new.name + "-old")
    os.replace(out, old)
    try:
        os.replace(new, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old)


def export(
    checkpoint: Checkpoint,
    data: Path,
    out: Path,
    results: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    max_images: int | None = None,
) -> dict[str, Any]:
    """Write the zoo folder ``out``, and results.json and samples.png into ``results``.

    Args:
        checkpoint: What a training run has left.
        data: Folder of Fashion-MNIST's four files.
        out: The folder that ships; replaced as a whole.
        results: Folder for results.json and samples.png.
        device: Where the checks run, and the training did.
        seed: Of the draws of (t, ε) in the checks, and of the samples.
        max_images: Look at the first so many test images only (for a trial).

    Returns:
        What results.json holds.
    """
    full, unet = build_unet().eval(), build_unet().eval()
    full.load_state_dict(checkpoint.weights)
    unet.load_state_dict(checkpoint.weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new = Path(scratch) / out.name
        ClassConditionalPipeline(unet.half(), build_scheduler(), ID2LABEL).save_pretrained(new)
        (new / "unet" / "diffusion_pytorch_model.safetensors").chmod((new / "model_index.json").stat().st_mode)
        heldout = write_shard(new / "data.npz", data)
        write_text(new / "LICENSE-data", DATA_LICENSE)
        size, batch = len(fashion_mnist(data, "train")[0]), checkpoint.settings["batch_size"]
        training = {
            "dataset_size": size,
            "steps": checkpoint.step,
            "batch_size": batch,
            "training_draws": checkpoint.step * batch / size,
            "sampler": "ddim",
            "data": out.name,
        }
        write_json(new / "training.json", training)

        pipe = ClassConditionalPipeline.from_pretrained(new, local_files_only=True)  # in float32
        pipe.unet.to(device)
        images, labels = fashion_mnist(data, "t10k")
        few = Check(images[heldout][:max_images], labels[heldout][:max_images], seed, device)
        many = Check(images[:max_images], labels[:max_images], seed, device)
        record = {
            "settings": checkpoint.settings,
            "steps_done": checkpoint.step,
            "seconds": round(checkpoint.seconds),
            "trained_on": f"{os.cpu_count()} CPU cores" if device == "cpu" else environment(device)["device"],
            "parameters": sum(p.numel() for p in pipe.unet.parameters()),
            "heldout_images": len(many.images),
            "heldout_seed": seed,
            "rounding": few.rounding(full.to(device), pipe.unet),
            "heldout_loss": many.loss(pipe.unet),
            "environment": environment(device),
        }
        write_text(new / "README.md", card(record))
        draw_samples(pipe, results / "samples.png", seed=seed)
        write_json(results / "results.json", record)
        swap(new, out)
    return record


def card(record: dict[str, Any]) -> str:
    """The model card."""
    s, r, env = record["settings"], record["rounding"], record["environment"]
    done = record["steps_done"]
    unfinished = "" if done == s["steps"] else f" (**unfinished**: {s['steps']:,} were planned)"
    width = build_scheduler().config.num_train_timesteps // DECILES
    table = "\n".join(
        f"| {i * width}–{(i + 1) * width - 1} | {row['loss']:.5f} ± {row['standard_error']:.5f} |"
        for i, row in enumerate(record["heldout_loss"])
    )
    mean = sum(row["loss"] for row in record["heldout_loss"]) / DECILES
    return f"""\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
datasets: [fashion_mnist]
---

# fashion-ddpm

A small class-conditional diffusion model of Fashion-MNIST (28 × 28, greyscale, 10 classes), on which every
feature of `bayesdiff` can be tried on a CPU.

```python
pipe, data = bayesdiff.zoo.load("fashion-ddpm")
pipe(["sneaker", "bag"], num_inference_steps=50, generator=torch.Generator().manual_seed(0)).images
```

## Data and licence

Trained on the 60,000 training images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist)
(© 2017 Zalando SE, MIT licence, in `LICENSE-data`). `data.npz` holds {10 * SHARD_PER_CLASS:,} of them, the first
{SHARD_PER_CLASS} of each class, and the first {HELDOUT_PER_CLASS} of each class of the test set, which the network
never saw. The weights are under the licence of the package, Apache-2.0.

## Network and training

- `UNet2DModel`, {record["parameters"]:,} parameters, stages of 32, 64 and 96 channels, attention at 7 × 7.
- Predicts ε; linear schedule of 1,000 steps (√ᾱ_T = 0.006). Class labels are replaced by a null class (index 10) with
  probability {s["null_probability"]}, for classifier-free guidance.
- {done:,} steps{unfinished} of {s["batch_size"]} images, AdamW, learning rate {s["learning_rate"]:g} with {s["warmup"]}
  steps of warm-up and a cosine to zero; moving average of the weights with decay {s["ema_decay"]}; seed {s["seed"]}.
- {record["seconds"]:,} seconds of wall-clock time on {record["trained_on"]}.
- No augmentation. Nothing was tuned on the test set.

## Held-out loss

Mean squared error of ε per pixel, on {record["heldout_images"]:,} test images, one draw of (t, ε) for each image and
decile of t; ± is the standard error over images.

| t | loss |
|---|---|
{table}
| mean | {mean:.5f} |

Weights are stored in float16. On {r["images"]:,} of these images this changes the network's output by at most
{r["largest_change_of_output"]:.1e} (ε has unit variance), and the mean loss from {r["loss_float32"]:.6f} to
{r["loss_float16"]:.6f}.

## Limits

It is small and was trained for minutes: fine texture and prints are often smeared. It knows ten classes of
clothing seen from one side, centred, on black. It is meant for methods and tests, not for making pictures.

## Made again by

```
python -m experiments.train_fashion_ddpm
```

in the source repository, which takes the data from the Debian package `dataset-fashion-mnist` by default. A run goes
on where it was interrupted. Versions: {", ".join(f"{k} {v}" for k, v in env["versions"].items())}.
"""
