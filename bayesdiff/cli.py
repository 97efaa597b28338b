"""The command line: uncertainty maps of a shipped or saved model, and a demonstration.

Everything that can be wrong about a command is looked at before the first network call; mistakes end in
one line, ``error: …``, and exit code 2.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Generator, Tensor

from bayesdiff import zoo
from bayesdiff.checks import (
    ArgumentError,
    BayesdiffError,
    BayesdiffWarning,
    UnknownNameError,
    UnsupportedPipelineError,
    check_choice,
    check_int,
    check_output_folder,
)
from bayesdiff.fit import fit
from bayesdiff.io import atomic_path, environment, write_json
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.structure import COVARIANCES, STRUCTURES
from bayesdiff.pipeline import PROPAGATIONS, UncertaintyOutput, UncertaintyPipeline
from bayesdiff.plotting import plot_maps
from bayesdiff.rng import item_generator

app = typer.Typer(
    help="Pixel-wise uncertainty of diffusion and flow models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Streams of the seed, apart from those of the samples (seed + i).
TANGENT_DRAWS, ENSEMBLE_DRAWS = 1, 2

DEMO_CLASSES = ("sneaker", "shirt", "bag", "trouser")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, …; by default cuda where there is one.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Sample i starts from seed + i, however many samples there are.")]


@app.command("map")
def map_command(
    out: Annotated[Path, typer.Option(help="Folder for images, maps and settings.")],
    classes: Annotated[list[str], typer.Option("--class", help="What to draw; give it several times to take turns.")],
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(zoo.names())}, or a folder of save_pretrained.")
    ] = "fashion-ddpm",
    num_samples: Annotated[int, typer.Option(help="Samples in all.")] = 8,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    seed: Seed = 0,
    scheduler: Annotated[str, typer.Option(help=f"One of {', '.join(zoo.scheduler_names())}.")] = "ddim",
    eta: Annotated[float, typer.Option(help="η of DDIM.")] = 0.0,
    guidance_scale: Annotated[float, typer.Option(help="1 is no guidance.")] = 1.0,
    propagation: Annotated[str, typer.Option(help=f"One of {', '.join(PROPAGATIONS)}.")] = "tangents",
    num_tangents: Annotated[int, typer.Option(help="Weight draws: K of tangents, M of an ensemble.")] = 64,
    extra_calls: Annotated[
        float, typer.Option(help="Network calls that tangents may spend, in those of the images alone.")
    ] = 2.5,
    refresh: Annotated[
        int | None,
        typer.Option(
            help="r, steps between measurements of the network's response; by default from --extra-calls.",
            show_default=False,
        ),
    ] = None,
    num_directions: Annotated[
        int | None,
        typer.Option(
            help="p, network evaluations in one measurement; by default from --extra-calls.", show_default=False
        ),
    ] = None,
    recursion_samples: Annotated[int, typer.Option(help="S of bayesdiff.")] = 10,
    skip_interval: Annotated[int, typer.Option(help="bayesdiff quantifies one step in so many.")] = 1,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same map to the last bit in any batch; slower.")
    ] = False,
    posterior: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a saved posterior; by default one is fitted to the model's data.", show_default=False
        ),
    ] = None,
    structure: Annotated[str, typer.Option(help=f"Of the fit; one of {', '.join(STRUCTURES)}.")] = "full",
    covariance: Annotated[str, typer.Option(help=f"Of the fit; one of {', '.join(COVARIANCES)}.")] = "sandwich",
    dtype: Annotated[str, typer.Option(help=f"Of the network; one of {', '.join(DTYPES)}.")] = "float32",
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Draw samples and the pixel-wise standard deviation of each."""
    with _reporting(debug):
        settings = {
            "model": model, "classes": classes, "num_samples": num_samples, "steps": steps, "seed": seed,
            "scheduler": scheduler, "eta": eta, "guidance_scale": guidance_scale, "propagation": propagation,
            "num_tangents": num_tangents, "extra_calls": extra_calls, "refresh": refresh,
            "num_directions": num_directions, "recursion_samples": recursion_samples, "skip_interval": skip_interval,
            "batch_invariant": batch_invariant, "structure": structure, "covariance": covariance,
            "posterior": "fitted" if posterior is None else "given", "dtype": dtype,
        }  # fmt: skip
        check_int("--num-samples", num_samples, least=1)
        check_int("--steps", steps, least=1)
        check_int("--seed", seed, least=0)
        check_choice("--propagation", propagation, PROPAGATIONS)
        check_int("--num-tangents", num_tangents, least=2 if propagation == "ensemble" else 1)
        check_int("--recursion-samples", recursion_samples, least=2)
        check_int("--skip-interval", skip_interval, least=1)
        if refresh is not None:
            check_int("--refresh", refresh, least=1)
        if num_directions is not None:
            check_int("--num-directions", num_directions, least=1)
        check_choice("--structure", structure, STRUCTURES)
        check_choice("--covariance", covariance, COVARIANCES)
        check_choice("--dtype", dtype, tuple(DTYPES))
        where = _device(device)
        pipe, data = _load(model, scheduler, DTYPES[dtype], needs_data=posterior is None)
        indices = pipe.class_indices([classes[i % len(classes)] for i in range(num_samples)])
        names = [pipe.class_names[c] if pipe.class_names else str(c) for c in indices]
        check_output_folder(out)
        pipe.to(where)

        seconds: dict[str, float] = {}
        if posterior is not None:
            laplace = LaplacePosterior.load(posterior)
        else:
            with _timed(seconds, "fit"):
                laplace = _fit(pipe, data, seed, structure=structure, covariance=covariance)
            laplace.save(out / "posterior")
        up = UncertaintyPipeline(
            pipe, laplace, propagation=propagation, num_tangents=num_tangents, extra_calls=extra_calls, refresh=refresh,
            num_directions=num_directions, num_samples=recursion_samples, skip_interval=skip_interval,
            batch_invariant=batch_invariant,
            generator=item_generator(seed, TANGENT_DRAWS if propagation == "tangents" else ENSEMBLE_DRAWS),
        )  # fmt: skip
        draws = f" of {num_tangents} weight draws" if propagation in ("tangents", "ensemble") else ""
        _say(f"sampling {num_samples} × {steps} steps with {propagation}{draws}")
        with _timed(seconds, "sampling"):
            output = up(
                indices, num_inference_steps=steps, eta=eta, guidance_scale=guidance_scale,
                generator=_generators(seed, num_samples),
            )  # fmt: skip

        files = _write_samples(out, output)
        plot_maps(output.images, output.std, titles=names, path=out / "figure.png")
        record = {
            "command": "map",
            "settings": settings,
            "samples": [
                {"file": file, "class": name, "seed": seed + i, **{k: float(v[i]) for k, v in output.scores().items()}}
                for i, (file, name) in enumerate(zip(files, names, strict=True))
            ],
            "posterior": _describe(laplace),
            "network_calls": {"pipe": output.plain_calls, "all": output.calls},
            "seconds": seconds,
            "environment": environment(where),
        }
        write_json(out / "settings.json", record)
        std = output.std.flatten(1).double()
        _table(
            ("sample", "class", "seed", "mean std", "largest std"),
            [
                (file, name, str(seed + i), f"{std[i].mean():.4f}", f"{std[i].max():.4f}")
                for i, (file, name) in enumerate(zip(files, names, strict=True))
            ],
        )
        own, took = output.plain_calls, seconds["sampling"]
        _say(f"{output.calls} network calls, of which {own} the pipe's own, in {took:.1f} s")
        _say(f"written to {out}: images, std.npz, figure.png, settings.json")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figure and settings.")],
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    num_tangents: Annotated[int, typer.Option(help="K, weight draws of the tangents.")] = 64,
    ensemble: Annotated[int, typer.Option(help="M, trajectories of the ensemble.")] = 24,
    images: Annotated[
        int | None, typer.Option(help="Fit to the first so many images only.", show_default=False)
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """The shipped model: what a map costs, and how well it agrees with an ensemble of whole trajectories."""
    with _reporting(debug):
        check_int("--steps", steps, least=1)
        check_int("--num-tangents", num_tangents, least=1)
        check_int("--ensemble", ensemble, least=2)
        check_int("--seed", seed, least=0)
        if images is not None:
            check_int("--images", images, least=1)
        where = _device(device)
        pipe, data = zoo.load("fashion-ddpm")
        indices = pipe.class_indices([c for c in DEMO_CLASSES for _ in range(2)])
        names = [pipe.class_names[c] for c in indices]
        check_output_folder(out)
        pipe.to(where)

        seconds: dict[str, float] = {}
        with _timed(seconds, "fit"):
            laplace = _fit(pipe, data.subset(slice(images)), seed)

        def run(call: Callable[..., Any]) -> Any:
            return call(indices, num_inference_steps=steps, generator=_generators(seed, len(indices)))

        _say(f"sampling {len(indices)} images in one batch, {steps} steps of DDIM: the pipe alone")
        run(lambda *a, **k: pipe(*a, **{**k, "num_inference_steps": 1}))  # what a first call sets up is not timed
        with _timed(seconds, "plain"):
            plain = run(pipe).images
        _say(f"… with {num_tangents} tangents")
        tangents = UncertaintyPipeline(
            pipe, laplace, num_tangents=num_tangents, generator=item_generator(seed, TANGENT_DRAWS)
        )
        with _timed(seconds, "tangents"):
            fast: UncertaintyOutput = run(tangents)
        _say(f"… and {ensemble} times again, with {ensemble} other weight draws")
        members = UncertaintyPipeline(
            pipe, laplace, propagation="ensemble", num_tangents=ensemble, generator=item_generator(seed, ENSEMBLE_DRAWS)
        )
        with _timed(seconds, "ensemble"):
            slow: UncertaintyOutput = run(members)

        same = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(plain, fast.images, strict=True))
        agreement = compare(fast.std, slow.std)
        noise = {"tangents": (2 * num_tangents) ** -0.5, "ensemble": (2 * (ensemble - 1)) ** -0.5}
        _write_samples(out, fast)
        plot_maps(
            fast.images, fast.std, reference=slow.std, names=("tangents", "ensemble"), titles=names,
            path=out / "figure.png",
        )  # fmt: skip
        calls = {"plain": fast.plain_calls, "tangents": fast.calls, "ensemble": slow.calls}
        record = {
            "command": "demo",
            "settings": {
                "model": "fashion-ddpm", "classes": names, "steps": steps, "num_tangents": num_tangents,
                "ensemble": ensemble, "images": images or data.num_images, "seed": seed, "scheduler": "ddim",
            },
            "posterior": _describe(laplace),
            "network_calls": calls,
            "seconds": seconds,
            "images_are_the_pipes_own": same,
            "agreement": agreement,
            "relative_noise_of_std": noise,
            "environment": environment(where),
        }  # fmt: skip
        write_json(out / "settings.json", record)

        rows = [
            (label, str(calls[key]), f"{calls[key] / calls['plain']:.1f}", f"{seconds[key]:.1f}")
            for label, key in (
                ("the pipe alone", "plain"),
                (f"with tangents, K = {num_tangents}", "tangents"),
                (f"with an ensemble, M = {ensemble}", "ensemble"),
            )
        ]
        _table(("", "network calls", "relative", "seconds"), rows)
        _say(f"images the pipe's own, bit for bit: {'yes' if same else 'NO'}")
        _say(
            f"std of tangents against the ensemble's, per pixel: correlation {agreement['correlation']:.3f}, "
            f"ratio of means {agreement['ratio_of_means']:.2f}"
        )
        _say(
            f"(K = {num_tangents} and M = {ensemble} draws alone scatter a pixel's std by about "
            f"±{noise['tangents']:.0%} and ±{noise['ensemble']:.0%}: this limits both numbers)"
        )
        _say(f"written to {out}: figure.png, images, std.npz, settings.json")


