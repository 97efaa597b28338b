"""``bayesdiff demo``: the shipped model, what a map costs, and how well it agrees with whole trajectories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff import zoo
from bayesdiff.checks import check_int, check_output_folder
from bayesdiff.cli import show
from bayesdiff.cli.maps import ENSEMBLE_DRAWS, TANGENT_DRAWS
from bayesdiff.cli.results import write_figure_of, write_record, write_samples
from bayesdiff.output import UncertaintyOutput
from bayesdiff.pipeline import UncertaintyPipeline
from bayesdiff.propagation.settings import Ensemble, Tangents
from bayesdiff.rng import item_generator

#: So many of the shipped images are fitted to, each as often as the training drew it.
IMAGES = 1000
DEMO_CLASSES = ("sneaker", "shirt", "bag", "trouser")


def run_demo(
    out: Path, steps: int, num_tangents: int, ensemble: int, images: int | None, seed: int, device: str | None
) -> None:
    """Run the command."""
    check_int("--steps", steps, least=1)
    check_int("--num-tangents", num_tangents, least=1)
    check_int("--ensemble", ensemble, least=2)
    show.check_seed(seed, 2 * len(DEMO_CLASSES))
    if images is not None:
        check_int("--images", images, least=1)
    where = show.chosen_device(device)
    pipe, data = zoo.load("fashion-ddpm")
    indices = pipe.class_indices([c for c in DEMO_CLASSES for _ in range(2)])
    names = [pipe.class_names[c] for c in indices]
    check_output_folder(out)
    pipe.to(where)

    seconds: dict[str, float] = {}
    with show.timed(seconds, "fit"):
        laplace = show.fit_shipped(pipe, data.subset(slice(images or IMAGES)), seed)

    def run(call: Callable[..., Any]) -> Any:
        return call(indices, num_inference_steps=steps, generator=show.seeded(seed, len(indices)))

    show.say(f"sampling {len(indices)} images in one batch, {steps} steps of DDIM: the pipe alone")
    run(lambda *a, **k: pipe(*a, **{**k, "num_inference_steps": 1}))  # what a first call sets up is not timed
    with show.timed(seconds, "plain"):
        plain = run(pipe).images
    show.say(f"… with {num_tangents} tangents")
    settings = Tangents(draws=num_tangents, generator=item_generator(seed, TANGENT_DRAWS))
    tangents = UncertaintyPipeline(pipe, laplace, propagation=settings)
    with show.timed(seconds, "tangents"):
        fast: UncertaintyOutput = run(tangents)
    show.say(f"… and {ensemble} times again, with {ensemble} other weight draws")
    many = Ensemble(members=ensemble, generator=item_generator(seed, ENSEMBLE_DRAWS))
    members = UncertaintyPipeline(pipe, laplace, propagation=many)
    with show.timed(seconds, "ensemble"):
        slow: UncertaintyOutput = run(members)

    same = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(plain, fast.images, strict=True))
    agreement = compare(fast.std, slow.std)
    noise = {"tangents": (2 * num_tangents) ** -0.5, "ensemble": (2 * (ensemble - 1)) ** -0.5}
    _, written = write_samples(out, fast)
    write_figure_of(out, fast, names, reference=slow, names=("tangents", "ensemble"))
    calls = {"plain": fast.plain_calls, "tangents": fast.calls, "ensemble": slow.calls}
    record = {
        "settings": {
            "model": "fashion-ddpm", "classes": names, "steps": steps, "num_tangents": num_tangents,
            "ensemble": ensemble, "images": images or IMAGES, "seed": seed, "scheduler": "ddim",
        },
        "posterior": show.describe(laplace),
        "network_calls": calls,
        "seconds": seconds,
        "images_are_the_pipes_own": same,
        "agreement": agreement,
        "relative_noise_of_std": noise,
    }  # fmt: skip
    write_record(out, "demo", where, [*written, "figure.png"], **record)

    rows = [
        (label, str(calls[key]), f"{calls[key] / calls['plain']:.1f}", f"{seconds[key]:.1f}")
        for label, key in (
            ("the pipe alone", "plain"),
            (f"with tangents, K = {num_tangents}", "tangents"),
            (f"with an ensemble, M = {ensemble}", "ensemble"),
        )
    ]
    show.show_table(("", "network calls", "relative", "seconds"), rows)
    show.say(f"images the pipe's own, bit for bit: {'yes' if same else 'NO'}")
    show.say(
        f"std of tangents against the ensemble's, per pixel: correlation {agreement['correlation']:.3f}, "
        f"ratio of means {agreement['ratio_of_means']:.2f}"
    )
    show.say(
        f"(K = {num_tangents} and M = {ensemble} draws alone scatter a pixel's std by about "
        f"±{noise['tangents']:.0%} and ±{noise['ensemble']:.0%}: this limits both numbers)"
    )
    show.say(f"written to {out}: figure.png, images, std.npz, settings.json")


def compare(std: Tensor, reference: Tensor) -> dict[str, float]:
    """How two maps agree over all pixels: Pearson's correlation, and mean of ``std`` over mean of ``reference``."""
    both = torch.stack([std.flatten(), reference.flatten()]).double()
    return {
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "ratio_of_means": float(both[0].mean() / both[1].mean()),
    }
