r"""``bd.evaluate``: are predictions of held-out data calibrated, and by which variance? For any model and any data.

Of each held-out image, noised to a timestep of each bin, the residual r = g − f of the network is compared with what is
predicted of it: by the weights' variance φᵀΣφ alone; by each noise model (:mod:`bayesdiff.calibration.noise_models`) and the
weights; and by the settings of BayesDiff (σ = 1, prior 1, diagonal empirical Fisher). Noise models are fitted to a random half
of the images and judged on the other.

What these numbers test is the sum of (1) what the weights leave open and (2) what the data do; of that sum (1) is a small
part, which the report states. Refits and retrainings alone can test (1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from bayesdiff.calibration.heldout import HeldOut, Observed, Times
from bayesdiff.calibration.metrics import CRPS, ENCE, GaussianNLL, IntervalCoverage, Sharpness
from bayesdiff.calibration.noise_models import SCALES, Noise, Sample, fit_noise
from bayesdiff.calibration.report import Report
from bayesdiff.calibration.shape_fits import SHAPES
from bayesdiff.calibration.shapes import Prediction
from bayesdiff.checks import ArgumentError, EmptyDataError, check_choice, check_int
from bayesdiff.data import images_for
from bayesdiff.fitting.by_call import Call
from bayesdiff.fitting.source import source_of
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.rng import base_seed

WEIGHTS, THEIRS, THEIR_NOISE = "weights only", "BayesDiff, weights only", "BayesDiff, σ = 1"

#: Held-out images.
LEAST = 8


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated.

    Args:
        bins: Equal bins of t.
        timesteps: Only these instead, each a bin of its own: what a distilled network is called at.
        levels: Nominal probabilities of central intervals.
        scales: Of the noise models, some of ``"constant"``, ``"tweedie"``, ``"log-linear"``.
        shapes: Some of ``"normal"``, ``"student-t"``, ``"quantiles"``.
        draws: (t, ε) of each image in each bin.
        probes: Numbers of each sample at which Tweedie's variance is measured, one network call each. It is judged at these.
        positions: Of the head's output, of each row, that noise models are fitted to.
        batch_size: Rows in a network call.

    Raises:
        ArgumentError: A setting is out of range.
    """

    bins: int = 10
    timesteps: Sequence[float] | None = None
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)
    scales: Sequence[str] = SCALES
    shapes: Sequence[str] = SHAPES
    draws: int = 1
    probes: int = 8
    positions: int = 64
    batch_size: int = 50

    def __post_init__(self) -> None:
        for name, least in (("bins", 1), ("draws", 1), ("probes", 0), ("positions", 1), ("batch_size", 1)):
            check_int(name, getattr(self, name), least=least)
        for scale in self.scales:
            check_choice("scales", scale, SCALES)
        for shape in self.shapes:
            check_choice("shapes", shape, SHAPES)
        IntervalCoverage(self.levels)  # checks them
        if self.timesteps is not None and not len(self.timesteps):
            raise ArgumentError("expected at least one of timesteps, got none")

    def times(self, total: int) -> list[Times]:
        """Where timesteps of each bin are drawn.

        Raises:
            ArgumentError: A timestep is not from 0 to T.
        """
        if self.timesteps is None:
            return [Times(total * b / self.bins, total * (b + 1) / self.bins) for b in range(self.bins)]
        if not all(0 <= t <= total for t in self.timesteps):
            raise ArgumentError(f"expected timesteps from 0 to {total}, got {list(self.timesteps)}")
        return [Times(float(t), float(t)) for t in self.timesteps]


