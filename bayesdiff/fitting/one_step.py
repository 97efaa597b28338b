r"""One training step, seen from the head: :math:`\varphi`, the target and the residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from bayesdiff.checks import ArgumentError, ShapeError, UnsupportedPipelineError
from bayesdiff.data import images_for
from bayesdiff.diffusion.noising import noised
from bayesdiff.fitting.by_call import Call, check_images
from bayesdiff.fitting.seen import Seen
from bayesdiff.fitting.source import source_of, training_timesteps
from bayesdiff.head.compiled import uncompiled
from bayesdiff.head.find import Head
from bayesdiff.rng import normal


@dataclass(frozen=True)
class Features:
    r"""What a training step is made of; n rows.

    Args:
        head: The output layer.
        inputs: What entered it, :math:`\varphi` without the constant 1: ``(n, C_in, H, W)`` or ``(n, tokens, C_in)``, in
            the network's own order of rows and tokens.
        noisy: :math:`x_t`, float64, as the scheduler has samples.
        target: What the network is trained to return of it, float64.
        output: What it returned, in the place and with the sign in which the scheduler takes it.
        timesteps: t, ``(n,)``, as the scheduler counts them.
    """

    head: Head
    inputs: Tensor
    noisy: Tensor
    target: Tensor
    output: Tensor
    timesteps: Tensor

    @property
    def residual(self) -> Tensor:
        """Target − output."""
        return self.target - self.output.to(self.target)

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Features({self.head.path!r}, inputs {tuple(self.inputs.shape)}, target {tuple(self.target.shape)}, "
            f"residual {float(self.residual.square().mean().sqrt()):.3g})"
        )


@uncompiled()
def features(
    pipe_or_model: Any,
    images: Any,
    prompts: Any = None,
    *,
    timesteps: Tensor | list[float],
    noise: Tensor | None = None,
    scheduler: Any = None,
    call: Call | None = None,
    pipe_kwargs: Mapping[str, Any] | None = None,
    space: str | None = None,
    encode: str = "mean",
    size: int | tuple[int, int] | None = None,
    value_range: tuple[float, float] | str | None = None,
    convert: bool = False,
    head: str | None = None,
    generator: Generator | None = None,
) -> Features:
    r"""One step of training, at given timesteps and noise, as :func:`bayesdiff.fit` makes it.

    Args:
        pipe_or_model: As of :func:`bayesdiff.fit`.
        images: One batch, as of :func:`bayesdiff.fit`; at most as many as fit into one network call.
        prompts: As of :func:`bayesdiff.fit`.
        timesteps: t of each image, ``(n,)``, from 0 to the scheduler's ``num_train_timesteps``.
        noise: ε, ``(n, *sample)``, in the scheduler's form of samples; drawn by default.
        scheduler: As of :func:`bayesdiff.fit`.
        call: As of :func:`bayesdiff.fit`.
        pipe_kwargs: As of :func:`bayesdiff.fit`.
        space: As of :func:`bayesdiff.fit`.
        size: As of :func:`bayesdiff.fit`.
        value_range: As of :func:`bayesdiff.fit`.
        convert: As of :func:`bayesdiff.fit`.
        head: As of :func:`bayesdiff.fit`.
        encode: ``"mean"`` of the encoder's posterior, or a ``"sample"``.
        generator: For the noise, and for the encoder's.

    Returns:
        :class:`Features`.

    Raises:
        ArgumentError, ShapeError, NonFiniteError, UnsupportedPipelineError, UnsupportedSchedulerError, UnsupportedHeadError:
            As :func:`bayesdiff.fit`.
    """
    source = source_of(
        pipe_or_model, head=head, scheduler=scheduler, call=call, pipe_kwargs=pipe_kwargs, space=space, encode=encode
    )
    data = images_for(
        pipe_or_model, source.network, images, prompts, space=space, size=size, value_range=value_range, convert=convert
    )
    made = list(data.batches(2**31))
    if len(made) != 1:
        raise ArgumentError(f"expected one batch of images, got {len(made)}")
    x, conditioning = made[0]
    check_images(x)
    clean = source.clean(x, conditioning)
    t = source.timesteps(torch.as_tensor(timesteps))
    most = training_timesteps(source.scheduler)
    if t.shape != (len(x),) or not bool(((t >= 0) & (t <= most)).all()):
        raise ArgumentError(f"expected {len(x)} timesteps from 0 to {most:g}, one for each image, got {timesteps}")
    shape = tuple(clean.mean.shape)
    drawn = normal(shape, generator, torch.float32) if noise is None else noise
    if drawn.shape != shape:
        raise ShapeError(f"expected noise {shape}, got {tuple(drawn.shape)}")
    encoder_noise = None if clean.std is None else normal(shape, generator, torch.float32)
    clean_rows = clean.draw(torch.arange(len(x)), encoder_noise)
    noisy, target = noised(source.scheduler, clean_rows, drawn.to(clean_rows.device), t)
    parts: list[tuple[list[int], Seen]] = []
    source.run(
        conditioning, list(range(len(x))), 0, lambda _: noisy, [t], lambda _, rows, seen: parts.append((rows, seen))
    )
    if sum(len(rows) for rows, _ in parts) < len(x):
        raise UnsupportedPipelineError(
            f"expected the network with {source.observer.head.path!r} to be called at all these timesteps, got {timesteps}: "
            "another network has some of them"
        )
    inputs, output = (torch.cat([getattr(seen, name) for _, seen in parts]) for name in ("inputs", "output"))
    return Features(source.observer.head, inputs, noisy, target, output, t)