def compare(std: Tensor, reference: Tensor) -> dict[str, float]:
    """How two maps agree over all pixels: Pearson's correlation, and mean of ``std`` over mean of ``reference``."""
    both = torch.stack([std.flatten(), reference.flatten()]).double()
    return {
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "ratio_of_means": float(both[0].mean() / both[1].mean()),
    }


def _load(name: str, scheduler: str, dtype: torch.dtype, *, needs_data: bool) -> tuple[Any, zoo.ClassImages | None]:
    """A shipped model, or one in a folder; the folder has no data to fit to."""
    if name in zoo.names():
        return zoo.load(name, scheduler=scheduler, dtype=dtype)
    folder = Path(name)
    if not (folder / "model_index.json").is_file():
        raise UnknownNameError(
            f"expected --model to be one of {', '.join(map(repr, zoo.names()))}, or a folder written by "
            f"save_pretrained, got {name!r}, where there is no model_index.json"
        )
    kind = zoo.ClassConditionalPipeline.load_config(folder, local_files_only=True).get("_class_name")
    if kind != zoo.ClassConditionalPipeline.__name__:
        raise UnsupportedPipelineError(
            f"expected a saved ClassConditionalPipeline, got {kind}; use bayesdiff.UncertaintyPipeline from Python"
        )
    if needs_data:
        raise ArgumentError(
            f"expected --posterior beside the folder {name!r}, which has no data to fit one to; got none"
        )
    return zoo.load_pipeline(folder, scheduler=scheduler, dtype=dtype), None


