r"""Fitting: one pass of a pretrained network over clean data, one network call per draw.

For each image and each of its draws: :math:`x_t = \alpha_t x_0 + \sigma_t\varepsilon` goes through the network,
a hook takes the head's features, and features and residual go into the sufficient statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset
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
from bayesdiff.diffusion.density import Density, as_density
from bayesdiff.diffusion.noising import draw, noised
from bayesdiff.diffusion.weighting import P2, MinSNR, as_weighting
from bayesdiff.head.find import check_eval, denoiser, find_head, find_head_by_call
from bayesdiff.head.fold import Fold
from bayesdiff.head.layer import Head
from bayesdiff.head.loaded import placement
from bayesdiff.laplace.cut import check_settings
from bayesdiff.laplace.loss import Loss, as_loss
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.laplace.training import choose_draws
from bayesdiff.rng import base_seed


def fit(
    pipe_or_model: Any,
    data: Any,
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
    head: str | None = None,
    generator: Generator | None = None,
    progress: bool = True,
) -> LaplacePosterior:
    r"""Fit the Laplace posterior of a network's output layer. The network is not changed.

    Args:
        pipe_or_model: A diffusers pipeline, or its denoising network (then give ``scheduler``).
        data: Clean data in the network's own space (pixels in [−1, 1], or scaled latents):
            a tensor ``(n, C, H, W)``; a mapping with ``"images"`` and, beside it, the network's other
            keyword arguments (``"class_labels"``, ``"encoder_hidden_states"``, …), each with n rows;
            a ``Dataset`` or an iterable of batches of either form.
        structure: ``"full"``, ``"kron"``, ``"diag"`` or ``"lowrank"``; the posterior's :meth:`~LaplacePosterior.recut` gives
            the others without another pass.
        covariance: ``"sandwich"`` (robust, clustered by image), ``"ggn"`` or ``"ef"``.
        draws_per_image: m, how many (t, ε) are drawn for each image. By default 4 where ``training_draws`` is given (no more
            than it says, and at least two), else 1.
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
        head: Exact path of the output layer, for networks the package does not know.
        generator: For timesteps and noise. The draws do not depend on ``batch_size``.
        progress: Show a progress bar.

    Returns:
        A :class:`LaplacePosterior`, with the sums it came from as ``.statistics``.

    Raises:
        EmptyDataError: There are no images.
        ShapeError: The images don't fit the network.
        NonFiniteError: Images, features or residuals are NaN or infinite.
        ArgumentError: An argument is out of range, or the network is in training mode.
        HeadNotFoundError, AmbiguousHeadError, UnsupportedHeadError: See :func:`find_head`.

    Warns:
        TrainingDrawsWarning: ``training_draws`` is not given.
        ProjectionWarning: The covariance over M draws, estimated from fewer, was indefinite.
    """
    draws_per_image = choose_draws(draws_per_image, training_draws)
    density, weighting, loss = as_density(timestep_density), as_weighting(loss_weights), as_loss(loss)
    check_int("batch_size", batch_size, least=1)
    network = denoiser(pipe_or_model, head)
    found = _known_head(pipe_or_model, head)
    check_eval(network)
    settings: dict[str, Any] = {
        "structure": structure, "covariance": covariance, "prior_precision": prior_precision,
        "noise_variance": noise_variance, "loss_weights": loss_weights if weighting is None else "uniform",
        "dataset_size": dataset_size, "training_draws": training_draws,
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
    statistics: Statistics | None = None
    seed = base_seed(generator)
    images_per_call = max(1, batch_size // draws_per_image)
    folds: dict[tuple[Any, ...], Fold] = {}
    first = 0
    total = _length(data)
    with tqdm(total=total, desc="fit", unit="image", disable=not progress) as bar:
        for images, conditioning in _batches(data, images_per_call):
            _check_images(images, network)
            count = len(images)
            t, noise = draw(scheduler, tuple(images.shape[1:]), seed, first, count, draws_per_image, density)
            weights = None if weighting is None else weighting(scheduler, t)
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
                statistics = statistics or Statistics(
                    found.geometry, noise_bins, device, loss=loss, weighted=weighting is not None
                )
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
                    w = None if weights is None else weights[part][draws]
                    statistics.update(x, r, bins[draws], first + rows[part][draws], of, w)
            first += count
            bar.update(count)
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


def _length(data: Any) -> int | None:
    """The number of images, where the data tell it."""
    if isinstance(data, (Tensor, Mapping)):
        return len(_split(data)[0])
    return len(data) if isinstance(data, Dataset) and hasattr(data, "__len__") else None


def _batches(data: Any, batch_size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Cut any of the accepted forms of data into (images, conditioning)."""
    if isinstance(data, (Tensor, Mapping)):
        images, conditioning = _split(data)
        for i in range(0, len(images), batch_size):
            yield images[i : i + batch_size], {k: v[i : i + batch_size] for k, v in conditioning.items()}
    elif isinstance(data, Dataset):
        # A generator of its own: a DataLoader draws a seed, also when nothing is shuffled.
        for batch in DataLoader(data, batch_size=batch_size, generator=Generator()):
            yield _split(batch)
    elif isinstance(data, Iterable):
        for batch in data:
            images, _ = _split(batch)
            if len(images):
                yield from _batches(batch, batch_size)
    else:
        raise ArgumentError(
            "expected data as a tensor, a mapping with 'images', a Dataset, or an iterable of batches, got "
            f"{type(data).__name__}"
        )


def _split(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    if isinstance(batch, Tensor):
        batch = {"images": batch}
    if not isinstance(batch, Mapping) or "images" not in batch:
        keys = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ArgumentError(f"expected a tensor or a mapping with the key 'images', got {keys}")
    tensors = {}
    for name, value in batch.items():
        try:
            tensors[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"expected tensors, arrays or numbers for {name!r}, got {type(value).__name__}: encode prompts first ({error})"
            ) from error
    images = tensors.pop("images")
    if images.ndim == 0:
        raise ShapeError("expected images (n, channels, height, width), got a scalar")
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or len(tensor) != len(images):
            raise ShapeError(f"expected {len(images)} rows of {name!r}, one for each image, got {tuple(tensor.shape)}")
    return images, tensors


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
