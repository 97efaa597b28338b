"""From checkpoints to the folders that ship: weights in float16, the shard of data, cards, and what they are judged by.

What is reported is measured on the pipeline as it is loaded again from its folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from bayesdiff.io import atomic_path, environment, write_figure, write_json, write_text
from bayesdiff.rng import item_generator
from bayesdiff.zoo import load_text_pipeline
from experiments.train_earth.card import DATA_LICENSE, card
from experiments.train_earth.data import HELDOUT_BANDS, SIZE, read_data
from experiments.train_earth.denoisers import MODELS, EarthSD, latent_scaling, prompts_of, tokenize
from experiments.train_earth.models import TEXT_LENGTH, build_ddim, build_flow, build_no_t5, count, save_tokenizer
from experiments.train_earth.train import averaged
from experiments.train_earth.vae import to_model_space, trained_vae
from experiments.train_fashion_ddpm.export import swap

BINS = 10
SHARD = 512  # images of each split that ship
COLUMNS = 32  # tiles in a row of a sheet
SHOWN = (
    "open sea in the tropics",
    "desert in the tropics",
    "forest in the tropics",
    "ice and snow in the polar north",
    "an island in the sea",
    "sea and coast, desert in the subtropics",
    "sea and coast, forest with mountains in the temperate north",
    "grassland with mountains in the temperate north",
)


def write_shard(data: dict[str, np.ndarray], out: Path) -> None:
    """The first ``SHARD`` images of each split as lossless sheets with captions; see ``bayesdiff.zoo.prompts``."""
    record: dict[str, Any] = {"tile": SIZE, "heldout_longitudes": HELDOUT_BANDS}
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        tiles = data[f"{split}_images"][:SHARD].reshape(-1, COLUMNS, SIZE, SIZE, 3)
        sheet = Image.fromarray(tiles.swapaxes(1, 2).reshape(-1, COLUMNS * SIZE, 3))
        with atomic_path(out / f"{split}.webp") as temporary:
            sheet.save(temporary, "WEBP", lossless=True, method=6)
        pairs = zip(prompts_of(data, split)[:SHARD], data[f"{split}_places"][:SHARD].tolist(), strict=True)
        record[split] = [{"text": text, "row": y, "column": x} for text, (y, x) in pairs]
    write_json(out / "captions.json", record)
    write_text(out / "LICENSE-data", DATA_LICENSE)


def build_pipeline(name: str, work: Path, folder: Path) -> dict[str, Any]:
    """Save the pipeline of "sd" or "sd3" to ``folder`` in float16; returns the record of its training."""
    model = MODELS[name](prompts_of(read_data(work / "data.npz"), "train"))
    weights, state = averaged(work / name)
    model.load_state_dict(model.state_dict() | weights)  # the moving average has no buffers
    model.half().eval()
    vae = trained_vae(work).half()
    shift, scale = latent_scaling(name, load_file(work / "latents.safetensors")["train"])
    vae.register_to_config(scaling_factor=scale, shift_factor=shift or None)
    if isinstance(model, EarthSD):
        pipe = StableDiffusionPipeline(
            vae,
            model.text_encoder,
            model.tokenizer,
            model.unet,
            build_ddim(),
            None,
            None,
            requires_safety_checker=False,
        )
    else:
        tokenizer_3, text_encoder_3 = build_no_t5()
        pipe = StableDiffusion3Pipeline(
            model.transformer, build_flow(), vae, model.text_encoder, model.tokenizer,
            model.text_encoder_2, model.tokenizer, text_encoder_3.half().eval(), tokenizer_3,
        )  # fmt: skip
    pipe.save_pretrained(folder)
    for part in ("tokenizer", "tokenizer_2"):
        if (folder / part).exists():
            save_tokenizer(model.tokenizer, folder / part)
    index = (folder / "model_index.json").read_text()  # transformers 4 reads tokenizer.json under this name only
    write_text(folder / "model_index.json", index.replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / "model_index.json").stat().st_mode)
    return state


@torch.no_grad()
def heldout_loss(name: str, pipe: Any, data: dict[str, np.ndarray], images: int, seed: int) -> list[dict[str, float]]:
    """Mean squared error of the target per latent element in ten bins of t, and its standard error over images.

    The draw of image i depends on (seed, bin, i) only. One draw per image and bin, prompts as they are.
    """
    prompts = prompts_of(data, "heldout")[:images]
    model = MODELS[name](prompts_of(data, "train")).eval()
    for part, _ in model.named_children():
        setattr(model, part, getattr(pipe, part))
    if not isinstance(model, EarthSD):
        pipe.transformer.set_attn_processor(model.processor)
    x = to_model_space(torch.from_numpy(data["heldout_images"][:images]))
    z = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in x.split(64)])
    z = (z - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor
    tokens = tokenize(model.tokenizer, prompts)
    rows = []
    for b in range(BINS):
        errors = []
        for index in torch.arange(images).split(64):
            generators = [item_generator(seed, b, i) for i in index.tolist()]
            times = torch.stack([(b + torch.rand((), generator=g)) / BINS for g in generators])
            noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
            if isinstance(model, EarthSD):
                times = (1000 * times).long()
            errors.append(model.loss(z[index], noise, times, tokens[index], generators[0]))
        error = torch.cat(errors).double()
        rows.append({"loss": error.mean().item(), "standard_error": (error.std() / images**0.5).item()})
    return rows


@torch.no_grad()
def vae_errors(pipe: Any, data: dict[str, np.ndarray], images: int) -> dict[str, float]:
    """What the VAE loses of held-out images, through the mean of its posterior."""
    x = to_model_space(torch.from_numpy(data["heldout_images"][:images]))
    y = torch.cat([pipe.vae.decode(pipe.vae.encode(part).latent_dist.mean).sample for part in x.split(64)]).clamp(-1, 1)
    squares = ((y - x) / 2).square().flatten(1).mean(1)
    return {
        "mean_absolute_error": ((y - x).abs().mean() / 2).item(),
        "psnr_db": (-10 * squares.log10()).mean().item(),
    }


def draw_samples(pipe: Any, path: Path, *, scales: tuple[float, ...] = (1.0, 5.0), columns: int = 5) -> None:
    """A picture of samples of ``SHOWN``: 30 steps, seeds 0, 1, … of each prompt; none was picked."""
    extra = {"max_sequence_length": TEXT_LENGTH} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    blocks = []
    for scale in scales:
        generators = [torch.Generator().manual_seed(seed) for _ in SHOWN for seed in range(columns)]
        prompts = [prompt for prompt in SHOWN for _ in range(columns)]
        images = pipe(
            prompts, guidance_scale=scale, num_inference_steps=30, generator=generators, output_type="np", **extra
        ).images
        blocks.append(images.reshape(len(SHOWN), columns, SIZE, SIZE, 3))
    both = np.concatenate(blocks, axis=1)
    figure = Figure(figsize=(0.9 * both.shape[1] + 2.4, 0.92 * len(SHOWN)), layout="constrained")
    axes: Any = figure.subplots(*both.shape[:2])
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    for prompt, line, row in zip(SHOWN, axes, both, strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image)
            axis.set_axis_off()
        line[0].text(-0.08, 0.5, prompt, transform=line[0].transAxes, ha="right", va="center", fontsize=7, wrap=True)
    for k, scale in enumerate(scales):
        axes[0, k * columns].set_title(f"guidance {scale:g}", fontsize=8, loc="left")
    write_figure(path, figure, dpi=120)


def export(name: str, work: Path, zoo: Path, results: Path, *, images: int = 512, seed: int = 0) -> dict[str, Any]:
    """Write the folder of "sd" or "sd3" in ``zoo``, and its results.json and samples.png into ``results``.

    Args:
        name: "sd" or "sd3".
        work: Data and checkpoints.
        zoo: The folder ``bayesdiff/zoo``.
        results: A folder.
        images: How many held-out images are looked at.
        seed: Of the draws of (t, ε).
    """
    out = zoo / f"earth_{name}"
    data = read_data(work / "data.npz")
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=zoo, prefix=f".{out.name}-") as scratch:
        new = Path(scratch) / out.name
        state = build_pipeline(name, work, new)
        size, batch = len(data["train_images"]), state["settings"]["batch_size"]
        training = {
            "dataset_size": size,
            "steps": state["step"],
            "batch_size": batch,
            "training_draws": state["step"] * batch / size,
            "data": "earth_data",
        }
        write_json(new / "training.json", training)
        pipe = load_text_pipeline(new)
        draw_samples(pipe, results / "samples.png")
        modules = {key: module for key, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
        record = {
            "settings": state["settings"],
            "seconds": round(state["seconds"]),
            "training": training,
            "vae_training": {k: v for k, v in averaged(work / "vae")[1].items() if k != "tensors"},
            "parameters": {key: count(module) for key, module in modules.items()},
            "vae": vae_errors(pipe, data, images),
            "heldout_images": images,
            "heldout_seed": seed,
            "heldout_loss": heldout_loss(name, pipe, data, images, seed),
            "environment": environment(),
        }
        write_text(new / "README.md", card(name, record))
        write_text(new / "LICENSE-data", DATA_LICENSE)
        write_json(results / "results.json", record)
        swap(new, out)
    return record
