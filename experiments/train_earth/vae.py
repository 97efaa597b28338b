"""The VAE: absolute error and a little KL, no adversary; and the latents of all patches."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn import functional as F

from bayesdiff.io import atomic_path
from experiments.train_earth.data import read_data
from experiments.train_earth.models import build_vae
from experiments.train_earth.train import Run, Settings, averaged

KL_WEIGHT = 1e-4  # of the mean KL per latent element


def to_model_space(images: Tensor) -> Tensor:
    """uint8 ``(N, H, W, 3)`` to float32 ``(N, 3, H, W)`` in [−1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train_vae(work: Path, settings: Settings) -> None:
    """Train; ``work`` holds data.npz, and the checkpoint goes to its folder vae."""
    images = torch.from_numpy(read_data(work / "data.npz")["train_images"])
    torch.manual_seed(settings.seed)
    vae = build_vae()

    def loss_of(step: int, generator: Generator) -> Tensor:
        index = torch.randint(len(images), (settings.batch_size,), generator=generator)
        x = to_model_space(images[index])
        flip = torch.rand(2, generator=generator) < 0.5
        x = x.flip([axis for axis, f in zip((2, 3), flip.tolist(), strict=True) if f])
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(x)).float()
            mean, log_variance = moments.chunk(2, 1)
            log_variance = log_variance.clamp(-30, 20)
            z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
            y = vae.decoder(vae.post_quant_conv(z)).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        # The absolute error at two scales: large areas have the right colour first.
        coarse = (F.avg_pool2d(y, 4) - F.avg_pool2d(x, 4)).abs().mean()
        return (y - x).abs().mean() + coarse + KL_WEIGHT * kl

    Run(vae, settings, work / "vae").train(loss_of)


def trained_vae(work: Path) -> AutoencoderKL:
    """The averaged VAE in float32, as it will be stored (float16 rounds it)."""
    vae = build_vae()
    weights, _ = averaged(work / "vae")
    vae.load_state_dict({name: value.half().float() for name, value in weights.items()})
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def write_latents(work: Path) -> None:
    """Encode all patches: latents.safetensors holds the means of the VAE's posterior, "train" and "heldout"."""
    data, vae = read_data(work / "data.npz"), trained_vae(work)
    latents = {}
    for split in ("train", "heldout"):
        images = torch.from_numpy(data[f"{split}_images"])
        latents[split] = torch.cat([vae.encode(to_model_space(part)).latent_dist.mean for part in images.split(64)])
    with atomic_path(work / "latents.safetensors") as temporary:
        save_file(latents, temporary)
