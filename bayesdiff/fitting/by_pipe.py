"""Training steps of a network by the call of its pipeline.

Before the work, a few runs with the network's outputs left at zero (it is called once) show whether the pipeline can be
followed: guidance off, so that each sample is one row of the network's; the noisy sample reaching the network unchanged; the
network given the same in every step that has the same sample and timestep; and rows with timesteps of their own getting what they
would get alone. Where a pipeline takes one timestep for all rows, what tells the
network of it is replaced (:mod:`bayesdiff.fitting.told`), or the rows are run one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bayesdiff.checks import ArgumentError, BayesdiffWarning, ShapeError, UnsupportedPipelineError
from bayesdiff.diffusion.parametrization import check_levels
from bayesdiff.fitting.compare import encoder_of, occurrences, rows_alike, unlike_others
from bayesdiff.fitting.driven import DrivenPipe, Watched
from bayesdiff.fitting.keywords import Keywords
from bayesdiff.fitting.probe import Probe
from bayesdiff.fitting.repeats import Repeats
from bayesdiff.fitting.samples import Clean, Encoder, are_pixels
from bayesdiff.fitting.seen import Observer, Seen, alike
from bayesdiff.fitting.told import Told

#: Shares of T: two timesteps at which a pipeline is looked at; others where another network is called at these.
LOOKED_AT = ((0.25, 0.75), (0.85, 0.95), (0.02, 0.1))
#: Shares at which it is asked how the network is told t.
ASKED_AT = (0.25, 0.75, 0.03, 0.5, 0.98)
#: The most steps that a pipeline is asked for in one run: some schedulers have no more (LCM's 50).
STEPS = 32

Consume = Callable[[int, list[int], Seen], None]


class ByPipe:
    """A source of training steps.

    Args:
        pipe: The pipeline.
        network: Its denoising network.
        observer: Sees the network's head.
        given: Keywords of every call.
        space: Whether data are ``"pixels"`` or ``"samples"``; None: by their channels.
        encode: ``"sample"`` or ``"mean"`` of the encoder's posterior.
        scheduler: Another schedule than the pipe's, or None.
    """

    def __init__(
        self, pipe: Any, network: nn.Module, observer: Observer, given: Mapping[str, Any] | None, space: str | None,
        encode: str, scheduler: Any = None,
    ) -> None:  # fmt: skip
        self.pipe, self.network, self.observer = pipe, network, observer
        self.keywords = Keywords(pipe, network, given)
        self.repeats = Repeats(network)
        self.driven = DrivenPipe(pipe, network, mean=encode == "mean")
        self.probe = Probe(self.driven, self.keywords, observer)
        self.scheduler = pipe.scheduler if scheduler is None else scheduler
        self.space, self.drawn = space, encode == "sample"
        self.together = True
        self.told: Told | None = None
        self._left_out = False
        self._vae = encoder_of(pipe, network)
        self._encoder: Encoder | None = None
        self._dtype: torch.dtype | None = None
        self._ready: tuple[Any, ...] = ()
        self._pixels = False

    def clean(self, images: Tensor, conditioning: Mapping[str, Any]) -> Clean:
        """Clean samples of a batch; the first of each form of data has the pipeline examined."""
        self.keywords.check(conditioning)
        form = (images.shape[1:], tuple(conditioning))
        if form != self._ready:
            self._prepare(images, conditioning)
            self._ready = form
        if self._encoder is not None:
            return self._encoder(images, drawn=self.drawn)
        return Clean(images)

    def timesteps(self, t: Tensor) -> Tensor:
        """As the scheduler has them."""
        assert self._dtype is not None
        return t.to(self._dtype)

    def run(
        self, conditioning: Mapping[str, Any], rows: list[int], first: int, sample: Callable[[int], Tensor],
        timesteps: list[Tensor], consume: Consume,
    ) -> None:  # fmt: skip
        """Steps of some rows of a batch.

        Args:
            conditioning: Of the batch.
            rows: Which images of it, one for each row; an image may have several.
            first: The number of the batch's first image.
            sample: Returns the noisy samples of step n, a row each.
            timesteps: Of each step, a row each.
            consume: Called with the number of the step, the numbers of the rows, and what was seen of them.
        """
        held = None if self.together else [sample(n) for n in range(len(timesteps))]
        everything = list(range(len(rows)))
        most = self._most()
        for begin in range(0, len(timesteps), most):
            part = timesteps[begin : begin + most]
            if held is None:
                self._steps(
                    conditioning, rows, first, lambda n, b=begin: sample(b + n), part,  # type: ignore[misc]
                    lambda n, seen, b=begin: consume(b + n, everything, seen),  # type: ignore[misc]
                )  # fmt: skip
                continue
            for r, row in enumerate(rows):
                self._steps(
                    conditioning, [row], first, lambda n, r=r, b=begin: held[b + n][r : r + 1], [t[r] for t in part],  # type: ignore[misc]
                    lambda n, seen, r=r, b=begin: consume(b + n, [r], seen),  # type: ignore[misc]
                )  # fmt: skip

    def _most(self) -> int:
        """Steps of one run."""
        return max(1, min(STEPS, int(self.scheduler.config.num_train_timesteps) - 1))

    def _steps(
        self, conditioning: Mapping[str, Any], rows: list[int], first: int, sample: Callable[[int], Tensor],
        timesteps: list[Tensor], seen: Callable[[int, Seen], None],
    ) -> None:  # fmt: skip
        keywords = self.keywords.call(conditioning, rows, [first + r for r in rows], len(timesteps) + 1)
        replaced = self.keywords.inputs(conditioning, rows)
        called = -1
        given = timesteps if self.told is None else [t.flatten()[0] for t in timesteps]

        def on_network(n: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal called
            if called == n:
                raise UnsupportedPipelineError(
                    f"expected {type(self.pipe).__name__} to call {type(self.network).__name__} once in a step, got several calls"
                )
            called = n
            if self.told is not None:
                args, kwargs = self.told.replace(args, kwargs, timesteps[n])
            kwargs = {**kwargs, **replaced}
            self.repeats.before(original, args, kwargs)
            self.observer.begin(alike(args, kwargs))
            output = original(*args, **kwargs)
            self.repeats.after(output)
            return output

        def on_step(n: int, output: Tensor) -> None:
            if called == n:
                seen(n, self.observer.arrived(output))
            elif not self._left_out:
                self._left_out = True
                warnings.warn(
                    f"{type(self.pipe).__name__} calls another network than the one with {self.observer.head.path!r} at t = "
                    f"{float(timesteps[n].flatten()[0]):.4g}: such draws are left out, as they were in its training",
                    BayesdiffWarning, stacklevel=2,
                )  # fmt: skip

        try:
            self.driven.run(keywords, given, sample, on_network, on_step)
        finally:
            self.observer.close()

    # ------------------------------------------------------------------------------------------ before the work

    def _prepare(self, images: Tensor, conditioning: Mapping[str, Any]) -> None:
        self._pixels = are_pixels(images, self._vae, self.space)
        self.keywords.size = {}
        watched = self._follow(images, conditioning)
        self._encoder = None
        if self._pixels:
            self._encoder = self._encoding(watched, conditioning)
            made, wanted = self._encoder.latent, self._encoder.encoded(images[:1])
            if made != wanted and self.keywords.size and len(made) == len(wanted):
                # The pipe believes that its encoder has another factor: it is asked for what gives samples of this size.
                sides = zip(("width", "height"), wanted[:-3:-1], made[:-3:-1], strict=True)
                ratios = {side: w / m for side, w, m in sides}
                self.keywords.size = {k: round(v * ratios.get(k, 1.0)) for k, v in self.keywords.size.items()}
                watched = self._follow(images, conditioning, sized=True)
                self._encoder = self._encoding(watched, conditioning)

    def _unlike(self, shape: torch.Size, watched: Watched) -> NoReturn:
        raise ShapeError(
            f"expected samples {tuple(watched.sample.shape[1:])}, as {type(self.pipe).__name__} makes them, got data "
            f"{tuple(shape)}"
            + ("" if self._vae is None else "; images are encoded where they have the channels that its encoder takes")
        )

    def _encoding(self, watched: Watched, conditioning: Mapping[str, Any]) -> Encoder:
        last = torch.randn(watched.sample.shape, generator=torch.Generator().manual_seed(0)).to(watched.sample)
        return Encoder(watched, self.driven.watch(self.probe.call(conditioning, [0], 2), last), last)

    def _watch(self, images: Tensor, conditioning: Mapping[str, Any]) -> Watched:
        """A plain run of one row, at the size of the data."""
        sides = dict(zip(("width", "height", "num_frames"), reversed(images.shape[2:]), strict=False))
        sides = {k: v for k, v in sides.items() if k in self.keywords.parameters and k not in self.keywords.given}
        if self._pixels or self._vae is None:
            self.keywords.size = sides
        watched = self.probe.one(conditioning)
        if not self._pixels and self._vae is not None and images.shape[1:] != watched.sample.shape[1:] and sides:
            self.keywords.size = {k: 8 * v for k, v in sides.items()}  # and how much smaller samples are
            made = self.probe.one(conditioning).sample.shape[2:]
            if len(made) == images.ndim - 2:
                found = dict(zip(("width", "height", "num_frames"), reversed(made), strict=False))
                self.keywords.size = {k: max(1, 8 * v * v // found[k]) for k, v in sides.items()}
                watched = self.probe.one(conditioning)
        return watched

    def _follow(self, images: Tensor, conditioning: Mapping[str, Any], sized: bool = False) -> Watched:
        """Guidance off, x unchanged at the network, and whether rows may have timesteps of their own."""
        branches, refused, alone = 0.0, None, []
        for settings in self.keywords.unguided():
            self.keywords.guidance = settings
            rows, self.together, self.told = [0, min(1, len(images) - 1)], True, None
            try:
                watched = self.probe.one(conditioning) if sized else self._watch(images, conditioning)
                check_levels(watched.scheduler, watched.timesteps)
                if not self._pixels and images.shape[1:] != watched.sample.shape[1:]:
                    self._unlike(images.shape[1:], watched)
                x = unlike_others((2, *watched.sample.shape[1:])).to(watched.sample)
                for shares in LOOKED_AT:
                    times = self._times(watched, shares)
                    try:
                        alone = self.probe.arguments(conditioning, rows, list(times), x)
                    except UnsupportedPipelineError:  # one image at a time
                        x, rows, self.together = x[:1], rows[:1], False
                        alone = self.probe.arguments(conditioning, rows, list(times), x)
                    if all(alone):
                        break
            except (ArgumentError, UnsupportedPipelineError) as error:
                if isinstance(error, ArgumentError) and not settings:
                    raise
                refused = refused or error
                continue
            if not all(alone):
                break
            counts = [occurrences(leaves, x) for leaves in alone]
            branches = min(counts) if min(counts) < 1 else max(counts)
            if branches <= 1:
                break
        if refused is not None and not alone:
            raise refused
        if not all(alone):
            raise UnsupportedPipelineError(
                f"expected {type(self.pipe).__name__} to call {type(self.network).__name__}, got no call of it"
            )
        if branches != 1:
            self._refuse(branches)
        self.probe.check_repeated(conditioning, rows, times[0], x, self._most())
        if len(rows) == 1:
            return watched
        try:
            (together,) = self.probe.arguments(conditioning, rows, [times], x)
            self.together = rows_alike(together, alone[0], alone[1])
        except (ArgumentError, UnsupportedPipelineError):
            self.together = False
        if not self.together:
            self.told = self.probe.tells(conditioning, rows, self._times(watched, ASKED_AT), x)
            self.together = self.told is not None
        if self.together and not self.probe.alone_alike(conditioning, rows, times, x, self.told is not None):
            self.together, self.told = False, None
        return watched

    def _times(self, watched: Watched, shares: tuple[float, ...]) -> Tensor:
        """Timesteps at these shares of T."""
        self._dtype = watched.timesteps.dtype
        if self._dtype.is_floating_point:
            self._dtype = torch.promote_types(self._dtype, watched.sample.dtype)
        total = float(self.scheduler.config.num_train_timesteps)
        return self.timesteps(torch.tensor(shares, dtype=torch.float64) * total)

    def _refuse(self, branches: float) -> None:
        name = type(self.pipe).__name__
        if branches < 1:
            raise UnsupportedPipelineError(
                f"expected {name} to hand the noisy sample to its network as it is, got {branches:.0%} of its numbers there: it "
                "mixes or scales it; fit with the pipeline that makes images from noise, or the network with call=…"
            )
        raise UnsupportedPipelineError(
            f"expected {name} to call its network without guidance, one row for each sample, got {branches:g}; no keyword among "
            f"{', '.join(dict.fromkeys(n for s in self.keywords.unguided() for n in s)) or 'none'} turns it off; fit the "
            "network, with scheduler=… and call=…"
        )
