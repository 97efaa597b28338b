r"""Fitting: one pass of a pretrained network over clean data, one network call for each draw.

For each image and each of its draws: :math:`x_t = \alpha_t x_0 + \sigma_t\varepsilon` goes through the network,
a hook takes the head's features, and features and residual go into the sufficient statistics. A pipeline's network is
called by the pipeline itself (:mod:`bayesdiff.fitting.by_pipe`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Generator, Tensor
from tqdm.auto import tqdm

from bayesdiff.checks import (
    ArgumentError,
    EmptyDataError,
    SketchWarning,
    check_int,
)
from bayesdiff.data import images_for
from bayesdiff.diffusion.density import Density, as_density
from bayesdiff.diffusion.weighting import P2, MinSNR, as_weighting
from bayesdiff.fitting.by_call import Call, check_images
from bayesdiff.fitting.seen import Seen
from bayesdiff.fitting.source import source_of, training_timesteps
from bayesdiff.fitting.steps import Steps, smaller
from bayesdiff.head.compiled import uncompiled
from bayesdiff.head.find import find_head
from bayesdiff.head.identity import NetworkIdentity
from bayesdiff.head.loaded import placement
from bayesdiff.laplace.checkpoint import Checkpoint, Journal, identity, named, told
from bayesdiff.laplace.cut import check_scores, check_settings
from bayesdiff.laplace.loss import Loss, as_loss
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.sketch import ROWS
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.laplace.training import choose_draws
from bayesdiff.rng import base_seed

#: Bytes that the gradients of single draws may take before they are sketched.
KEPT = 2**30


@uncompiled()
def fit(
    pipe_or_model: Any,
    images: Any,
    prompts: Any = None,
    *,
    structure: str = "full",
    covariance: str = "sandwich",
    draws_per_image: int | None = None,
    dataset_size: int | None = None,
    training_draws: float | None = None,
    prior_precision: float | Tensor | str | None = None,
    noise_variance: float | Tensor | str = "residual",
    loss: str | Loss = "squares",
    loss_weights: str | Tensor | MinSNR | P2 | Callable[[Tensor], Tensor] = "uniform",
    timestep_density: str | Density = "uniform",
    batch_size: int = 64,
    noise_bins: int = 10,
    scheduler: Any = None,
    call: Call | None = None,
    pipe_kwargs: Mapping[str, Any] | None = None,
    space: str | None = None,
    encode: str = "sample",
    size: int | tuple[int, int] | None = None,
    value_range: tuple[float, float] | str | None = None,
    convert: bool = False,
    head: str | None = None,
    sketch: int | str | None = "auto",
    generator: Generator | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LaplacePosterior:
    r"""Fit the Laplace posterior of a network's output layer. The network is not changed.

    A pipeline is run as it is, on drawn timesteps and noisy images: its encoders, its text and other inputs, its way to tell the
    network t and to read its output are those of its own call. Guidance is off: no network is trained with it.

    Args:
        pipe_or_model: A diffusers pipeline, or a denoising network (then give ``scheduler``).
        images: Clean images: a folder, with captions or labels in ``metadata.jsonl`` or ``metadata.csv``; a
            ``datasets.Dataset``; a torch ``Dataset``; PIL images; arrays of bytes, or of numbers in [−1, 1]; or samples as the
            pipeline's scheduler has them (scaled latents). A tensor is ``(n, C, H, W)``, ``(n, C, F, H, W)`` for videos; a
            mapping has ``"images"`` and, beside it, whatever the pipeline's call or the network must be told for each image, by
            its own name (``"prompts"``, ``"class_labels"``, ``"mask_image"``, ``"encoder_hidden_states"``, …), each with n
            rows; an iterable gives batches of either (:func:`bayesdiff.data.open_images`).
        prompts: One for each image, or one for all, instead of those that the data have.
        structure: ``"full"``, ``"kron"``, ``"diag"`` or ``"lowrank"``; the posterior's :meth:`~LaplacePosterior.recut` gives
            the others without another pass.
        covariance: ``"sandwich"`` (robust, clustered by image), ``"ggn"`` or ``"ef"``.
        draws_per_image: m, how many (t, ε) are drawn for each image. By default 10 where ``training_draws`` is given (no more
            than it says, rounded up, and at least two), else 1. Fewer than M are faster and project
            (:class:`~bayesdiff.checks.ProjectionWarning`).
        dataset_size: N, the number of images that the network was trained on; by default n, and the
            posterior is that of a network trained on these n images.
        training_draws: M, how many (t, ε) each of these images had in the training, steps · batch size / N on average. The
            covariance is H⁻¹ (A/N + B/(N M)) H⁻¹, A between images and B between the draws of one
            (:mod:`bayesdiff.laplace.training`). By default m, with a warning.
        prior_precision: τ; by default the maximum of the evidence, ``"channel"`` for one τ for each output channel.
        noise_variance: σ_t²: ``"residual"``, ``"evidence"``, a number, or one for each of the ``noise_bins``.
        loss: For the sandwich, the loss that the network was trained with: ``"squares"``, ``"l1"``, ``"huber"`` (and
            ``"smooth-l1"``), ``"pseudo-huber"``, all with δ = 1, or an object: ``bayesdiff.Huber(0.1)``.
        loss_weights: For the sandwich, the weights over t of that loss:
            ``"uniform"`` (DDPM's simple loss, and most others), ``"min-snr"`` (γ = 5), ``"p2"``, ``bayesdiff.MinSNR(…)``,
            ``bayesdiff.P2(…)``, a function of t/T in [0, 1] to weights, ``"noise"`` (1/σ_t²), or a tensor with
            one for each of the ``noise_bins``.
        timestep_density: How often t was drawn in the training: ``"uniform"``, ``"logit-normal"`` (0, 1), ``"gaussian"`` around
            the middle, ``bayesdiff.LogitNormal(…)``, ``bayesdiff.TruncatedNormal(…)``, or a function of (generator, n) that
            returns n numbers t/T in [0, 1].
        batch_size: Rows in one network call.
        noise_bins: Equal bins of t in which the noise variance is estimated.
        scheduler: The schedule the network was trained with; by default the pipeline's.
        call: ``call(network, x, t, batch)`` runs a network that is called in a way of its own and returns its output; x, t
            and what ``batch`` has from the data have a row for each draw.
        pipe_kwargs: Keywords for all calls of the pipeline: the ``guidance_scale`` that a guidance-embedded network was trained
            at, ``max_sequence_length``, …
        space: Whether images are ``"pixels"``, to be encoded, or ``"samples"``; by default told by their channels.
        encode: ``"sample"``: the encoder's posterior is sampled anew for each draw, as in training; or its ``"mean"``.
        size: (height, width) that images are cropped and resized to; by default files and PIL images become what the model
            was trained on, as its configuration has it, and arrays stay as they are.
        value_range: Of arrays, (black, white), or ``"as-is"`` for numbers in the network's space; by default bytes are 0 to
            255, and floating-point numbers −1 to 1.
        convert: Turn grey, transparent, palette and CMYK images into what the network takes, instead of an error.
        head: Exact path of the output layer, for networks the package does not know.
        sketch: R: keep so many random mixtures of the images' gradients instead of all of them, which have C·D numbers each
            (:mod:`bayesdiff.laplace.sketch`); variances then have a relative error of √(2/R). ``"auto"``: 256 once all of them
            take more than 1 GiB, with a warning. None: keep them all.
        generator: For timesteps and noise. The draws do not depend on ``batch_size``.
        checkpoint: A folder, or a :class:`~bayesdiff.laplace.checkpoint.Checkpoint`, for what is done so far: a fit that was
            killed goes on from there, to the same bits. It stays there when the fit is done.
        progress: Show a progress bar.

    Returns:
        A :class:`LaplacePosterior`, with the sums it came from as ``.statistics``.

    Raises:
        EmptyDataError: There are no images.
        BadImagesError: Some images cannot be used; all are listed.
        UnknownNameError: A label is the name of no class of the model.
        CheckpointError: The checkpoint is damaged, or of another fit.
        HeadMismatchError: The network's weights changed while it was fitted to.
        ShapeError: The images don't fit the network.
        NonFiniteError: Images, features or residuals are NaN or infinite.
        ArgumentError: An argument is out of range or missing (prompts for a network of text), or the network is in training mode.
        NotRepeatableError: The network gives the same call another answer: dropout, noise of its own, a block cache.
        UnsupportedPipelineError: The pipeline cannot be followed; the message has what was measured.
        UnsupportedSchedulerError: The scheduler's timesteps are not those of a known schedule.
        HeadNotFoundError, AmbiguousHeadError, UnsupportedHeadError: See :func:`find_head`.

    Warns:
        TrainingDrawsWarning: ``training_draws`` is not given.
        ProjectionWarning: The covariance over M draws, estimated from fewer, was indefinite.
        SketchWarning: Gradients are sketched from now on, because they are many and large.
    """
    if sketch is not None and sketch != "auto":
        sketch = check_int("sketch", sketch, least=2)
    draws_per_image = choose_draws(draws_per_image, training_draws)
    density, weighting, loss = as_density(timestep_density), as_weighting(loss_weights), as_loss(loss)
    check_int("batch_size", batch_size, least=1)
    check_int("noise_bins", noise_bins, least=1)
    check_scores(covariance, loss, weighting is not None)
    source = source_of(
        pipe_or_model, head=head, scheduler=scheduler, call=call, pipe_kwargs=pipe_kwargs, space=space, encode=encode
    )
    settings: dict[str, Any] = {
        "structure": structure, "covariance": covariance, "prior_precision": prior_precision,
        "noise_variance": noise_variance, "loss_weights": loss_weights if weighting is None else "uniform",
        "dataset_size": dataset_size, "training_draws": training_draws,
    }  # fmt: skip
    found = source.observer.known
    if found is not None:
        check_settings(found.out_channels, noise_bins, **settings)
    num_timesteps = training_timesteps(source.scheduler)
    seed = base_seed(generator)
    data = images_for(
        pipe_or_model, source.network, images, prompts, space=space, size=size, value_range=value_range, convert=convert
    )
    if dataset_size is not None:
        check_int("dataset_size", dataset_size, least=1)
    if dataset_size is not None and data.length is not None and dataset_size < data.length:
        raise ArgumentError(f"expected dataset_size >= the {data.length} images to fit to, got {dataset_size}")
    of_sums = {
        "seed": seed, "draws_per_image": draws_per_image, "noise_bins": noise_bins, "head": head, "space": space,
        "encode": encode, "pipe_kwargs": told(pipe_kwargs or {}), "scheduler": told(source.scheduler.config),
        "call": named(call), "loss": repr(loss), "density": named(density),
        "weighting": None if weighting is None else named(loss_weights), "sketch": sketch,
    }  # fmt: skip
    journal = Journal(checkpoint, lambda: identity(pipe_or_model, data, **of_sums), placement(source.network)[0])
    statistics: Statistics | None = journal.statistics
    first = journal.images
    if journal.head is not None:
        source.observer.known = find_head(source.network, journal.head)

    network = NetworkIdentity.of(source.network)

    def consume(rows: Tensor, t: Tensor, target: Tensor, seen: Seen) -> None:
        nonlocal statistics
        if statistics is None:
            head = source.observer.head
            check_settings(head.out_channels, noise_bins, **settings)
            statistics = Statistics(
                head.geometry, noise_bins, seen.output.device, loss=loss, weighted=weighting is not None,
                sketch=None if isinstance(sketch, str) else sketch,
            )  # fmt: skip
        bins = (t * noise_bins / num_timesteps).long().clamp(max=noise_bins - 1)
        weights = None if weighting is None else weighting(source.scheduler, t)
        residual = target.to(seen.output.device) - seen.output
        for x, r, draws, of in seen.fold.observations(source.observer.head, seen.inputs, residual):
            draws = draws.to(rows.device)
            statistics.update(x, r, bins[draws], first + rows[draws], of, None if weights is None else weights[draws])

    try:
        with tqdm(total=data.length, initial=first, desc="fit", unit="image", disable=not progress) as bar:
            for batch in data.batches(batch_size, first):
                for x, conditioning in smaller(batch, draws_per_image):
                    check_images(x)
                    clean = source.clean(x, conditioning)
                    Steps(source, clean, conditioning, seed, first, draws_per_image, batch_size, density).run(consume)
                    settle(statistics, sketch)
                    first += len(x)
                    bar.update(len(x))
                journal.keep(statistics, source.observer.known, first)
        journal.keep(statistics, source.observer.known, first, now=True)
    finally:
        journal.close()
    if statistics is None:
        raise EmptyDataError("expected at least one image to fit to, got none")
    network.check(source.network, "as it was when the fit began")
    return LaplacePosterior.from_statistics(
        statistics, source.observer.head, num_timesteps=num_timesteps, network=network, **settings
    )


def settle(statistics: Statistics | None, sketch: int | str | None) -> None:
    """All draws of the images so far are in the statistics: their gradients may be sketched."""
    if statistics is None:
        return
    if sketch == "auto" and statistics.sketch is None and statistics.score_bytes > KEPT:
        warnings.warn(
            f"the gradients of {statistics.num_images} images take {statistics.score_bytes / 2**30:.1f} GiB: from here on they "
            f"are sketched by {ROWS} random mixtures; variances have a relative error of {(2 / ROWS) ** 0.5:.0%}, and neither "
            'covariance "ef" nor loss_weights by bin can be cut; sketch=None keeps them all, sketch=R asks for other errors',
            SketchWarning, stacklevel=3,
        )  # fmt: skip
        statistics.settle(ROWS)
    statistics.settle()
