"""The variance of one guided step: in feature space, by brute force, and as if its branches were independent.

    python -m experiments.guidance_check

On the shipped model, at five steps of DDIM's trajectory and for several guidance scales s: ψᵀΣψ with ψ = φ_u + s(φ_c − φ_u),
as :class:`bayesdiff.UncertaintyPipeline` reports it for every step; the variance of f_u + s(f_c − f_u) over weight draws; and
(1 − s)² v_u + s² v_c, which takes the branches as independent (BayesDiff).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import bayesdiff
from bayesdiff.propagation.run import UncertainRun
from bayesdiff.propagation.settings import Tangents
from bayesdiff.propagation.steps import row_features, step_variance
from experiments.common import agreement, command, fitted, record, results_folder, table

SCALES = (1.5, 3.0, 7.5, 15.0)


def main(
    draws: Annotated[int, typer.Option(help="Weight draws of the brute force.")] = 4000,
    samples: Annotated[int, typer.Option(help="Images, over the classes in turn.")] = 6,
    steps: Annotated[int, typer.Option(help="DDIM steps, at each of which there is a comparison.")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare three variances of one guided step."""
    folder = results_folder("guidance_check", out)
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    posterior = fitted(seed)
    head = posterior.check(pipe)
    weights = posterior.deviations(draws, torch.Generator().manual_seed(seed + 1)).float()
    rows: list[dict[str, Any]] = []
    for scale in SCALES:
        call = {
            "guidance_scale": scale, "num_inference_steps": steps,
            "generator": [torch.Generator().manual_seed(seed + i) for i in range(samples)],
        }  # fmt: skip
        names = ([data.class_names[i % 10] for i in range(samples)],)
        run = UncertainRun(pipe, pipe.unet, head, posterior, Tangents(), weights[:1], 0, names, call)
        run.session.record()
        run.probe()
        for step in run.steps:
            network_calls = run.session.network.calls
            closed = step_variance(step, network_calls, posterior)
            assert closed is not None
            brute, independent = torch.zeros_like(closed), torch.zeros_like(closed)
            for b, sources in enumerate(step.sources):
                found = [(s.weight, row_features(network_calls[s.call], s.row)) for s in sources]
                branches = [(w, f[0]) for w, f in found if f is not None]
                for some in weights.split(200):
                    parts = [w * posterior.geometry.apply(phi, some) for w, phi in branches]
                    brute[b] += torch.stack(parts).sum(0).square().sum(0)[0] / len(weights)
                independent[b] = sum(w**2 * posterior.variance(phi)[0] for w, phi in branches)
            rows.append(
                {
                    "s": scale, "t": int(step.timestep), "closed_over_brute": float((closed / brute).mean()),
                    "largest_deviation": float((closed / brute - 1).abs().max()),
                    "correlation": agreement(closed.sqrt(), brute.sqrt())["correlation"],
                    "independent_over_brute": float((independent / brute).mean()),
                    "independent_correlation": agreement(independent.sqrt(), brute.sqrt())["correlation"],
                }
            )  # fmt: skip
    columns = {
        "s": "g", "t": "d", "closed_over_brute": ".3f", "largest_deviation": ".3f", "correlation": ".4f",
        "independent_over_brute": ".1f", "independent_correlation": ".3f",
    }  # fmt: skip
    print(table(rows, columns))
    print(f"{draws} draws: a relative error of {math.sqrt(2 / draws):.3f} in each pixel's brute-force variance.")
    record(
        folder,
        {
            "draws": draws, "samples": samples, "steps": steps, "seed": seed, "model": "fashion-ddpm",
            "command": command("guidance_check"),
        },
        rows,
    )  # fmt: skip
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
