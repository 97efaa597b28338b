"""The command line: posteriors and uncertainty maps of a shipped or saved model, and a demonstration.

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
DRAWS, MEMBERS = 128, 24  # K of tangents, M of an ensemble

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, …; by default cuda where there is one.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Sample i starts from seed + i, however many samples there are.")]
Model = Annotated[
    str, typer.Option(help=f"One of {', '.join(MODELS)}, a folder of save_pretrained, or OWNER/NAME on the hub.")
]
Dtype = Annotated[str, typer.Option(help=f"Of the networks; one of {', '.join(DTYPES)}.")]
Structure = Annotated[str, typer.Option(help=f"Of the fit; one of {', '.join(STRUCTURES)}.")]
Covariance = Annotated[str, typer.Option(help=f"Of the fit; one of {', '.join(COVARIANCES)}.")]
Prompt = Annotated[str | None, typer.Option(help="A text for all images, if the folder has none.", show_default=False)]
Size = Annotated[
    int | None, typer.Option(help="Height and width of the images; by default the model's.", show_default=False)
]
Convert = Annotated[
    bool, typer.Option("--convert", help="Convert grey, transparent, palette and CMYK images instead of an error.")
]


@app.command("fit")
def fit_command(
    data: Annotated[
        Path,
        typer.Option(help="Folder of images, with metadata.jsonl or .csv for texts or labels, or folders of classes."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the posterior. A fit that was killed goes on if it is run again.")
    ],
    model: Model,
    prompt: Prompt = None,
    dataset_size: Annotated[
        int | None,
        typer.Option(help="N, the images that the model was trained on; by default those given.", show_default=False),
    ] = None,
    training_draws: Annotated[
        float | None,
        typer.Option(
            help="M, how often each image was drawn in the training: steps × batch size / N.", show_default=False
        ),
    ] = None,
    draws_per_image: Annotated[
        int | None,
        typer.Option(
            help="Timesteps and noises drawn for each image; by default --training-draws, 10 at most; else 1.",
            show_default=False,
        ),
    ] = None,
    size: Size = None,
    convert: Convert = False,
    structure: Structure = "full",
    covariance: Covariance = "sandwich",
    batch_size: Annotated[int, typer.Option(help="Rows in a network call.")] = 16,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between checkpoints, at least.")] = 60.0,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the posterior that is in the folder, once the new one is whole."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of timesteps and noise.")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Fit the posterior of a model to a folder of images."""
    from bayesdiff.cli.fits import FitOptions, run_fit
    from bayesdiff.cli.show import reporting

    with reporting(debug):
        run_fit(
            FitOptions(
                model=model,
                data=data,
                out=out,
                prompt=prompt,
                dataset_size=dataset_size,
                training_draws=training_draws,
                draws_per_image=draws_per_image,
                size=size,
                convert=convert,
                structure=structure,
                covariance=covariance,
                batch_size=batch_size,
                checkpoint_every=checkpoint_every,
                overwrite=overwrite,
                seed=seed,
                dtype=dtype,
                device=device,
            )
        )


@app.command("map")
def map_command(
    out: Annotated[Path, typer.Option(help="Folder for images, maps and settings.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="A text to draw; several take turns.", show_default=False),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="A class to draw, by name or number; several take turns.", show_default=False),
    ] = None,
    model: Model = "fashion-ddpm",
    num_samples: Annotated[
        int | None,
        typer.Option(help="Samples in all; by default one of each prompt or class.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    seed: Seed = 0,
    scheduler: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(SCHEDULERS)}; by default the model's own.", show_default=False),
    ] = None,
    eta: Annotated[float | None, typer.Option(help="η of DDIM.", show_default=False)] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 is no guidance; by default the pipeline's own.", show_default=False)
    ] = None,
    propagation: Annotated[str, typer.Option(help=f"One of {', '.join(PROPAGATIONS)}.")] = "tangents",
    num_tangents: Annotated[
        int | None,
        typer.Option(
            help=f"Weight draws: K of tangents (default {DRAWS}), M of an ensemble (default {MEMBERS}).",
            show_default=False,
        ),
    ] = None,
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
            help="Folder of a saved posterior; by default one is fitted to the data that ship with the model.",
            show_default=False,
        ),
    ] = None,
    structure: Structure = "full",
    covariance: Covariance = "sandwich",
    dtype: Dtype = "float32",
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
                prompts=prompts or [],
                classes=classes or [],
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


Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder of held-out images, as of fit; by default those that ship with the model.", show_default=False
    ),
]
Posterior = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a saved posterior; by default one is fitted to the data that ship with the model.",
        show_default=False,
    ),
]


