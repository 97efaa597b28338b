"""The training loop: the DDPM objective on Fashion-MNIST, resumable at any step.

    loss(θ) = E_{x0, c, t, ε} ‖ε − ε_θ(√ᾱ_t x0 + √(1−ᾱ_t) ε, t, c)‖²        (Ho et al. 2020, eq. 14)

with the label c replaced by a null class with probability 0.1 (Ho & Salimans 2022), so that one
network serves classifier-free guidance. Every step draws its data, timesteps and noise from a
generator seeded by (seed, step): a run that was interrupted and resumed sees the very batches of
one that was not.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

NUM_CLASSES = 10
NULL_CLASS = 10


@dataclass(frozen=True)
class Settings:
    """What a run is; stored in its checkpoint, and compared on resuming."""

    steps: int = 8000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 300
    ema_decay: float = 0.998
    null_probability: float = 0.1
    seed: int = 0


def read_idx(path: Path) -> Tensor:
    """Read one gzipped IDX file (LeCun's format for MNIST) of unsigned bytes."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"expected an IDX file of unsigned bytes, got {raw[:4]!r} at the start of {path}")
    ndim = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=ndim, offset=4)
    body = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * ndim)
    return torch.from_numpy(body.reshape(tuple(int(n) for n in shape)).copy())


def fashion_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images ``(N, 28, 28)`` uint8 and labels ``(N,)`` int64; ``split`` is "train" or "t10k"."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long()
    return images, labels


def to_model_space(images: Tensor) -> Tensor:
    """uint8 ``(N, 28, 28)`` to float32 ``(N, 1, 28, 28)`` in [−1, 1]."""
    return images.unsqueeze(1).float() / 127.5 - 1.0


def build_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=NUM_CLASSES + 1,
    )


def build_scheduler() -> DDPMScheduler:
    # Linear betas leave √ᾱ_T = 0.006 > 0, so ε-prediction can be sampled from t = T; a cosine
    # schedule would put 1/√ᾱ_T ≈ 2e4 in front of the network's error there.
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon", clip_sample=False)


def learning_rate(step: int, s: Settings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / s.warmup
    return s.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup)))


def _write(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    temporary = folder / f".{name}.tmp"
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, folder / name)


class Run:
    """Network, optimiser and moving average, with their checkpoint."""

    def __init__(self, settings: Settings, folder: Path, device: str) -> None:
        self.settings, self.folder, self.device = settings, folder, device
        torch.manual_seed(settings.seed)
        self.unet = build_unet().to(device)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = {k: v.detach().clone() for k, v in self.unet.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if (folder / "state.json").exists():
            self._resume()

    def _resume(self) -> None:
        state = json.loads((self.folder / "state.json").read_text())
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"{self.folder} holds a run with settings {state['settings']}, expected {asdict(self.settings)}; "
                "give the same settings to go on with it, or another --work folder"
            )
        tensors = load_file(self.folder / state["tensors"], device=self.device)
        group = {
            p: {k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in ("net.", "ema.", "m1.", "m2.")
        }
        self.unet.load_state_dict(group["net."])
        self.ema = group["ema."]
        self.step, self.seconds = state["step"], state["seconds"]
        for name, parameter in self.unet.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": group["m1."][name],
                "exp_avg_sq": group["m2."][name],
            }

    def save(self) -> None:
        tensors = {f"net.{k}": v for k, v in self.unet.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, parameter in self.unet.named_parameters():
            tensors[f"m1.{name}"] = self.optimizer.state[parameter]["exp_avg"]
            tensors[f"m2.{name}"] = self.optimizer.state[parameter]["exp_avg_sq"]
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two tensor files in turn: state.json always names one that is complete.
        name = f"tensors-{(self.step // 1) % 2}.safetensors"
        current = self.folder / "state.json"
        if current.exists() and json.loads(current.read_text())["tensors"] == name:
            name = f"tensors-{1 - int(name[8])}.safetensors"
        _write(self.folder, name, tensors)
        temporary = self.folder / ".state.json.tmp"
        temporary.write_text(
            json.dumps({"settings": asdict(self.settings), "step": self.step, "seconds": self.seconds, "tensors": name})
        )
        os.replace(temporary, current)

    def train(self, images: Tensor, labels: Tensor, *, save_every: int = 250) -> None:
        s, scheduler = self.settings, build_scheduler()
        alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
        num_t = scheduler.config.num_train_timesteps
        started, before = time.monotonic(), self.seconds
        bar = tqdm(range(self.step, s.steps), initial=self.step, total=s.steps, desc="train", mininterval=5)
        self.unet.train()
        smooth = None
        for step in bar:
            generator = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
            index = torch.randint(len(images), (s.batch_size,), generator=generator)
            # Stratified timesteps: uniform over the schedule, with less noise in the loss.
            u = (torch.arange(s.batch_size) + torch.rand(s.batch_size, generator=generator)) / s.batch_size
            t = (u * num_t).long().clamp(max=num_t - 1).to(self.device)
            noise = torch.randn((s.batch_size, 1, 28, 28), generator=generator).to(self.device)
            null = torch.rand(s.batch_size, generator=generator) < s.null_probability
            x0 = to_model_space(images[index]).to(self.device)
            y = torch.where(null, NULL_CLASS, labels[index]).to(self.device)
            a = alphas_cumprod[t].view(-1, 1, 1, 1)
            x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                prediction = self.unet(x_t, t, class_labels=y).sample
            loss = (prediction.float() - noise).square().mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            self.optimizer.step()
            self.step = step + 1
            decay = min(s.ema_decay, self.step / (self.step + 10))
            with torch.no_grad():
                for k, v in self.unet.state_dict().items():
                    self.ema[k].lerp_(v, 1 - decay)
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            if self.step % save_every == 0 or self.step == s.steps:
                self.seconds = before + time.monotonic() - started
                self.save()
