"""``bayesdiff map``: samples, the pixel-wise standard deviation of each, and a record of what was run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bayesdiff import zoo
from bayesdiff.checks import (
    ArgumentError,
    UnknownNameError,
    UnsupportedPipelineError,
    check_choice,
    check_int,
    check_output_folder,
)
from bayesdiff.cli import main as options
from bayesdiff.cli.show import (
    chosen_device,
    describe,
    fit_shipped,
    say,
    seeded,
    show_table,
    timed,
    write_samples,
)
from bayesdiff.io import environment, write_json
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.pipeline import UncertaintyPipeline
from bayesdiff.plotting import plot_maps
from bayesdiff.propagation.settings import BayesDiff, Ensemble, Settings, Tangents
from bayesdiff.rng import item_generator

# Streams of the seed, apart from those of the samples (seed + i).
TANGENT_DRAWS, ENSEMBLE_DRAWS = 1, 2


@dataclass(frozen=True)
class MapOptions:
    """The options of the command."""

    out: Path
    classes: list[str]
    model: str
    num_samples: int
    steps: int
    seed: int
    scheduler: str
    eta: float
    guidance_scale: float
    propagation: str
    num_tangents: int
    extra_calls: float
    refresh: int | None
    num_directions: int | None
    recursion_samples: int
    skip_interval: int
    batch_invariant: bool
    posterior: Path | None
    structure: str
    covariance: str
    dtype: str
    device: str | None


def propagation_of(o: MapOptions) -> Settings:
    """How a variance is carried, as the options have it."""
    generator = item_generator(o.seed, TANGENT_DRAWS if o.propagation == "tangents" else ENSEMBLE_DRAWS)
    common: dict[str, Any] = {"generator": generator, "batch_invariant": o.batch_invariant}
    if o.propagation == "tangents":
        return Tangents(
            draws=o.num_tangents,
            extra_calls=o.extra_calls,
            refresh=o.refresh,
            num_directions=o.num_directions,
            **common,
        )
    if o.propagation == "ensemble":
        return Ensemble(members=o.num_tangents, **common)
    centered = o.propagation == "bayesdiff-centered"
    return BayesDiff(samples=o.recursion_samples, skip_interval=o.skip_interval, centered=centered, **common)


def draw_maps(o: MapOptions) -> None:
    """Run the command. Everything that can be wrong is looked at before the first network call."""
    settings = {k: v for k, v in asdict(o).items() if k not in ("out", "device")}
    settings["posterior"] = "fitted" if o.posterior is None else "given"
    check_int("--num-samples", o.num_samples, least=1)
    check_int("--steps", o.steps, least=1)
    check_int("--seed", o.seed, least=0)
    check_choice("--propagation", o.propagation, options.PROPAGATIONS)
    check_int("--num-tangents", o.num_tangents, least=2 if o.propagation == "ensemble" else 1)
    check_int("--recursion-samples", o.recursion_samples, least=2)
    check_int("--skip-interval", o.skip_interval, least=1)
    if o.refresh is not None:
        check_int("--refresh", o.refresh, least=1)
    if o.num_directions is not None:
        check_int("--num-directions", o.num_directions, least=1)
    check_choice("--structure", o.structure, options.STRUCTURES)
    check_choice("--covariance", o.covariance, options.COVARIANCES)
    check_choice("--dtype", o.dtype, options.DTYPES)
    propagation = propagation_of(o)
    where = chosen_device(o.device)
    pipe, data = load(o.model, o.scheduler, getattr(torch, o.dtype), needs_data=o.posterior is None)
    indices = pipe.class_indices([o.classes[i % len(o.classes)] for i in range(o.num_samples)])
    names = [pipe.class_names[c] if pipe.class_names else str(c) for c in indices]
    check_output_folder(o.out)
    pipe.to(where)

    seconds: dict[str, float] = {}
    if o.posterior is not None:
        laplace = LaplacePosterior.load(o.posterior)
    else:
        with timed(seconds, "fit"):
            laplace = fit_shipped(pipe, data, o.seed, structure=o.structure, covariance=o.covariance)
        laplace.save(o.out / "posterior")
    up = UncertaintyPipeline(pipe, laplace, propagation=propagation)
    draws = f" of {o.num_tangents} weight draws" if o.propagation in ("tangents", "ensemble") else ""
    say(f"sampling {o.num_samples} × {o.steps} steps with {o.propagation}{draws}")
    with timed(seconds, "sampling"):
        output = up(
            indices, num_inference_steps=o.steps, eta=o.eta, guidance_scale=o.guidance_scale,
            generator=seeded(o.seed, o.num_samples),
        )  # fmt: skip

    files = write_samples(o.out, output)
    plot_maps(output.images, output.std, titles=names, path=o.out / "figure.png")
    record = {
        "command": "map",
        "settings": settings,
        "samples": [
            {"file": file, "class": name, "seed": o.seed + i, **{k: float(v[i]) for k, v in output.scores().items()}}
            for i, (file, name) in enumerate(zip(files, names, strict=True))
        ],
        "posterior": describe(laplace),
        "network_calls": {"pipe": output.plain_calls, "all": output.calls},
        "seconds": seconds,
        "environment": environment(where),
    }
    write_json(o.out / "settings.json", record)
    std = output.std.flatten(1).double()
    show_table(
        ("sample", "class", "seed", "mean std", "largest std"),
        [
            (file, name, str(o.seed + i), f"{std[i].mean():.4f}", f"{std[i].max():.4f}")
            for i, (file, name) in enumerate(zip(files, names, strict=True))
        ],
    )
    own, took = output.plain_calls, seconds["sampling"]
    say(f"{output.calls} network calls, of which {own} the pipe's own, in {took:.1f} s")
    say(f"written to {o.out}: images, std.npz, figure.png, settings.json")


def load(name: str, scheduler: str, dtype: torch.dtype, *, needs_data: bool) -> tuple[Any, zoo.ClassImages | None]:
    """A shipped model, or one in a folder; the folder has no data to fit to."""
    if name in zoo.names():
        return zoo.load(name, scheduler=scheduler, dtype=dtype)
    folder = Path(name)
    if not (folder / "model_index.json").is_file():
        raise UnknownNameError(
            f"expected --model to be one of {', '.join(map(repr, zoo.names()))}, or a folder written by "
            f"save_pretrained, got {name!r}, where there is no model_index.json"
        )
    kind = zoo.ClassConditionalPipeline.load_config(folder, local_files_only=True).get("_class_name")
    if kind != zoo.ClassConditionalPipeline.__name__:
        raise UnsupportedPipelineError(
            f"expected a saved ClassConditionalPipeline, got {kind}; use bayesdiff.UncertaintyPipeline from Python"
        )
    if needs_data:
        raise ArgumentError(
            f"expected --posterior beside the folder {name!r}, which has no data to fit one to; got none"
        )
    return zoo.load_pipeline(folder, scheduler=scheduler, dtype=dtype), None
