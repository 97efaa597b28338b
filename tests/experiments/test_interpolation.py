"""Interpolated noises: their ends, their norms, and what the experiment records of them."""

from __future__ import annotations

import json

import pytest
import torch

import bayesdiff
from bayesdiff.checks import ArgumentError, ShapeError
from experiments.interpolation import __main__ as interpolation


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_slerp():
    a, b = randn(0, 1, 8, 8), randn(1, 1, 8, 8)
    path = interpolation.slerp(a, b, 5)
    assert path.shape == (5, 1, 8, 8)
    assert path.dtype == a.dtype
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    # On a sphere it stays there, and its steps are equal angles.
    on_sphere = interpolation.slerp(*(x.double() / x.double().norm() for x in (a, b)), 5).flatten(1)
    torch.testing.assert_close(on_sphere.norm(dim=1), torch.ones(5).double())
    cosines = (on_sphere[1:] * on_sphere[:-1]).sum(1)
    torch.testing.assert_close(cosines, cosines[:1].expand(4))
    torch.testing.assert_close(4 * cosines[0].arccos(), (on_sphere[0] @ on_sphere[-1]).arccos())


def test_slerp_interpolates_squared_norms_of_orthogonal_noises():
    a, b = torch.zeros(2, 6).double()
    a[0], b[1] = 2.0, 3.0
    path = interpolation.slerp(a, b, 7)
    turn = torch.linspace(0, torch.pi / 2, 7, dtype=torch.float64)
    torch.testing.assert_close(path.square().sum(1), 4 * turn.cos().square() + 9 * turn.sin().square())


def test_slerp_of_standard_normal_noise_is_standard_normal():
    """Why the middle of a path is no other than its ends. The variance of 200,000 numbers is known to 0.3 %."""
    pairs = [interpolation.slerp(randn(2 * i, 784), randn(2 * i + 1, 784), 3)[1] for i in range(256)]
    middle = torch.stack(pairs)
    assert float(middle.var()) == pytest.approx(1, abs=0.02)
    assert float(middle.mean()) == pytest.approx(0, abs=0.02)


def test_slerp_errors():
    a = randn(0, 4)
    with pytest.raises(ShapeError, match=r"\(4,\) and \(3,\)"):
        interpolation.slerp(a, a[:3], 3)
    for other in (2 * a, -a, torch.zeros(4)):
        with pytest.raises(ArgumentError, match="not parallel"):
            interpolation.slerp(a, other, 3)
    with pytest.raises(ArgumentError, match="points >= 2"):
        interpolation.slerp(a, randn(1, 4), 1)


def test_measures():
    images, std = randn(0, 3, 1, 4, 4).abs(), 1 + randn(1, 3, 1, 4, 4).abs()
    std[1] = 3 * std[0]
    images[2] = images[0] - (std[1] - 1)
    first, second, third = interpolation.measures(images, std)
    assert [r["alpha"] for r in (first, second, third)] == [0, 0.5, 1]
    assert "map_change" not in first
    assert second["mean_std"] == pytest.approx(3 * first["mean_std"])
    assert second["total_variance"] == pytest.approx(9 * first["total_variance"])
    assert second["map_correlation"] == pytest.approx(1)
    assert second["map_change"] == pytest.approx(1)  # (3 − 1) in the mean of 1 and 3
    assert second["at_change"] == pytest.approx(1)  # the image changes by as much as the map says
    assert second["end_at_change"] == pytest.approx(interpolation.correlation(std[1], std[2]))
    x, y = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    hill = (x * y)[None]  # its slope is √(x² + y²), by central differences too
    moving = interpolation.measures(torch.stack([hill, hill, hill + (x.square() + y.square()).sqrt()]), std)
    assert moving[1]["edges_at_change"] == pytest.approx(1)
    assert "at_change" not in third
    assert second["image_distance"] == pytest.approx(float((images[1] - images[0]).norm() / 4), rel=1e-5)
    assert interpolation.measures(images[[0, 0, 0]], std)[2]["image_change"] == 0
    five = interpolation.measures(torch.cat([images, images[:2]]), torch.cat([std, std[:2]]))
    moved = (images[2] - images[0]).abs()
    assert five[1]["end_at_change"] == pytest.approx(interpolation.correlation(moved, std[1]))  # the fifth is std[1]
    moved = (images[1] - images[2]).abs()
    assert five[3]["end_at_change"] == pytest.approx(interpolation.correlation(moved, std[0]))
    found = interpolation.summary([[first, second, third]])
    assert abs(found["change_rank_correlation"]) == pytest.approx(1)  # of two steps
    assert found["middle_to_ends"] == pytest.approx(2 * 3 / (1 + third["mean_std"] / first["mean_std"]))
    assert found["middle_to_ends_se"] is None


def test_the_command(tmp_path, monkeypatch):
    seen = []
    original = bayesdiff.UncertaintyPipeline.__call__

    def watched(self, *args, **kwargs):
        seen.append(original(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(bayesdiff.UncertaintyPipeline, "__call__", watched)
    settings = {"classes": ["bag", "sneaker"], "pairs": 2, "points": 3, "steps": 2, "draws": 4, "images": 60, "seed": 5}
    interpolation.main(**settings, out=tmp_path)

    # The ends are what the pipe makes of these seeds, alone and without us.
    pipe, _ = bayesdiff.zoo.load("fashion-ddpm")
    for n, (name, output) in enumerate(zip(("bag", "bag", "sneaker", "sneaker"), seen, strict=True)):
        for end, point in enumerate((0, -1)):
            generator = torch.Generator().manual_seed(5 + 2 * n + end)
            plain = pipe(name, num_inference_steps=2, generator=generator, output_type="pt").images[0]
            assert torch.equal(output.images[point], plain)

    result = json.loads((tmp_path / "results.json").read_text())
    assert settings.items() <= result["settings"].items()
    assert result["settings"]["scheduler"] == "DDIMScheduler"
    assert "torch" in result["environment"]["versions"]
    rows = result["results"]["points"]
    assert [(r["class"], r["pair"], r["alpha"]) for r in rows] == [
        (name, j, alpha) for name in ("bag", "sneaker") for j in (0, 1) for alpha in (0, 0.5, 1)
    ]
    assert [r["seeds"] for r in rows[::3]] == [[5, 6], [7, 8], [9, 10], [11, 12]]
    stds = torch.cat([output.std for output in seen]).double()
    assert [r["mean_std"] for r in rows] == pytest.approx(stds.mean((1, 2, 3)).tolist())
    assert [r["total_variance"] for r in rows] == pytest.approx(stds.square().sum((1, 2, 3)).tolist())
    assert rows[0]["mean_std"] > 0
    steps = [r for r in rows if r["alpha"] > 0]
    overall = result["results"]["summary"]
    for key in ("image_distance", "image_change", "map_change", "image_correlation", "map_correlation"):
        assert overall[key] == pytest.approx(sum(r[key] for r in steps) / len(steps))
    assert overall["at_change"] == pytest.approx(sum(r["at_change"] for r in rows[1::3]) / 4)
    assert overall["middle_to_ends_se"] > 0
    assert (tmp_path / "interpolation.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("settings", "message"), [({"points": 2}, "--points >= 3, got 2"), ({"pairs": 0}, "--pairs >= 1, got 0")]
)
def test_errors(tmp_path, settings, message):
    with pytest.raises(ArgumentError, match=message):
        interpolation.main(**settings, out=tmp_path)
