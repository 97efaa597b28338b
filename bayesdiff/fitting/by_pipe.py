"""Training steps of a network by the call of its pipeline.

Before the work, a few runs with the network's outputs left at zero (it is called once) show whether the pipeline can be
followed: guidance off, so that each sample is one row of the network's; the noisy sample reaching the network unchanged; and rows of
their own timesteps getting what they would get alone. Where a pipeline takes one timestep for all rows, they are run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bayesdiff.checks import ArgumentError, BayesdiffError, ShapeError, UnsupportedPipelineError
from bayesdiff.diffusion.parametrization import check_levels
from bayesdiff.fitting.driven import DrivenPipe, Watched
from bayesdiff.fitting.keywords import Keywords
from bayesdiff.fitting.samples import Clean, Encoder, are_pixels
from bayesdiff.fitting.seen import Observer, Seen, alike

#: Numbers of rows that are run together and alone may differ by this, relative to the largest.
ALIKE = 1e-3

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
        self.driven = DrivenPipe(pipe, network, mean=encode == "mean")
        self.scheduler = pipe.scheduler if scheduler is None else scheduler
        self.space, self.drawn = space, encode == "sample"
        self.together = True
        self._vae = _encoder(pipe, network)
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
        if self.together:
            everything = list(range(len(rows)))
            self._steps(conditioning, rows, first, sample, timesteps, lambda n, seen: consume(n, everything, seen))
            return
        held = [sample(n) for n in range(len(timesteps))]
        for r, row in enumerate(rows):
            self._steps(
                conditioning, [row], first, lambda n, r=r: held[n][r : r + 1], [t[r] for t in timesteps],  # type: ignore[misc]
                lambda n, seen, r=r: consume(n, [r], seen),  # type: ignore[misc]
            )  # fmt: skip

    def _steps(
        self, conditioning: Mapping[str, Any], rows: list[int], first: int, sample: Callable[[int], Tensor],
        timesteps: list[Tensor], seen: Callable[[int, Seen], None],
    ) -> None:  # fmt: skip
        keywords = self.keywords.call(conditioning, rows, [first + r for r in rows], len(timesteps) + 1)
        replaced = self.keywords.inputs(conditioning, rows)
        calls = 0

        def on_network(n: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal calls
            calls += 1
            if calls > n + 1:
                raise UnsupportedPipelineError(
                    f"expected {type(self.pipe).__name__} to call {type(self.network).__name__} once in a step, got several calls"
                )
            kwargs = {**kwargs, **replaced}
            self.observer.begin(alike(args, kwargs))
            return original(*args, **kwargs)

        def on_step(n: int, output: Tensor) -> None:
            if calls != n + 1:
                raise UnsupportedPipelineError(
                    f"expected {type(self.pipe).__name__} to call {type(self.network).__name__} once in a step, got no call: where "
                    "networks take turns by the noise level, each has its own timesteps"
                )
            seen(n, self.observer.arrived(output))

        try:
            self.driven.run(keywords, timesteps, sample, on_network, on_step)
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
                ratios = dict(zip(("width", "height"), (w / m for w, m in zip(wanted[:-3:-1], made[:-3:-1], strict=True)), strict=True))
                self.keywords.size = {k: round(v * ratios.get(k, 1.0)) for k, v in self.keywords.size.items()}
                watched = self._follow(images, conditioning, sized=True)
                self._encoder = self._encoding(watched, conditioning)
            expected = watched.sample.shape[1:]
        else:
            expected = images.shape[1:]
        if expected != watched.sample.shape[1:]:
            raise ShapeError(
                f"expected samples {tuple(watched.sample.shape[1:])}, as {type(self.pipe).__name__} makes them, got data "
                f"{tuple(expected)}"
                + ("" if self._vae is None else "; images are encoded where they have the channels that its encoder takes")
            )

    def _encoding(self, watched: Watched, conditioning: Mapping[str, Any]) -> Encoder:
        last = torch.randn(watched.sample.shape, generator=torch.Generator().manual_seed(0)).to(watched.sample)
        return Encoder(watched, self.driven.watch(self._call(conditioning, [0], 2), last), last)

    def _call(self, conditioning: Mapping[str, Any], rows: list[int], steps: int) -> dict[str, Any]:
        return self.keywords.call(conditioning, rows, rows, steps)

    def _watch(self, images: Tensor, conditioning: Mapping[str, Any]) -> Watched:
        """A plain run of one row, at the size of the data."""
        sides = dict(zip(("width", "height", "num_frames"), reversed(images.shape[2:]), strict=False))
        sides = {k: v for k, v in sides.items() if k in self.keywords.parameters and k not in self.keywords.given}
        if self._pixels or self._vae is None:
            self.keywords.size = sides
        watched = self._one(conditioning)
        if not self._pixels and self._vae is not None and images.shape[1:] != watched.sample.shape[1:] and sides:
            self.keywords.size = {k: 8 * v for k, v in sides.items()}  # and how much smaller samples are
            made = self._one(conditioning).sample.shape[2:]
            if len(made) == images.ndim - 2:
                found = dict(zip(("width", "height", "num_frames"), reversed(made), strict=False))
                self.keywords.size = {k: max(1, 8 * v * v // found[k]) for k, v in sides.items()}
                watched = self._one(conditioning)
        return watched

    def _one(self, conditioning: Mapping[str, Any]) -> Watched:
        """A plain run of one row; the head is found in it, where its name is not known."""
        original = self.driven.stub

        def stub(network: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.observer.known is None:
                self.observer.find(lambda: network(*args, **{**kwargs, **self.keywords.inputs(conditioning, [0])}))
            return original(network, args, kwargs)

        vars(self.driven)["stub"] = stub
        try:
            return self.driven.watch(self._call(conditioning, [0], 2))
        except (ArgumentError, UnsupportedPipelineError):
            if not self.keywords.own_generators or "generator" not in self.keywords.parameters:
                raise
            self.keywords.own_generators = False  # some take one generator only
            try:
                return self.driven.watch(self._call(conditioning, [0], 2))
            except BayesdiffError:
                self.keywords.own_generators = True
                return self.driven.watch(self._call(conditioning, [0], 2))
        finally:
            del vars(self.driven)["stub"]

    def _follow(self, images: Tensor, conditioning: Mapping[str, Any], sized: bool = False) -> Watched:
        """Guidance off, x unchanged at the network, and whether rows may have timesteps of their own."""
        rows = [0, min(1, len(images) - 1)]
        self.together = True
        branches, refused, alone = 0.0, None, []
        for settings in self.keywords.unguided():
            self.keywords.guidance = settings
            try:
                watched = self._one(conditioning) if sized else self._watch(images, conditioning)
                check_levels(watched.scheduler, watched.timesteps)
                times = self._times(watched)
                x = _unlike_others((2, *watched.sample.shape[1:])).to(watched.sample)
                try:
                    alone = self._arguments(conditioning, rows, list(times), x)
                except UnsupportedPipelineError:  # one image at a time
                    alone = self._arguments(conditioning, rows[:1], list(times), x[:1])
                    x, self.together = x[:1], False
            except (ArgumentError, UnsupportedPipelineError) as error:
                if isinstance(error, ArgumentError) and not settings:
                    raise
                refused = refused or error
                continue
            counts = [_occurrences(leaves, x) for leaves in alone]
            branches = min(counts) if min(counts) < 1 else max(counts)
            if branches == 1:
                break
        else:
            if refused is not None and not alone:
                raise refused
            self._refuse(branches)
        if not self.together:
            return watched
        try:
            (together,) = self._arguments(conditioning, rows, [times], x)
        except (ArgumentError, UnsupportedPipelineError):
            self.together = False
        else:
            self.together = _rows_alike(together, alone[0], alone[1])
        return watched

    def _times(self, watched: Watched) -> Tensor:
        """Two timesteps."""
        self._dtype = watched.timesteps.dtype
        if self._dtype.is_floating_point:
            self._dtype = torch.promote_types(self._dtype, watched.sample.dtype)
        total = float(self.scheduler.config.num_train_timesteps)
        return self.timesteps(torch.tensor([0.25 * total, 0.75 * total], dtype=torch.float64))

    def _refuse(self, branches: float) -> None:
        name = type(self.pipe).__name__
        if branches < 1:
            raise UnsupportedPipelineError(
                f"expected {name} to hand the noisy sample to its network as it is, got {branches:.0%} of its numbers there: it "
                "mixes or scales it; fit with the pipeline that makes images from noise, or the network with call=…"
            )
        raise UnsupportedPipelineError(
            f"expected {name} to call its network without guidance, one row for each sample, got {branches:g}; no keyword among "
            f"{', '.join(dict.fromkeys(n for s in self.keywords.unguided() for n in s)) or 'none'} turns it off; fit the network, with "
            "scheduler=… and call=…"
        )

    def _arguments(
        self, conditioning: Mapping[str, Any], rows: list[int], timesteps: list[Tensor], x: Tensor
    ) -> list[list[Any]]:
        """What the network is given in steps at these timesteps."""
        found: list[list[Any]] = [[] for _ in timesteps]

        def on_network(n: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves = tree_flatten((args, kwargs))[0]
            found[n] += [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self.driven.stub(original, args, kwargs)

        keywords = self._call(conditioning, rows, len(timesteps) + 1)
        self.driven.run(keywords, timesteps, lambda _: x, on_network, lambda *_: None)
        return found


def _encoder(pipe: Any, network: nn.Module) -> nn.Module | None:
    """The pipeline's component that encodes and decodes."""
    for value in vars(pipe).values():
        if isinstance(value, nn.Module) and value is not network and hasattr(value, "encode") and hasattr(value, "decode"):
            return value
    return None


