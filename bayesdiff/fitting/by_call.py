"""Training steps of a network that is called by itself: as diffusers' networks are, or by the user's own function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import ArgumentError, ShapeError, check_finite
from bayesdiff.fitting.by_pipe import Consume
from bayesdiff.fitting.driven import ERRORS
from bayesdiff.fitting.repeats import Repeats
from bayesdiff.fitting.samples import Clean
from bayesdiff.fitting.seen import Observer, alike
from bayesdiff.head.loaded import placement
from bayesdiff.head.numbers import tensor_of

#: ``call(network, x, t, batch)`` runs a network and returns its output.
Call = Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], Any]


def as_diffusers(network: nn.Module, x: Tensor, t: Tensor, batch: dict[str, Any]) -> Any:
    """The call of diffusers' networks."""
    return network(x, timestep=t, return_dict=False, **batch)


class ByCall:
    """A source of training steps.

    Args:
        network: The network.
        observer: Sees its head.
        scheduler: The schedule it was trained with.
        call: Runs it.
    """

    def __init__(self, network: nn.Module, observer: Observer, scheduler: Any, call: Call | None) -> None:
        self.network, self.observer, self.scheduler = network, observer, scheduler
        self.call = as_diffusers if call is None else call
        self.device, self.dtype = placement(network)
        self.repeats = Repeats(network)

    def clean(self, images: Tensor, conditioning: Mapping[str, Any]) -> Clean:
        """The data, which are samples."""
        if "prompts" in conditioning and self.call is as_diffusers:
            raise ArgumentError(
                "expected a pipeline to encode prompts, got a network: give the pipeline, or encode them and give the embeddings"
            )
        channels = (
            getattr(getattr(self.network, "config", None), "in_channels", None) if self.call is as_diffusers else None
        )
        if images.ndim < 2 or (channels is not None and images.ndim != 4 and channels not in images.shape[1:]):
            raise ShapeError(f"expected images (n, channels, height, width), got {tuple(images.shape)}")
        if channels is not None and images.ndim == 4 and images.shape[1] != channels:
            raise ShapeError(f"expected images of {channels} channels, got {images.shape[1]} in {tuple(images.shape)}")
        return Clean(images.to(self.device))

    def timesteps(self, t: Tensor) -> Tensor:
        """As they are."""
        return t

    def run(
        self, conditioning: Mapping[str, Any], rows: list[int], first: int, sample: Callable[[int], Tensor],
        timesteps: list[Tensor], consume: Consume,
    ) -> None:  # fmt: skip
        """See :meth:`bayesdiff.fitting.by_pipe.ByPipe.run`."""
        batch = {k: self._rows(v, rows) for k, v in conditioning.items()}
        for n, t in enumerate(timesteps):
            x = sample(n).to(self.device, self.dtype)
            told = t.to(self.device)
            self.observer.find(lambda x=x, told=told: self._output(x, told, batch))  # type: ignore[misc]
            self.repeats.before(self._output, (x, told, batch), {})
            self.observer.begin(alike(x, batch))
            try:
                returned = self._output(x, told, batch)
                self.repeats.after(returned)
                output = tensor_of(returned)
                if output.shape != x.shape and output.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
                    output = output[:, : x.shape[1]]  # a learned variance lies behind it
                if output.shape != x.shape:
                    raise ShapeError(
                        f"expected the network to return {tuple(x.shape)}, as its target, got {tuple(output.shape)}"
                    )
                seen = self.observer.arrived(output)
            finally:
                self.observer.close()
            consume(n, list(range(len(rows))), seen)

    def _rows(self, values: Any, rows: list[int]) -> Any:
        if not isinstance(values, Tensor):
            return [values[r] for r in rows]
        chosen = values[torch.tensor(rows, device=values.device)]
        return chosen.to(self.device, self.dtype if chosen.is_floating_point() else chosen.dtype)

    def _output(self, x: Tensor, t: Tensor, batch: dict[str, Any]) -> Any:
        try:
            with torch.no_grad():
                return self.call(self.network, x, t, batch)
        except torch.OutOfMemoryError:
            raise
        except ERRORS as error:
            if isinstance(error, ArgumentError | ShapeError) or type(error).__module__.startswith("bayesdiff"):
                raise
            shapes = {k: tuple(v.shape[1:]) if isinstance(v, Tensor) else type(v).__name__ for k, v in batch.items()}
            raise ShapeError(
                f"expected images and conditioning that fit {type(self.network).__name__}, got images {tuple(x.shape[1:])} "
                f"and {shapes}; the network says: {error}"
            ) from error


def check_images(images: Tensor) -> None:
    """Floating-point and finite.

    Raises:
        ArgumentError, NonFiniteError: They are not.
    """
    if not images.is_floating_point():
        raise ArgumentError(
            f"expected floating-point images in the network's space (pixels in [-1, 1]), got {images.dtype}"
        )
    check_finite("images", images)