@app.command("evaluate")
def evaluate_command(
    out: Annotated[Path, typer.Option(help="Folder for the table, the figure and settings.")],
    model: Model = "fashion-ddpm",
    data: Data = None,
    prompt: Prompt = None,
    images: Annotated[
        int | None, typer.Option(help="The first so many of the shipped images only.", show_default=False)
    ] = None,
    posterior: Posterior = None,
    bins: Annotated[int, typer.Option(help="Equal bins of t.")] = 10,
    timesteps: Annotated[
        list[float] | None,
        typer.Option("--timestep", help="Only at this timestep; may be given again.", show_default=False),
    ] = None,
    probes: Annotated[int, typer.Option(help="Numbers of each sample at which Tweedie's variance is measured.")] = 8,
    draws: Annotated[int, typer.Option(help="Timesteps and noises of each image in each bin.")] = 1,
    size: Size = None,
    convert: Convert = False,
    batch_size: Annotated[int, typer.Option(help="Rows in a network call.")] = 50,
    seed: Annotated[int, typer.Option(help="Of timesteps, noise, and which half noise models are fitted to.")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Are predictions of held-out images calibrated: coverage, NLL, CRPS and ENCE by bins of t."""
    from bayesdiff.cli.judged import JudgeOptions, run_evaluate
    from bayesdiff.cli.show import reporting

    with reporting(debug):
        o = JudgeOptions(out, model, data, prompt, images, posterior, size, convert, seed, dtype, device)
        run_evaluate(o, bins, timesteps, probes, draws, batch_size)


@app.command("compare")
def compare_command(
    out: Annotated[Path, typer.Option(help="Folder for the table, the figure and settings.")],
    model: Model = "fashion-ddpm",
    data: Data = None,
    prompt: Prompt = None,
    images: Annotated[int, typer.Option(help="So many of the shipped images, at timesteps spread from 0 to T.")] = 8,
    posterior: Posterior = None,
    links: Annotated[
        list[str] | None,
        typer.Option("--link", help="identity, clamped_pixel or sigmoid; by default all.", show_default=False),
    ] = None,
    draws: Annotated[
        list[int] | None, typer.Option(help="n of Monte Carlo; by default 30, 100, 300.", show_default=False)
    ] = None,
    size: Size = None,
    convert: Convert = False,
    seed: Annotated[int, typer.Option(help="Of noise and weight draws.")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Monte Carlo against closed forms on the head of a model: errors and times."""
    from bayesdiff.cli.judged import JudgeOptions, run_compare
    from bayesdiff.cli.show import reporting

    with reporting(debug):
        o = JudgeOptions(
            out,
            model,
            data,
            prompt,
            None if data is not None else images,
            posterior,
            size,
            convert,
            seed,
            dtype,
            device,
        )
        run_compare(o, links or ["identity", "clamped_pixel", "sigmoid"], draws or [30, 100, 300])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figure and settings.")],
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    num_tangents: Annotated[int, typer.Option(help="K, weight draws of the tangents.")] = DRAWS,
    ensemble: Annotated[int, typer.Option(help="M, trajectories of the ensemble.")] = 24,
    images: Annotated[
        int | None, typer.Option(help="Fit to the first so many images; by default 1,000.", show_default=False)
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
