"""The command line: uncertainty maps of a shipped or saved model, and a demonstration.

Only what is needed to show help is imported here; commands import the rest when they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Pixel-wise uncertainty of diffusion and flow models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What options may be, as the modules that know them have it (a test compares them).
MODELS = ("fashion-ddpm", "fashion-4step", "earth-sd", "earth-sd3")
SCHEDULERS = (
    "ddim", "ddpm", "pndm", "lms", "euler", "euler-a", "heun", "kdpm2", "kdpm2-a", "dpm++", "dpm++-single", "unipc", "deis", "sa",
    "lcm", "tcd",
)  # fmt: skip
PROPAGATIONS = ("tangents", "ensemble", "bayesdiff", "bayesdiff-centered")
STRUCTURES = ("full", "kron", "diag", "lowrank")
COVARIANCES = ("sandwich", "ggn", "ef")
DTYPES = ("float32", "float64", "bfloat16", "float16")

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
        str, typer.Option(help=f"One of {', '.join(MODELS)}, or a folder of save_pretrained.")
    ] = "fashion-ddpm",
    num_samples: Annotated[int, typer.Option(help="Samples in all.")] = 8,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    seed: Seed = 0,
    scheduler: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULERS)}.")] = "ddim",
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
    from bayesdiff.cli.maps import MapOptions, draw_maps
    from bayesdiff.cli.show import reporting

    with reporting(debug):
        draw_maps(
            MapOptions(
                out=out,
                classes=classes,
                model=model,
                num_samples=num_samples,
                steps=steps,
                seed=seed,
                scheduler=scheduler,
                eta=eta,
                guidance_scale=guidance_scale,
                propagation=propagation,
                num_tangents=num_tangents,
                extra_calls=extra_calls,
                refresh=refresh,
                num_directions=num_directions,
                recursion_samples=recursion_samples,
                skip_interval=skip_interval,
                batch_invariant=batch_invariant,
                posterior=posterior,
                structure=structure,
                covariance=covariance,
                dtype=dtype,
                device=device,
            )
        )


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
    from bayesdiff.cli.demonstration import run_demo
    from bayesdiff.cli.show import reporting

    with reporting(debug):
        run_demo(out, steps, num_tangents, ensemble, images, seed, device)
