"""``bayesdiff map``: samples, the pixel-wise standard deviation of each, and a record of what was run."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bayesdiff.checks import ArgumentError, check_choice, check_int, check_output_folder
from bayesdiff.cli import main as options
from bayesdiff.cli import show
from bayesdiff.cli.calls import Wanted, call_of
from bayesdiff.cli.models import load_model
from bayesdiff.cli.results import write_figure_of, write_record, write_samples
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.pipeline import UncertaintyPipeline
from bayesdiff.propagation.settings import BayesDiff, Ensemble, Settings, Tangents
from bayesdiff.rng import item_generator

# Streams of the seed, apart from those of the samples (seed + i).
TANGENT_DRAWS, ENSEMBLE_DRAWS = 1, 2


@dataclass(frozen=True)
class MapOptions:
    """The options of the command."""

    out: Path
    prompts: list[str]
    classes: list[str]
    model: str
    num_samples: int | None
    steps: int
    seed: int
    scheduler: str | None
    eta: float | None
    guidance_scale: float | None
    propagation: str
    num_tangents: int | None
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
            draws=options.DRAWS if o.num_tangents is None else o.num_tangents,
            extra_calls=o.extra_calls,
            refresh=o.refresh,
            num_directions=o.num_directions,
            **common,
        )
    if o.propagation == "ensemble":
        return Ensemble(members=options.MEMBERS if o.num_tangents is None else o.num_tangents, **common)
    centered = o.propagation == "bayesdiff-centered"
    return BayesDiff(samples=o.recursion_samples, skip_interval=o.skip_interval, centered=centered, **common)


def check_options(o: MapOptions) -> None:
    """What can be seen without the model.

    Raises:
        ArgumentError: An option is out of range.
    """
    least = {
        "num_samples": 1,
        "steps": 1,
        "recursion_samples": 2,
        "skip_interval": 1,
        "refresh": 1,
        "num_directions": 1,
    }
    least["num_tangents"] = 2 if o.propagation == "ensemble" else 1
    check_choice("--propagation", o.propagation, options.PROPAGATIONS)
    for name, number in least.items():
        if getattr(o, name) is not None:
            check_int(f"--{name.replace('_', '-')}", getattr(o, name), least=number)
    show.check_seed(o.seed, o.num_samples or 1)
    check_choice("--structure", o.structure, options.STRUCTURES)
    check_choice("--covariance", o.covariance, options.COVARIANCES)
    check_choice("--dtype", o.dtype, options.DTYPES)


def check_steps(pipe: Any, steps: int) -> None:
    """That the pipeline's scheduler has so many steps.

    Raises:
        ArgumentError: It says that it has not.
    """
    scheduler = getattr(pipe, "scheduler", None)
    most = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if scheduler is not None and isinstance(most, int) and steps > most:
        try:
            copy.deepcopy(scheduler).set_timesteps(steps)
        except (ValueError, IndexError, RuntimeError) as error:
            raise ArgumentError(
                f"expected --steps that {type(scheduler).__name__} can take, got {steps}: {error}"
            ) from error


def draw_maps(o: MapOptions) -> None:
    """Run the command. Everything that can be wrong is looked at before the first network call."""
    settings = {k: v for k, v in asdict(o).items() if k not in ("out", "device")}
    settings |= {"posterior": "fitted" if o.posterior is None else "given", "model": show.name_of(o.model)}
    check_options(o)
    propagation = propagation_of(o)
    where = show.chosen_device(o.device)
    pipe, data = load_model(o.model, o.scheduler, getattr(torch, o.dtype))
    check_steps(pipe, o.steps)
    wanted = Wanted(o.prompts, o.classes, o.num_samples, o.steps, o.guidance_scale, o.eta)
    count = len(call_of(pipe, wanted).titles)
    if o.posterior is None and data is None:
        raise ArgumentError(
            f"expected --posterior beside {o.model!r}, which has no data to fit one to, got none: make one with bayesdiff fit"
        )
    laplace = None if o.posterior is None else LaplacePosterior.load(o.posterior)
    if laplace is not None:
        laplace.check(pipe)
    check_output_folder(o.out)
    pipe.to(where)

    seconds: dict[str, float] = {}
    if laplace is None:
        with show.timed(seconds, "fit"):
            laplace = show.fit_shipped(pipe, data, o.seed, structure=o.structure, covariance=o.covariance)
        laplace.save(o.out / "posterior")
    up = UncertaintyPipeline(pipe, laplace, propagation=propagation)
    call = call_of(pipe, wanted, show.seeded(o.seed, count))
    number = getattr(propagation, "draws", getattr(propagation, "members", None))
    settings["num_tangents"] = number
    draws = "" if number is None else f" of {number} weight draws"
    show.say(f"sampling {count} × {o.steps} steps with {o.propagation}{draws}")
    with show.timed(seconds, "sampling"):
        output = up(**call.keywords)

    files, written = write_samples(o.out, output)
    drawn = write_figure_of(o.out, output, call.titles)
    written += ["figure.png"] if drawn else []
    kind = "class" if o.classes else "prompt" if o.prompts else "number"
    samples = [
        {"file": file, kind: title, "seed": o.seed + i, **{k: float(v[i]) for k, v in output.scores().items()}}
        for i, (file, title) in enumerate(zip(files, call.titles, strict=True))
    ]
    calls = {"pipe": output.plain_calls, "all": output.calls}
    if output.other_calls:
        calls["other_modules"] = output.other_calls
    write_record(
        o.out, "map", where, settings=settings, samples=samples, posterior=show.describe(laplace), network_calls=calls,
        seconds=seconds, files=written,
    )  # fmt: skip
    std = output.std.flatten(1).double()
    show.show_table(
        ("sample", kind, "seed", "mean std", "largest std"),
        [
            (file, title, str(o.seed + i), f"{std[i].mean():.4f}", f"{std[i].max():.4f}")
            for i, (file, title) in enumerate(zip(files, call.titles, strict=True))
        ],
    )
    show.say(
        f"{output.calls} network calls, of which {output.plain_calls} the pipe's own, in {seconds['sampling']:.1f} s"
    )
    show.say(f"written to {o.out}: {'images, std.npz, figure.png' if drawn else 'std.npz'}, settings.json")
