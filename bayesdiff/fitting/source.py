"""What runs a network in training steps: its pipeline (:mod:`bayesdiff.fitting.by_pipe`), or a call of the network alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayesdiff.checks import ArgumentError, UnsupportedSchedulerError, check_choice
from bayesdiff.data import modules_of
from bayesdiff.fitting.by_call import ByCall, Call
from bayesdiff.fitting.by_pipe import ByPipe
from bayesdiff.fitting.seen import Observer
from bayesdiff.head.find import check_eval, denoiser

Source = ByPipe | ByCall


def source_of(
    pipe_or_model: Any, *, head: str | None, scheduler: Any, call: Call | None, pipe_kwargs: Mapping[str, Any] | None,
    space: str | None, encode: str,
) -> Source:  # fmt: skip
    """What runs a network: its pipeline, or a call of the network alone.

    Raises:
        ArgumentError: A setting is out of range, or the network, or another of the pipe's, is in training mode.
    """
    check_choice("encode", encode, ("sample", "mean"))
    if space is not None:
        check_choice("space", space, ("pixels", "samples"))
    network = denoiser(pipe_or_model, head)
    observer = Observer(pipe_or_model, network, head)
    check_eval(network)
    own = getattr(pipe_or_model, "scheduler", None)
    if own is not None and call is None and not isinstance(pipe_or_model, nn.Module) and callable(pipe_or_model):
        for name, part in modules_of(pipe_or_model).items():
            check_eval(part, f"the pipe's {name}")
        return ByPipe(pipe_or_model, network, observer, pipe_kwargs, space, encode, scheduler)
    if pipe_kwargs:
        raise ArgumentError("expected pipe_kwargs beside a pipeline that is called, got them beside a network")
    scheduler = own if scheduler is None else scheduler
    if scheduler is None:
        raise ArgumentError("expected a pipeline, or scheduler=… beside a bare network, got neither")
    return ByCall(network, observer, scheduler, call)


def training_timesteps(scheduler: Any) -> int:
    """T, the timesteps that a network was trained on, as its schedule has them.

    Raises:
        UnsupportedSchedulerError: It does not say.
    """
    count = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedSchedulerError(
            f"expected a scheduler of diffusers, whose config has num_train_timesteps, got {type(scheduler).__name__} without: "
            "give the schedule that the network was trained with as scheduler=…"
        )
    return count
