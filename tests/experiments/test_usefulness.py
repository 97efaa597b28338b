"""The uses of a map, small; and what they are measured by."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest
import torch

import bayesdiff
from experiments.train_fashion_ddpm.train import fashion_mnist
from experiments.uncertainty_maps import __main__ as uncertainty_maps
from experiments.usefulness import __main__ as usefulness
from experiments.usefulness import common, filtering, ood, restoration, spaces
from experiments.usefulness.common import Folders, Size, edges, seeded
from experiments.usefulness.spaces import EarthFeatures, Frechet, precision_recall

#: Far too little of everything.
pytestmark = pytest.mark.filterwarnings(
    "ignore:A, the covariance of the scores",
    "ignore:the scores differ no more",
    "ignore:the network's response",
    "ignore:.* of the recursion's variances are negative",
)
SIZE = Size(images=12, seeds=2, steps=3, fit=12, draws=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    """Some of Fashion-MNIST in its own files."""
    folder: Path = tmp_path_factory.mktemp("fashion")
    _, data = bayesdiff.zoo.load("fashion-ddpm")
    for split, part in (("train", data), ("t10k", data.heldout)):
        images = ((part.images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
        labels = part.labels.to(torch.uint8).numpy()
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            with gzip.open(folder / f"{split}-{name}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
    assert fashion_mnist(folder, "t10k")[0].shape == (1000, 28, 28)
    return Folders(folder, None, None, folder / "work")


def test_distances():
    made = torch.randn(4000, 3, generator=seeded(0), dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + 1
    exact = 3 + sum((a - 1) ** 2 for a in (1, 2, 0.5))  # of commuting covariances: Σ (σ − σ')²
    plain = torch.randn(40_000, 3, generator=seeded(2), dtype=torch.float64)
    assert Frechet(plain)(made) == pytest.approx(exact, rel=0.05)
    real = torch.randn(200, 3, generator=seeded(1))
    assert precision_recall(real, real) == (1, 1)
    precision, recall = precision_recall(real[:50] * 0.01, real)
    assert precision == 1
    assert recall < 0.1
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(edges(ramp)[..., 1:-1], torch.ones(1, 1, 8, 6))


def test_features_of_the_earth():
    """Images that look alike are near each other; the projection is of the images' own mean and directions."""
    _, data = bayesdiff.zoo.load("earth-sd")
    images = (data.heldout.images[:48] + 1) / 2
    model = EarthFeatures(images)
    found = model(images)
    assert found.shape == (48, 32)
    torch.testing.assert_close(found.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    products = found.T @ found
    torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-3 * float(products.max()), rtol=0)
    brighter = model((images * 1.05).clamp(0, 1))
    assert float((brighter - found).norm()) < 0.5 * float((found - found.roll(1, 0)).norm())


def test_auroc_of_a_score():
    a, b = torch.randn(400, generator=seeded(0)), torch.randn(400, generator=seeded(1)) + 1
    found = ood.auroc(a, b)
    assert found["auroc"] == pytest.approx(float((b[None] > a[:, None]).float().mean()), abs=1e-4)
    assert 0.01 < found["auroc_se"] < 0.03


@pytest.mark.parametrize(("name", "block"), [("fashion-4step", 4), ("earth-sd3", 2)])
@pytest.mark.parametrize("task", restoration.TASKS)
def test_what_is_known_stays(name, block, task):
    """Inpainting keeps the upper half, super-resolution means; of pixels or of latents."""
    subject = common.subject(name, SIZE.fit)
    heldout = subject.data.heldout
    truth = subject.clean(heldout.images[:2])
    made = subject.pipe(
        subject.told(heldout, slice(2)), latents=subject.noise(2, 0), num_inference_steps=2, guidance_scale=1.0,
        output_type="latent", callback_on_step_end=restoration.keeper(subject, task, truth, 0), **subject.trained.given,
    ).images  # fmt: skip
    half = truth.shape[-1] // 2
    if task == "inpainting":
        torch.testing.assert_close(made[..., :half, :], truth[..., :half, :])
        assert not torch.allclose(made[..., half:, :], truth[..., half:, :], atol=0.01)
    else:
        pool = torch.nn.functional.avg_pool2d
        torch.testing.assert_close(pool(made, block), pool(truth, block), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(made, truth, atol=0.01)


def test_usefulness(tmp_path, monkeypatch, folders):
    monkeypatch.setattr(usefulness, "SIZES", dict.fromkeys(usefulness.PARTS, (SIZE, None)))
    monkeypatch.setitem(usefulness.PARTS, "filtering", lambda m, f, s: filtering.run(m, f, s, ("bayesdiff",)))
    monkeypatch.setattr(filtering, "classifier", lambda f: spaces.classifier(f, 1.0))
    monkeypatch.setattr(restoration, "SPREAD", 3)
    for only in (["ood"], ["restoration", "filtering"]):
        usefulness.main(only=only, model=["fashion-4step"], data=folders.fashion, work=folders.work, out=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results) == {"ood", "restoration", "filtering"}
    rows = {(r["set"], r["score"]): r for r in results["ood"]}
    assert rows["negative", "brightness"]["auroc"] > 0.9  # the control sees what it should
    maps = {(r["task"], r["map"]): r for r in results["restoration"]}
    assert abs(maps["inpainting", "chance"]["aurg"]) < 0.2
    assert maps["inpainting", "weights (std)"]["ause"] > 0
    kept = {(r["score"], r["measure"]): r for r in results["filtering"]}
    assert kept["weights: semantic", "Fréchet distance"]["value"] > 0
    assert kept["BayesDiff: total variance", "precision"]["seeds"] == 2
    assert all((tmp_path / f"{name}-fashion-4step.png").stat().st_size > 10_000 for name in results)


def test_uncertainty_maps(tmp_path):
    uncertainty_maps.main(model="fashion-4step", steps=3, seeds=3, draws=3, images=2, fit=SIZE.fit, out=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    share = {r["part"]: r["share"] for r in results["total_variance"]}
    assert share["their sum"] == pytest.approx(1, abs=1e-12)
    assert 0 < share["weights, mean over seeds"] < 0.5
    assert results["tangents"]["ratio"] == pytest.approx(1, abs=0.5)
    assert (tmp_path / "uncertainty_maps.png").stat().st_size > 10_000