def _occurrences(leaves: list[Any], x: Tensor) -> float:
    """How often the numbers of x are among the tensors that a network is given; less than 1 where not all of them are."""
    total, missing = 0, torch.ones(x.numel(), dtype=torch.bool, device=x.device)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
            numbers = x.to(leaf.device, leaf.dtype).flatten()
            flat = leaf.flatten()
            total += int(torch.isin(flat, numbers).sum())
            missing &= ~torch.isin(numbers, flat).to(x.device)
    if bool(missing.any()):
        return min(0.99, 1 - float(missing.double().mean()))
    times = total / x.numel()
    return float(round(times)) if abs(times - round(times)) < 0.05 else times


def _unlike_others(shape: tuple[int, ...]) -> Tensor:
    """Numbers of 64 to 128, and as many negative ones: not what embeddings are made of, also where all are rounded."""
    generator = torch.Generator().manual_seed(1)
    return (64 + 64 * torch.rand(shape, generator=generator)) * (1 - 2 * torch.randint(2, shape, generator=generator))


def _rows_alike(together: list[Any], first: list[Any], second: list[Any]) -> bool:
    """Whether row 0 is given what it is given with the first timestep for all rows, and row 1 with the second."""
    if not len(together) == len(first) == len(second):
        return False
    for v, a, b in zip(together, first, second, strict=True):
        if not isinstance(v, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or v != a or v != b:
                return False
        elif not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        elif v.shape == a.shape == b.shape and v.ndim and len(v) == 2:
            if not (_near(v[0], a[0]) and _near(v[1], b[1])):
                return False
        elif v.shape == a.shape == b.shape:  # a list's entry, or the same for all
            if not (_near(v, a) or _near(v, b)) or (v.numel() == 1 and not (_near(v, a) and _near(v, b))):
                return False
        elif not (v.numel() == 2 and a.numel() == b.numel() == 1):
            return False
        elif not (_near(v.flatten()[:1], a.flatten()) and _near(v.flatten()[1:], b.flatten())):
            return False
    return True


def _near(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool((a.double() - b.double()).abs().le(ALIKE * scale).all())