class Judge:
    """The scores of one method in one bin.

    Args:
        levels: Of intervals.
        images: How many there are.
    """

    def __init__(self, levels: Sequence[float], images: int) -> None:
        self.coverage, self.nll, self.crps, self.ence = IntervalCoverage(levels), GaussianNLL(), CRPS(), ENCE()
        self.sharpness = Sharpness()
        self.inside = torch.zeros(images, len(self.coverage.levels), dtype=torch.float64)
        self.count = torch.zeros(images, dtype=torch.float64)

    def add(self, prediction: Prediction, residual: Tensor, image: Tensor) -> None:
        """Predictions, residuals and the number of the image of each, ``(n,)``."""
        for metric in (self.coverage, self.nll, self.crps, self.ence):
            metric.update(prediction, residual)
        self.sharpness.update(prediction)
        ends = [prediction.interval(level) for level in self.coverage.levels]
        inside = torch.stack([((low <= residual) & (residual <= high)).double() for low, high in ends], dim=1)
        self.inside.index_add_(0, image, inside.cpu())
        self.count.index_add_(0, image, torch.ones(len(image), dtype=torch.float64))

    def row(self) -> dict[str, Any]:
        """The scores; standard errors are over images, whose numbers are not independent."""
        found, own = self.coverage.compute(), self.inside[self.count > 0] / self.count[self.count > 0, None]
        error = own.std(0) / len(own) ** 0.5 if len(own) > 1 else torch.full((own.shape[1],), float("nan"))
        return {
            "coverage": found["coverage"].tolist(), "coverage_error": error.tolist(), "width": found["width"].tolist(),
            "nll": float(self.nll.compute()), "crps": float(self.crps.compute()), "ence": float(self.ence.compute()),
            "spread": float(self.sharpness.compute()["rms"]), "numbers": int(self.count.sum()), "images": len(own),
        }  # fmt: skip


