"""Exact responses against central differences of the whole pipeline, at what it returns, draw by draw.

``python -m tests.pipelines.judge`` writes the table of docs/pipelines.md.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesdiff as bd
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.propagation.returned import values
from bayesdiff.tracing.before_clamp import BeforeClamp
from tests.pipelines import Case

DRAWS = 3
#: δW, relative to W: large enough for float32, small enough for a derivative.
SIZE = 1e-3
#: Heads that are not where most networks have theirs.
HEADS = {
    "wan-two-networks": "transformer_2.proj_out",
    "stable-audio": "postprocess_conv",
    "cascade": "decoder.clf.1",
}


@dataclass(frozen=True)
class Found:
    """What was measured of one pipeline."""

    name: str
    pipeline: str
    same: bool  # whether the returned value is the plain pipe's, bit for bit
    shape: tuple[int, ...]
    error: float  # of the worst draw, relative
    bend: float  # of the reference: how much it changes when its step is halved
    calls: tuple[int, int, int]  # all, plain, of other modules
    selfcheck: float
    exact: tuple[int, int]  # steps with a closed form, steps


def posterior_of(pipe: Any, head: str | None = None) -> LaplacePosterior:
    """A posterior of random features: what is judged is its propagation."""
    found = bd.find_head(pipe, head)
    g, generator = found.geometry, torch.Generator().manual_seed(0)
    shape = (8, 16, g.in_channels) if g.kind == "linear" else (8, g.in_channels, *(6,) * len(g.kernel_size))
    x = torch.randn(shape, generator=generator)
    r = torch.randn(g.output_shape(x), generator=generator)
    statistics = Statistics(g, 1, "cpu")
    statistics.update(x, r, torch.zeros(8, dtype=torch.long), torch.arange(8))
    return LaplacePosterior.from_statistics(
        statistics, found, num_timesteps=1000, covariance="ggn", prior_precision=1.0, dataset_size=8
    )


@contextlib.contextmanager
def modules_paused(pipe: Any, trace: BeforeClamp) -> Iterator[None]:
    """The pipe's modules run untraced."""

    def wrapped(method: Any) -> Any:
        @functools.wraps(method)  # pipelines look at signatures
        def call(*args: Any, **kwargs: Any) -> Any:
            with trace.paused():
                return method(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for module in {id(m): m for m in pipe.components.values() if isinstance(m, nn.Module)}.values():
            for name in ("forward", "decode", "encode"):
                if hasattr(module, name) and name not in vars(module):
                    vars(module)[name] = wrapped(getattr(module, name))
                    stack.callback(vars(module).pop, name)
        yield


def measure(case: Case) -> Found:
    """One pipeline."""
    pipe = case.make()
    posterior = posterior_of(pipe, HEADS.get(case.name))

    def call() -> dict[str, Any]:
        return case.call(pipe, torch.Generator().manual_seed(0))

    plain = values(pipe(**call()), None)
    settings = bd.Tangents(draws=DRAWS, refresh=1, num_directions=DRAWS, decoder_calls=DRAWS, factors=True)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
    size = up.deviations.square().mean().sqrt() / up.head.weight().square().mean().sqrt()
    up.deviations = up.deviations * (SIZE / size)
    out = up(**call())

    def reference(delta: Tensor) -> Tensor:
        ends = []
        for sign in (1, -1):
            trace = BeforeClamp()
            with up.head.shifted(sign * delta), modules_paused(pipe, trace), torch.no_grad(), trace:
                output = pipe(**call())
            ends.append(values(output, trace))
        return (ends[0] - ends[1]) / 2

    errors, bends = [], []
    assert out.factors is not None
    for delta, factor in zip(up.deviations, out.factors, strict=True):
        wanted = reference(delta)
        errors.append(float((factor.double() * DRAWS**0.5 - wanted).norm() / wanted.norm()))
        bends.append(float((2 * reference(delta / 2) - wanted).norm() / wanted.norm()))
    return Found(
        case.name, type(pipe).__name__, torch.equal(values(out.output, None), plain), tuple(out.std.shape), max(errors),
        max(bends), (out.calls, out.plain_calls, out.other_calls), out.selfcheck, (sum(out.exact_steps), len(out.exact_steps)),
    )  # fmt: skip


def table(rows: list[Found]) -> str:
    """In Markdown."""
    head = (
        "| case | pipeline | `std` | error | bend of the reference | steps in closed form |\n"
        "|---|---|---|---|---|---|\n"
    )  # fmt: skip
    return head + "".join(
        f"| {r.name} | {r.pipeline} | {' × '.join(map(str, r.shape))} | {r.error:.1e} | {r.bend:.1e} | "
        f"{r.exact[0]} of {r.exact[1]} |\n"
        for r in rows
    )


def main() -> None:
    from tests.pipelines.build import CASES

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        if sys.argv[1:] and not any(a in case.name for a in sys.argv[1:]):
            continue
        clock = time.perf_counter()
        rows.append(measure(case))
        print(f"{rows[-1]} {time.perf_counter() - clock:.1f} s", file=sys.stderr, flush=True)
    if sys.argv[1:]:
        print(table(rows))
        return
    page = Path("docs/pipelines.md")
    text = page.read_text()
    start, end = text.index("| case |"), text.index("\n\n", text.index("| case |")) + 1
    page.write_text(text[:start] + table(rows) + text[end:])


if __name__ == "__main__":
    main()