def _fit(pipe: Any, data: Any, seed: int, **kwargs: Any) -> LaplacePosterior:
    _say(f"fitting the posterior to {data.num_images} of {data.dataset_size} training images")
    generator = Generator().manual_seed(seed)
    bar = sys.stderr.isatty()
    return fit(pipe, data, dataset_size=data.dataset_size, generator=generator, progress=bar, **kwargs)


def _describe(posterior: LaplacePosterior) -> dict[str, Any]:
    return {
        "structure": posterior.structure,
        "covariance": posterior.covariance,
        "num_images": posterior.num_images,
        "dataset_size": posterior.dataset_size,
        "prior_precision": posterior.prior_precision,
    }


def _write_samples(out: Path, output: UncertaintyOutput) -> list[str]:
    """The images as PNG and ``std.npz``; returns the images' names."""
    digits = max(2, len(str(len(output.images) - 1)))
    files = [f"sample-{i:0{digits}d}.png" for i in range(len(output.images))]
    for file, image in zip(files, output.images, strict=True):
        with atomic_path(out / file) as temporary:
            image.save(temporary)
    with atomic_path(out / "std.npz") as temporary:
        np.savez_compressed(
            temporary,
            std=output.std.float().cpu().numpy(),
            latent_variance=output.latents.variance.float().cpu().numpy(),
        )
    return files


def _generators(seed: int, count: int) -> list[Generator]:
    return [Generator().manual_seed(seed + i) for i in range(count)]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ArgumentError(f"expected --device to be one that torch can use here, got {name!r}: {reason}") from error
    return device


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 3)


@contextmanager
def _reporting(debug: bool) -> Iterator[None]:
    """The package's errors and warnings as one line each."""
    plain = warnings.showwarning

    def show(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        if issubclass(category, BayesdiffWarning):
            typer.echo(f"warning: {_line(message)}", err=True)
        else:
            plain(message, category, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        except BayesdiffError as error:
            if debug:
                raise
            typer.echo(f"error: {_line(error)}", err=True)
            raise typer.Exit(2) from None


def _line(message: object) -> str:
    return " ".join(str(message).split())


def _say(message: str) -> None:
    typer.echo(message)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A small table; numbers, which is all but the first column, to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    rule = "  ".join("─" * w for w in widths)
    for row in [columns, None, *rows]:
        if row is None:
            _say(rule)
        else:
            cells = [
                f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            _say("  ".join(cells).rstrip())


if __name__ == "__main__":
    app()