def evaluate(
    posterior: LaplacePosterior,
    pipe_or_model: Any,
    images: Any,
    prompts: Any = None,
    *,
    settings: Evaluation | None = None,
    scheduler: Any = None,
    call: Call | None = None,
    pipe_kwargs: Mapping[str, Any] | None = None,
    space: str | None = None,
    encode: str = "sample",
    size: int | tuple[int, int] | None = None,
    value_range: tuple[float, float] | str | None = None,
    convert: bool = False,
    generator: Generator | None = None,
    progress: bool = True,
) -> Report:
    r"""Calibration of a network's predictions of held-out images, by bins of t.

    Args:
        posterior: Of the network's head.
        pipe_or_model: As of :func:`bayesdiff.fit`.
        images: Held-out images, at least eight: neither the network nor the posterior saw them. Any form that
            :func:`bayesdiff.fit` takes.
        prompts: As of :func:`bayesdiff.fit`.
        settings: An :class:`Evaluation`.
        scheduler: As of :func:`bayesdiff.fit`, like all that follow.
        call: How a network is called.
        pipe_kwargs: Keywords of the pipeline's calls.
        space: ``"pixels"`` or ``"samples"``.
        encode: ``"sample"`` or ``"mean"``, as the network was trained.
        size: Of images.
        value_range: Of arrays.
        convert: Whether images are converted.
        generator: Of timesteps, noise, the places that are measured, and which half noise models are fitted to.
        progress: Show a progress bar.

    Returns:
        A :class:`Report`: ``print`` it, ``.save(folder)``, ``.rows``, ``.noise``.

    Raises:
        EmptyDataError: Fewer than eight images.
        ArgumentError: A setting is out of range, or residuals are all 0.
        HeadMismatchError: The posterior is of another network.
        ArgumentError, ShapeError, NonFiniteError, UnsupportedPipelineError, UnsupportedSchedulerError, UnsupportedHeadError,
            BadImagesError: As of :func:`bayesdiff.fit`.
    """
    settings = Evaluation() if settings is None else settings
    if not isinstance(settings, Evaluation):
        raise ArgumentError(f"expected settings as bayesdiff.Evaluation(…), got {type(settings).__name__}")
    if not isinstance(posterior, LaplacePosterior):
        raise ArgumentError(f"expected a LaplacePosterior, of bayesdiff.fit, got {type(posterior).__name__}")
    posterior.check(pipe_or_model, posterior.head_path)
    source = source_of(
        pipe_or_model, head=posterior.head_path, scheduler=scheduler, call=call, pipe_kwargs=pipe_kwargs, space=space,
        encode=encode,
    )  # fmt: skip
    data = images_for(
        pipe_or_model, source.network, images, prompts, space=space, size=size, value_range=value_range, convert=convert
    )
    probes = settings.probes if "tweedie" in settings.scales else 0
    held = HeldOut(source, data, base_seed(generator), settings.batch_size, probes)
    if len(held) < LEAST:
        raise EmptyDataError(
            f"expected at least {LEAST} held-out images, half of them to fit noise models to, got {len(held)}"
        )
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(held.seed))
    fitted_on = torch.zeros(len(held), dtype=torch.bool)
    fitted_on[order[: len(held) // 2]] = True
    posteriors, notes = candidates(posterior)
    times = settings.times(held.total)
    rows: list[dict[str, Any]] = []
    noise: list[dict[str, Noise]] = []
    for b, where in enumerate(tqdm(times, desc="evaluate", unit="bin", disable=not progress)):
        bin_of = Bin(held, posterior, posteriors, settings, b, where)
        noise.append(bin_of.fit(fitted_on))
        rows += bin_of.judge(noise[-1], ~fitted_on)
    return Report(
        rows, tuple(float(v) for v in settings.levels), noise, int(fitted_on.sum()), int((~fitted_on).sum()), notes
    )


def candidates(posterior: LaplacePosterior) -> tuple[dict[str, LaplacePosterior], list[str]]:
    """Posteriors whose weights are judged, and what could not be had."""
    found, notes = {WEIGHTS: posterior}, []
    try:
        found[THEIRS] = posterior.recut(structure="diag", covariance="ef", prior_precision=1.0, noise_variance=1.0)
    except ArgumentError as error:
        notes.append(f"BayesDiff's settings could not be cut from this posterior: {error}")
    return found, notes


class Bin:
    """One bin of t.

    Args:
        held: The held-out images.
        posterior: Of the head.
        posteriors: Whose weights are judged alone.
        settings: What is evaluated.
        number: Of the bin.
        times: Its timesteps.
    """

    def __init__(
        self, held: HeldOut, posterior: LaplacePosterior, posteriors: Mapping[str, LaplacePosterior], settings: Evaluation,
        number: int, times: Times,
    ) -> None:  # fmt: skip
        self.held, self.posterior, self.posteriors, self.settings = held, posterior, posteriors, settings
        self.streams = [number * settings.draws + d for d in range(settings.draws)]
        self.times = times
        self.generator = torch.Generator().manual_seed((held.seed + number) % 2**63)

    def fit(self, chosen: Tensor) -> dict[str, Noise]:
        """Noise models of all scales and shapes."""
        rows = (o for stream in self.streams for o in self.held.observe(stream, self.times, chosen))
        sample = Sample.of(self.posterior.geometry, rows, self.settings.positions, self.generator)
        return {
            name(scale, shape): noise
            for scale in self.settings.scales
            for shape, noise in fit_noise(sample, scale, self.settings.shapes).items()
        }

    def judge(self, noise: Mapping[str, Noise], chosen: Tensor) -> list[dict[str, Any]]:
        """One row of scores for each method."""
        geometry, judges = self.posterior.geometry, {}
        for method in (*self.posteriors, *([THEIR_NOISE] if THEIRS in self.posteriors else []), *noise):
            judges[method] = Judge(self.settings.levels, len(self.held))
        squares, spent, count = 0.0, 0.0, 0
        for stream in self.streams:
            for rows in self.held.observe(stream, self.times, chosen):
                weights = {k: p.variance(rows.inputs).to(rows.residual) for k, p in self.posteriors.items()}
                everywhere = torch.ones_like(rows.residual, dtype=torch.bool)
                for method, variance in weights.items():
                    zero = torch.zeros_like(variance)
                    judges[method].add(
                        *_flat(rows, Prediction(zero[everywhere], variance[everywhere].sqrt()), everywhere)
                    )
                    if method == THEIRS:
                        one = (1 + variance[everywhere]).sqrt()
                        judges[THEIR_NOISE].add(*_flat(rows, Prediction(torch.zeros_like(one), one), everywhere))
                for method, model in noise.items():
                    judges[method].add(*_flat(rows, *model.predict(geometry, rows, weights[WEIGHTS])))
                squares += float(rows.residual.square().sum())
                spent += float(weights[WEIGHTS].sum())
                count += rows.residual.numel()
        common = {
            "t_low": self.times.low, "t_high": self.times.high, "squared_residual": squares / count,
            "weights_variance": spent / count, "weights_share": spent / squares,
        }  # fmt: skip
        return [{"method": method, **common, **judge.row()} for method, judge in judges.items()]


def name(scale: str, shape: str) -> str:
    """Of a noise model."""
    return scale if shape == "normal" else f"{scale}, {shape}"


def _flat(rows: Observed, prediction: Prediction, known: Tensor) -> tuple[Prediction, Tensor, Tensor]:
    image = rows.image.view(-1, *(1,) * (rows.residual.ndim - 1)).expand(rows.residual.shape)
    moved = Prediction(prediction.location.cpu(), prediction.scale.cpu(), prediction.shape)
    return moved, rows.residual[known].cpu(), image[known.cpu()]
