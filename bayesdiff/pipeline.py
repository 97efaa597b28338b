"""What a user calls: any function, or a diffusers pipeline, with uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bayesdiff.checks import ArgumentError, UnsupportedPipelineError, check_int
from bayesdiff.head.compiled import original
from bayesdiff.head.find import Head, check_eval, denoiser
from bayesdiff.head.identity import NetworkIdentity
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.output import UncertaintyOutput
from bayesdiff.propagation.run import UncertainRun
from bayesdiff.propagation.settings import BayesDiff, Ensemble, Settings, Tangents, settings
from bayesdiff.rng import base_seed, item_generator


class UncertaintyPipeline:
    r"""Run a diffusers pipeline and carry the head's posterior along its trajectory.

    The pipe runs its own code, several times over; all but measurements of its network is replayed from the first run. It
    is left as it was.

    Args:
        pipe: A diffusers pipeline, or anything that is called, has a network named ``unet`` or ``transformer``, and calls it.
        posterior: A posterior of that network's head.
        propagation: How a variance is carried along: ``"tangents"``, ``"ensemble"``, ``"bayesdiff"``,
            ``"bayesdiff-centered"``, or
            settings: :class:`bayesdiff.Tangents`, :class:`bayesdiff.Ensemble`, :class:`bayesdiff.BayesDiff`. Their weight
            draws are made once, here: maps of one object share them, and do not depend on the batch.
        head: Exact path of the output layer; by default where the posterior was fitted.

    Raises:
        HeadMismatchError: The posterior is of another network.
        ArgumentError: An argument is out of range, or the network is in training mode.
    """

    def __init__(
        self,
        pipe: Any,
        posterior: LaplacePosterior,
        *,
        propagation: str | Settings = "tangents",
        head: str | None = None,
    ) -> None:
        self.settings = settings(propagation)
        if not callable(pipe):
            raise ArgumentError(f"expected a pipeline that can be called, got {type(pipe).__name__}")
        check_posterior(posterior)
        self.pipe, self.posterior = pipe, posterior
        self.network = denoiser(pipe, head or posterior.head_path)
        self.head = posterior.check(pipe, head)
        check_eval(self.network)
        self._as_it_was = NetworkIdentity.of(self.network)
        self.deviations, self._seed = drawn(posterior, self.settings)

    def __call__(self, *args: Any, **kwargs: Any) -> UncertaintyOutput:
        """Run the pipe with its own arguments.

        Raises:
            ArgumentError: ``num_inference_steps`` < 1, or the network is in training mode.
            HeadMismatchError: The network's weights have changed since.
            NotRepeatableError: The network or the sampler does not do the same again.
            UnsupportedPipelineError: The pipe does something that cannot be followed; the message has what was measured.
            UnsupportedHeadError: What follows the output layer is more than a permutation and a scale.
            UnsupportedSchedulerError: The sampler divides by √ᾱ_T ≈ 0, or BayesDiff's recursion does not know its memory.
            NonFiniteError: Features or deviations are NaN or infinite.
        """
        if "num_inference_steps" in kwargs and kwargs["num_inference_steps"] is not None:
            check_int("num_inference_steps", kwargs["num_inference_steps"], least=1)
        check_eval(self.network)
        self._as_it_was.check(self.network, "with the weights that it had when this UncertaintyPipeline was made")
        self.head = self.posterior.check(self.pipe, self.head.path)
        return UncertainRun(
            self.pipe, self.network, self.head, self.posterior, self.settings, self.deviations, self._seed, args, kwargs
        )()

    def __repr__(self) -> str:
        """One line."""
        return f"UncertaintyPipeline({type(self.pipe).__name__}, {self.head.path!r}, {self.settings})"


def propagate(
    function: Callable[..., Any], network: nn.Module, posterior: LaplacePosterior, *args: Any,
    propagation: str | Settings = "tangents", **kwargs: Any,
) -> UncertaintyOutput:  # fmt: skip
    r"""Run any function that calls a network, and carry the posterior of the network's head through it.

    ``function(*args, **kwargs)`` is run several times, its PyTorch code followed op by op
    (:mod:`bayesdiff.tracing.dual`). Random numbers come from generators among its arguments, in its closure, or the
    global ones: all are set back for each run, and left where one run leaves them.

    Args:
        function: Any function: a sampler's loop, k-diffusion's ``sample_euler``, a method.
        network: The module that it calls, whose output layer has the posterior.
        posterior: Of that layer.
        args: Passed on.
        propagation: As of :class:`UncertaintyPipeline`. ``"tangents"`` interpolates the network's response in fewer calls where
            it knows the schedule: ``bd.Tangents(schedule=scheduler)``.
        kwargs: Passed on.

    Returns:
        ``output`` is what the function returned; ``variance`` and ``std`` are shaped as its first result that depends on the
        network, in its units, before the last clamp.

    Raises:
        HeadMismatchError: The posterior is of another network.
        NotRepeatableError, UnsupportedPipelineError, UnsupportedHeadError, NonFiniteError: As
            :meth:`UncertaintyPipeline.__call__`.
    """
    if not callable(function):
        raise ArgumentError(f"expected a function, got {type(function).__name__}")
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"expected the network as a torch.nn.Module, got {type(network).__name__}")
    network = original(network)
    check_posterior(posterior)
    chosen = settings(propagation)
    if isinstance(chosen, BayesDiff):
        raise UnsupportedPipelineError(
            "expected a pipeline with a scheduler for the recursion of BayesDiff, got a function; use "
            'propagation="tangents"'
        )
    head: Head = posterior.check(network)
    check_eval(network)
    deviations, seed = drawn(posterior, chosen)
    return UncertainRun(function, network, head, posterior, chosen, deviations, seed, args, kwargs)()


def check_posterior(posterior: object) -> None:
    """Raise :class:`ArgumentError` for what is no posterior."""
    if not isinstance(posterior, LaplacePosterior):
        raise ArgumentError(
            f"expected a LaplacePosterior, of bayesdiff.fit or LaplacePosterior.load(folder), got {type(posterior).__name__}"
        )


def drawn(posterior: LaplacePosterior, chosen: Settings) -> tuple[Tensor, int]:
    """δW of the draws, ``(K, C, D)``, and a seed for what else is drawn."""
    generator = item_generator(0, 1) if chosen.generator is None else chosen.generator
    if isinstance(chosen, Tangents):
        # Only the second moments of tangents count, so their draws may be orthogonal; an ensemble's are independent.
        return posterior.deviations(chosen.draws, generator, orthogonal=True), 0
    seed = (
        base_seed(generator) if isinstance(chosen, BayesDiff) or (isinstance(chosen, Ensemble) and chosen.redraw) else 0
    )
    number = chosen.members if isinstance(chosen, Ensemble) else 64  # BayesDiff: for steps without a closed form
    return posterior.deviations(number, generator), seed
