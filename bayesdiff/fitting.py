r"""Fitting: one pass of a pretrained network over clean data, one network call per draw.

For each image and each of its draws: :math:`x_t = \alpha_t x_0 + \sigma_t\varepsilon` goes through the network,
a hook takes the head's features, and features and residual go into the sufficient statistics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from bayesdiff.checks import (
    AmbiguousHeadError,
    ArgumentError,
    EmptyDataError,
    HeadNotFoundError,
    ShapeError,
    UnsupportedHeadError,
    check_finite,
    check_int,
)
from bayesdiff.data import framing_of, known_classes, open_images
from bayesdiff.diffusion.noising import draw, noised
from bayesdiff.head.find import check_eval, denoiser, find_head, find_head_by_call
from bayesdiff.head.fold import Fold
from bayesdiff.head.layer import Head
from bayesdiff.head.loaded import placement
from bayesdiff.laplace.checkpoint import Checkpoint, Journal, identity
from bayesdiff.laplace.cut import check_settings
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.rng import base_seed


def fit(
    pipe_or_model: Any,
    data: Any,
    prompts: Any = None,
    *,
    structure: str = "full",
    covariance: str = "sandwich",
    draws_per_image: int = 1,
    dataset_size: int | None = None,
    prior_precision: float | Tensor | str | None = None,
    noise_variance: float | Tensor | str = "residual",
    loss_weights: str | Tensor = "uniform",
    batch_size: int = 64,
    noise_bins: int = 10,
    scheduler: Any = None,
    head: str | None = None,
    generator: Generator | None = None,
    progress: bool = True,
    size: int | tuple[int, int] | None = None,
    value_range: tuple[float, float] | str | None = None,
    convert: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> LaplacePosterior:
    r"""Fit the Laplace posterior of a network's output layer. The network is not changed.

    Args:
        pipe_or_model: A diffusers pipeline, or its denoising network (then give ``scheduler``).
        data: Clean data: a folder of images, a ``datasets.Dataset``, a torch ``Dataset``, PIL images, arrays of bytes, or
            what is in the network's own space (pixels in [−1, 1], or scaled latents) already: a tensor ``(n, C, H, W)``; a
            mapping with ``"images"`` and, beside it, the network's other keyword arguments (``"class_labels"``,
            ``"encoder_hidden_states"``, …), each with n rows; or an iterable of batches
            (:func:`bayesdiff.data.open_images`).
        prompts: A caption for each image, or a label, instead of those that the data have.
        structure: ``"full"``, ``"kron"``, ``"diag"`` or ``"lowrank"``; the posterior's :meth:`~LaplacePosterior.recut` gives
            the others without another pass.
        covariance: ``"sandwich"`` (robust, clustered by image), ``"ggn"`` or ``"ef"``.
        draws_per_image: How many (t, ε) are drawn for each image.
        dataset_size: N, the number of images that the network was trained on; by default n, and the
            posterior is that of a network trained on these n images.
        prior_precision: τ; by default the maximum of the evidence, ``"channel"`` for one τ for each output channel.
        noise_variance: σ_t²: ``"residual"``, ``"evidence"``, a number, or one for each of the ``noise_bins``.
        loss_weights: For the sandwich, the weights over t of the loss that the network was trained with:
            ``"uniform"`` (DDPM's simple loss, and most others), ``"noise"`` (1/σ_t²), or a tensor with
            one for each of the ``noise_bins``.
        batch_size: Rows in one network call.
        noise_bins: Equal bins of t in which the noise variance is estimated.
        scheduler: The schedule the network was trained with; by default the pipeline's.
        head: Exact path of the output layer, for networks the package does not know.
        generator: For timesteps and noise. The draws do not depend on ``batch_size``.
        progress: Show a progress bar.
        size: (height, width) that images are cropped and resized to; by default files and PIL images become what the model
            was trained on, as its configuration has it.
        value_range: Of arrays, (black, white), or ``"as-is"`` for numbers in the network's space; by default bytes are 0 to
            255, and floating-point numbers −1 to 1.
        convert: Turn grey, transparent, palette and CMYK images into what the network takes, instead of an error.
        checkpoint: A folder, or :class:`~bayesdiff.laplace.checkpoint.Checkpoint`, for what is done so far: a fit that was
            killed goes on from there, to the same bits. It stays there when the fit is done.

    Returns:
        A :class:`LaplacePosterior`, with the sums it came from as ``.statistics``.

    Raises:
        EmptyDataError: There are no images.
        ShapeError: The images don't fit the network.
        NonFiniteError: Images, features or residuals are NaN or infinite.
        ArgumentError: An argument is out of range, or the network is in training mode.
        BadImagesError: Some images cannot be used; all are listed.
        UnknownNameError: A label is the name of no class of the model.
        CheckpointError: The checkpoint is damaged, or of another fit.
        HeadNotFoundError, AmbiguousHeadError, UnsupportedHeadError: See :func:`find_head`.
    """
    check_int("draws_per_image", draws_per_image, least=1)
    check_int("batch_size", batch_size, least=1)
    network = denoiser(pipe_or_model, head)
    found = _known_head(pipe_or_model, head)
    check_eval(network)
    settings: dict[str, Any] = {
        "structure": structure, "covariance": covariance, "prior_precision": prior_precision,
        "noise_variance": noise_variance, "loss_weights": loss_weights, "dataset_size": dataset_size,
    }  # fmt: skip
    check_int("noise_bins", noise_bins, least=1)
    if found is not None:
        check_settings(found.out_channels, noise_bins, **settings)
    if scheduler is None:
        scheduler = getattr(pipe_or_model, "scheduler", None)
    if scheduler is None:
        raise ArgumentError("expected a pipeline, or scheduler=… beside a bare network, got neither")
    num_timesteps = int(scheduler.config.num_train_timesteps)
    device, dtype = placement(network)
    seed = base_seed(generator)
    data = open_images(
        data,
        prompts,
        framing_of(pipe_or_model, network, size, value_range, convert),
        names=known_classes(pipe_or_model),
    )
    settings_of_sums = {
        "seed": seed, "draws_per_image": draws_per_image, "noise_bins": noise_bins, "head": head,
        "scheduler": str(scheduler.config),
    }  # fmt: skip
    journal = Journal(checkpoint, lambda: identity(pipe_or_model, data, **settings_of_sums), device)
    statistics: Statistics | None = journal.statistics
    images_per_call = max(1, batch_size // draws_per_image)
    folds: dict[tuple[Any, ...], Fold] = {}
    first = journal.images
    with tqdm(total=data.length, initial=first, desc="fit", unit="image", disable=not progress) as bar:
        for images, conditioning in data.batches(images_per_call, first):
            _check_images(images, network)
            count = len(images)
            t, noise = draw(scheduler, tuple(images.shape[1:]), seed, first, count, draws_per_image)
            rows = torch.arange(count).repeat_interleave(draws_per_image)
            clean = images.repeat_interleave(draws_per_image, dim=0).to(device)
            conditioning = {
                k: _placed(v.repeat_interleave(draws_per_image, dim=0), device, dtype) for k, v in conditioning.items()
            }
            x_t, wanted = noised(scheduler, clean, noise.to(device), t)
            for part in torch.arange(len(rows)).split(batch_size):
                call = partial(
                    _forward,
                    network,
                    x_t[part].to(dtype),
                    t[part].to(device),
                    {k: v[part] for k, v in conditioning.items()},
                )
                if found is None:
                    found = find_head_by_call(network, call)
                    check_settings(found.out_channels, noise_bins, **settings)
                statistics = statistics or Statistics(found.geometry, noise_bins, device)
                inputs, own, output = _call(call, found)
                target = wanted[part].to(output.device)
                if output.shape != target.shape:
                    raise ShapeError(
                        f"expected the network to return {tuple(target.shape)}, as its target, got {tuple(output.shape)}"
                    )
                if (key := (own.shape, output.shape)) not in folds:
                    found.check_linear(inputs, own)
                    folds[key] = _fold(found, inputs, own, output, call)
                bins = (t[part] * noise_bins / num_timesteps).long().clamp(max=noise_bins - 1)
                for x, r, draws, of in folds[key].observations(found, inputs, target - output):
                    draws = draws.to(rows.device)
                    statistics.update(x, r, bins[draws], first + rows[part][draws], of)
            first += count
            bar.update(count)
            journal.keep(statistics, first)
    journal.keep(statistics, first, now=True)
    if found is None or statistics is None:
        raise EmptyDataError("expected at least one image to fit to, got none")
    return LaplacePosterior.from_statistics(statistics, found, num_timesteps=num_timesteps, **settings)


def _known_head(model: Any, head: str | None) -> Head | None:
    """The head by its name, or None where it must be found by running the network."""
    try:
        return find_head(model, head)
    except (HeadNotFoundError, AmbiguousHeadError, UnsupportedHeadError):
        if head is not None:
            raise
        return None


def _forward(network: nn.Module, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    try:
        with torch.no_grad():
            return network(x, timestep=t, return_dict=False, **conditioning)[0]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ShapeError(
            f"expected images and conditioning that fit {type(network).__name__}, got images {tuple(x.shape[1:])} "
            f"and { {k: tuple(v.shape[1:]) for k, v in conditioning.items()} }; the network says: {error}"
        ) from error


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On the network's device, and floating-point numbers in its dtype."""
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _call(call: Callable[[], Tensor], head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """One network call: what entered the head, what it returned, and the network's output."""
    own: list[Tensor] = []
    with head.capture(own) as captured:
        output = call()
    if len(captured) != 1:
        raise UnsupportedHeadError(f"expected one pass through {head.path!r} in a network call, got {len(captured)}")
    return captured[0], own[0], output


def _fold(head: Head, inputs: Tensor, own: Tensor, output: Tensor, call: Callable[[], Tensor]) -> Fold:
    """What the network does to its head's output: nothing, or a fold, which is read with one more call."""
    same = own.shape == output.shape and torch.allclose(own, output, rtol=0, atol=0, equal_nan=True)
    if same and own.unique().numel() > 1:
        return Fold(None)
    check_finite("features", inputs, "the network overflows in this dtype: use bfloat16 or float32")
    return Fold.read(head, call)


def _check_images(images: Tensor, network: nn.Module) -> None:
    if not images.is_floating_point():
        raise ArgumentError(
            f"expected floating-point images in the network's space (pixels in [-1, 1]), got {images.dtype}"
        )
    channels = getattr(getattr(network, "config", None), "in_channels", None)
    if images.ndim < 2 or (images.ndim != 4 and channels is not None and channels not in images.shape[1:]):
        raise ShapeError(f"expected images (n, channels, height, width), got {tuple(images.shape)}")
    if images.ndim == 4 and channels not in (None, images.shape[1]):
        raise ShapeError(f"expected images of {channels} channels, got {images.shape[1]} in {tuple(images.shape)}")
    check_finite("images", images)
