"""``bayesdiff evaluate`` and ``bayesdiff compare``: is the posterior of a model calibrated, and is Monte Carlo needed for it?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bayesdiff.calibration.comparison import compare
from bayesdiff.calibration.evaluation import Evaluation, evaluate
from bayesdiff.checks import ArgumentError, check_choice, check_int, check_output_folder
from bayesdiff.cli import main as options
from bayesdiff.cli import show
from bayesdiff.cli.models import load_model
from bayesdiff.cli.results import write_record
from bayesdiff.data import images_for
from bayesdiff.fitting.one_step import features
from bayesdiff.fitting.source import training_timesteps
from bayesdiff.head.find import denoiser
from bayesdiff.laplace.links import link
from bayesdiff.laplace.posterior import LaplacePosterior


@dataclass(frozen=True)
class JudgeOptions:
    """What both commands have in common.

    Args:
        data: A folder of held-out images; None: those that ship with the model.
        images: How many of them; None: all.
        posterior: A folder; None: one is fitted to the data that ship with the model.
    """

    out: Path
    model: str
    data: Path | None
    prompt: str | None
    images: int | None
    posterior: Path | None
    size: int | None
    convert: bool
    seed: int
    dtype: str
    device: str | None


@dataclass(frozen=True)
class Opened:
    """A model with its posterior and held-out images."""

    pipe: Any
    posterior: LaplacePosterior
    data: Any
    device: torch.device


def opened(o: JudgeOptions) -> Opened:
    """Load and check everything, before any long work.

    Raises:
        ArgumentError: There is no posterior and no data to fit one to, or no held-out images.
    """
    for name in ("images", "size"):
        if getattr(o, name) is not None:
            check_int(f"--{name}", getattr(o, name), least=1)
    if o.data is not None and o.images is not None:
        raise ArgumentError("expected --images without --data: it is for the images that ship with a model, got both")
    show.check_seed(o.seed)
    check_choice("--dtype", o.dtype, options.DTYPES)
    where = show.chosen_device(o.device)
    pipe, shipped = load_model(o.model, None, getattr(torch, o.dtype))
    if shipped is None and o.data is None:
        raise ArgumentError(f"expected --data, a folder of held-out images for {show.name_of(o.model)}, got none")
    if shipped is None and o.posterior is None:
        raise ArgumentError(
            f"expected --posterior, of bayesdiff fit, for {show.name_of(o.model)}, got none: it ships no data to fit one to"
        )
    posterior = None if o.posterior is None else LaplacePosterior.load(o.posterior, pipe)
    if o.data is not None:
        source: Any = images_for(pipe, denoiser(pipe), o.data, o.prompt, size=o.size, convert=o.convert)
    else:
        source = shipped.heldout.subset(slice(o.images))
    check_output_folder(o.out)
    pipe.to(where)
    if posterior is None:
        posterior = show.fit_shipped(pipe, shipped, o.seed)
    return Opened(pipe, posterior, source, where)


def run_evaluate(
    o: JudgeOptions, bins: int, timesteps: list[float] | None, probes: int, draws: int, batch_size: int
) -> None:
    """``bayesdiff evaluate``."""
    settings = Evaluation(bins=bins, timesteps=timesteps or None, probes=probes, draws=draws, batch_size=batch_size)
    found, seconds = opened(o), {}  # type: tuple[Opened, dict[str, float]]
    with show.timed(seconds, "evaluate"):
        report = evaluate(
            found.posterior, found.pipe, found.data, settings=settings, generator=torch.Generator().manual_seed(o.seed),
            progress=show.has_terminal(),
        )  # fmt: skip
    report.save(o.out)
    written = _written(o) | asdict(settings)
    write_record(
        o.out, "evaluate", found.device, settings=written, posterior=show.describe(found.posterior), seconds=seconds
    )
    show.say(str(report))
    show.say(f"written to {o.out}: calibration.json, calibration.png, settings.json")


def run_compare(o: JudgeOptions, links: list[str], draws: list[int]) -> None:
    """``bayesdiff compare``."""
    chosen = [link(name) for name in links]
    for n in draws:
        check_int("--draws", n, least=2)
    found = opened(o)
    total = training_timesteps(found.pipe.scheduler)
    count = len(found.data) if o.data is not None else found.data.num_images
    times = [total * (i + 0.5) / count // 1 for i in range(count)]
    generator = torch.Generator().manual_seed(o.seed)
    step = features(found.pipe, found.data, timesteps=times, generator=generator)
    comparison = compare(found.posterior, step, chosen, draws=draws, generator=generator)
    comparison.save(o.out)
    written = _written(o) | {"links": links, "draws": draws}
    write_record(o.out, "compare", found.device, settings=written, posterior=show.describe(found.posterior))
    show.say(str(comparison))
    show.say(f"written to {o.out}: comparison.json, comparison.png, settings.json")


def _written(o: JudgeOptions) -> dict[str, Any]:
    """The options for the record, without the names of folders."""
    out = {k: v for k, v in asdict(o).items() if k not in ("out", "device")}
    return out | {
        "model": show.name_of(o.model),
        "data": None if o.data is None else o.data.resolve().name,
        "posterior": None if o.posterior is None else o.posterior.resolve().name,
    }
