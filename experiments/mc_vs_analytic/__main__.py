"""When is Monte Carlo needed for a head's predictive distribution?

    python -m experiments.mc_vs_analytic

At the true shapes of published heads, the head alone: time and peak memory for one image of the closed forms, of batched Monte
Carlo (all draws in one convolution or matrix product) and of laplace-torch's Monte Carlo with 100 draws, with errors against
the full posterior in float64. Then links at one shape, and the shipped model with its real features: what structures
leave out, and what a prior and a noise of 1 cost in held-out likelihood.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from laplace import DiagLaplace
from matplotlib.figure import Figure
from scipy.special import roots_hermitenorm
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import bayesdiff
from bayesdiff.diffusion.noising import draw, noised
from bayesdiff.gaussian import Gaussian
from bayesdiff.head.find import Head
from bayesdiff.io import write_figure
from bayesdiff.laplace.links import ClampedPixel, Exceedance, Identity, Link, Sigmoid, Smooth
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from experiments.common import agreement, command, record, results_folder, table
from experiments.fit_overhead.__main__ import sd15_unet
from experiments.mc_vs_analytic.heads import SHAPES, Shape, fitted
from experiments.mc_vs_analytic.measure import cost

DRAWS = (10, 100, 1000)
RANK = 256
STRUCTURES: dict[str, dict[str, Any]] = {
    "diag": {"structure": "diag"},
    "lowrank": {"structure": "lowrank", "rank": RANK},
    "kron": {"structure": "kron", "covariance": "sandwich"},
    "full": {"structure": "full"},
}


def laplace_torch(layer: nn.Module, variances: Tensor) -> DiagLaplace:
    """laplace-torch's diagonal posterior of the same layer, with our variances put in: only its prediction is timed."""
    model = nn.Sequential(layer, nn.Flatten())
    la = DiagLaplace(model, "regression", prior_precision=1.0)
    la.mean = parameters_to_vector(model.parameters()).detach()
    weights, bias = variances[:, :-1], variances[:, -1]
    flat = torch.cat([weights.flatten(), bias])  # parameters: weight, then bias
    la.H = (1 / flat - 1).to(la.mean)
    return la


def dense_variance(posterior: LaplacePosterior, inputs: Tensor, positions: Tensor) -> Tensor:
    """φᵀΣφ of a full GGN posterior at some positions, from its definition in float64: ``(positions,)``."""
    phi = posterior.geometry.design(inputs.float().cpu())[0, positions].double()
    assert posterior.precision is not None  # as fitted
    precision = posterior.precision + float(posterior.prior_precision) * torch.eye(len(posterior.precision)).double()
    return (phi.T * torch.cholesky_solve(phi.T, torch.linalg.cholesky(precision))).sum(0)


def at_positions(posterior: LaplacePosterior, variance: Tensor, positions: Tensor) -> Tensor:
    """The first channel of a layer's output at the same positions."""
    flat = variance.flatten(2)[0, 0] if posterior.geometry.kind == "conv" else variance[0, :, 0]
    return flat[positions.to(flat.device)].double().cpu()


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the relative error."""
    return float(((got - expected) / expected).square().mean().sqrt())


def measure_shape(
    shape: Shape, head: Head, statistics: Statistics, device: torch.device, dtype: torch.dtype, *, glm: bool = False
) -> list[dict[str, Any]]:
    """All methods at one shape."""
    x = shape.features(1, 0).to(device, dtype)
    layer = shape.layer().to(device, dtype)
    positions = torch.randperm(
        shape.size ** (2 if shape.kind == "conv" else 1), generator=torch.Generator().manual_seed(0)
    )
    positions = positions[:200]
    forward = cost(torch.no_grad()(partial(layer, x)), device)
    rows: list[dict[str, Any]] = [
        {
            "head": shape.name,
            "method": "the head's own forward",
            "seconds": forward.seconds,
            "megabytes": forward.megabytes,
        }
    ]

    def add(method: str, seconds: float, megabytes: float, **more: Any) -> None:
        rows.append({"head": shape.name, "method": method, "seconds": seconds, "megabytes": megabytes, **more})

    full = LaplacePosterior.from_statistics(statistics, head, covariance="ggn")
    reference = dense_variance(full, x, positions)
    for name, settings in STRUCTURES.items():
        posterior = full if name == "full" else full.recut(**settings)
        closed = cost(partial(posterior.variance, x), device)
        got = at_positions(full, closed.result, positions)
        more: dict[str, Any] = {} if name == "kron" else {"error": error(got, reference)}
        if name == "diag":  # of the arithmetic alone, against its own definition in float64
            phi = full.geometry.design(x.float().cpu())[0, positions].double()
            more["own_error"] = error(got, phi.square() @ posterior.weight_variance()[0])
        add(f"closed form, {name}", closed.seconds, closed.megabytes, **more)
        if name != "diag":
            continue
        expected = at_positions(full, closed.result, positions)
        for n in DRAWS:
            generator = torch.Generator().manual_seed(n)
            mc = cost(partial(posterior.predict, x, "mc", n, generator=generator), device)
            add(
                f"batched MC, n = {n}", mc.seconds, mc.megabytes, n=n, theory=math.sqrt(2 / (n - 1)),
                mc_error=error(at_positions(full, mc.result.variance, positions), expected),
            )  # fmt: skip
        la = laplace_torch(layer.float(), posterior.weight_variance())
        la.mean, la.H = la.mean.to(device), la.H.to(device)
        torch.manual_seed(0)
        call = partial(la, x.float(), pred_type="nn", link_approx="mc", n_samples=100)
        theirs = cost(call, device, budget=1.0, most=3)
        variance = theirs.result[1].view(closed.result.shape)
        add(
            "laplace-torch, MC n = 100", theirs.seconds, theirs.megabytes, n=100,
            mc_error=error(at_positions(full, variance, positions), expected),
        )  # fmt: skip
        if glm:
            theirs = cost(partial(la, x.float(), pred_type="glm"), device, budget=0.0, most=1)
            marginal = theirs.result[1].diagonal(dim1=1, dim2=2).view(closed.result.shape)
            add(
                "laplace-torch, GLM", theirs.seconds, theirs.megabytes,
                glm_error=error(at_positions(full, marginal, positions), expected),
            )  # fmt: skip
        layer.to(dtype)
    for row in rows:
        row["forwards"] = row["seconds"] / forward.seconds
    return rows


def quadrature(link: Link, gaussian: Gaussian) -> Gaussian:
    """Moments by 200 Gauss–Hermite nodes, for smooth links."""
    nodes, weights = (torch.from_numpy(a) for a in roots_hermitenorm(200))
    weights = weights / weights.sum()
    mean, std = gaussian.mean.double().flatten().cpu(), gaussian.std.double().flatten().cpu()
    values = link(mean[:, None] + std[:, None] * nodes)
    first = values @ weights
    return Gaussian(first, (values - first[:, None]).square() @ weights)


def measure_links(shape: Shape, head: Head, statistics: Statistics, device: torch.device) -> list[dict[str, Any]]:
    """What each link costs beside the Gaussian that it starts from, and errs, at standard deviations about 0.3."""
    x = shape.features(1, 0).to(device)
    posterior = LaplacePosterior.from_statistics(statistics, head, covariance="ggn", structure="diag")
    posterior = posterior.recut(temperature=0.09 / float(posterior.variance(x).mean()))
    gaussian = posterior.predict(x)
    pick = torch.randperm(gaussian.mean.numel(), generator=torch.Generator().manual_seed(0))[:2000].to(device)
    few = Gaussian(gaussian.mean.flatten()[pick], gaussian.variance.flatten()[pick])
    links: dict[str, tuple[Link, tuple[str, ...]]] = {
        "identity": (Identity(), ("exact",)),
        "clamped pixel": (ClampedPixel(), ("exact", "linearized")),
        "exceedance": (Exceedance(0.5), ("exact",)),
        "sigmoid": (Sigmoid(), ("probit", "linearized")),
        "tanh": (Smooth(torch.tanh), ("linearized",)),
    }
    rows = []
    for name, (link, approximations) in links.items():
        truth = quadrature(link, few) if name in ("sigmoid", "tanh") else link.moments(few, "exact")

        def errors(result: Gaussian, truth: Gaussian = truth) -> dict[str, float]:
            return {
                "mean_error": float((result.mean.double().cpu().flatten() - truth.mean.double().cpu()).abs().mean()),
                "std_error": float((result.std.double().cpu().flatten() - truth.std.double().cpu()).abs().mean()),
            }

        for approximation in approximations:
            closed = cost(partial(link.moments, gaussian, approximation), device, budget=0.5)
            rows.append(
                {"link": name, "approximation": approximation, "seconds": closed.seconds}
                | errors(link.moments(few, approximation))
            )
        seed = torch.Generator().manual_seed(0)
        mc = cost(partial(posterior.predict, x, "mc", 100, link=link, generator=seed), device, 1.0, 3)
        flat = Gaussian(mc.result.mean.flatten()[pick], mc.result.variance.flatten()[pick])
        rows.append({"link": name, "approximation": "mc, n = 100", "seconds": mc.seconds} | errors(flat))
    return rows


def measure_shipped_model() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Structures on real features, and the evidence's prior and noise against 1 and 1."""
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    posterior = bayesdiff.fit(pipe, data, generator=torch.Generator().manual_seed(0), progress=False)
    assert data.heldout is not None
    test = data.heldout.subset(slice(0, None, 5))
    t, noise = draw(pipe.scheduler, tuple(test.images.shape[1:]), 1, 0, test.num_images, 1)
    x_t, wanted = noised(pipe.scheduler, test.images, noise, t)
    with torch.no_grad(), bayesdiff.find_head(pipe).capture() as captured:
        output = pipe.unet(x_t.float(), t, class_labels=test.labels).sample
    features, residual = captured[0], wanted - output
    rows = []
    variants: dict[str, dict[str, Any]] = {
        "full": {}, "kron": {}, "lowrank, 1 %": {"tolerance": 0.01}, "lowrank, 10 %": {"tolerance": 0.1},
        "lowrank, r = 32": {"rank": 32}, "diag": {},
    }  # fmt: skip
    for covariance in ("sandwich", "ggn", "ef"):
        full = posterior.recut(covariance=covariance, prior_precision="evidence")
        exact = full.variance(features)
        for structure, settings in variants.items():
            cut = full.recut(structure=structure.split(",")[0], **settings)
            rows.append(
                {"covariance": covariance, "structure": structure, "left_out": cut.approximation_error}
                | agreement(cut.variance(features), exact)
                | {"heldout_nats": cut.heldout_log_likelihood(features, residual, t)}
            )
    ggn = posterior.recut(covariance="ggn", prior_precision="evidence")
    likelihood = {
        "evidence": ggn.heldout_log_likelihood(features, residual, t),
        "evidence, noise too": ggn.recut(noise_variance="evidence").heldout_log_likelihood(features, residual, t),
        "evidence, one prior for each channel": ggn.recut(prior_precision="channel").heldout_log_likelihood(
            features, residual, t
        ),
        "one noise for all t": ggn.recut(
            noise_variance=float(residual.square().mean())
        ).heldout_log_likelihood(features, residual, t),
        "prior = 1, noise = 1": ggn.recut(prior_precision=1.0, noise_variance=1.0).heldout_log_likelihood(
            features, residual, t
        ),
    }  # fmt: skip
    return rows, likelihood


def plot(rows: list[dict[str, Any]], device: str) -> Figure:
    """Error against time at the first shape; times in forwards of the head for all."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    first = [r for r in rows if r["head"] == rows[0]["head"]]
    mc = [r for r in first if r["method"].startswith("batched")]
    left.plot([r["seconds"] for r in mc], [r["mc_error"] for r in mc], "o-", color="#1f4e79", label="batched MC")
    left.plot([r["seconds"] for r in mc], [r["theory"] for r in mc], "x:", color="#1f4e79", label="√(2/(n−1))")
    for r in mc:
        left.annotate(f" n = {r['n']}", (r["seconds"], r["mc_error"]), fontsize=8, va="bottom")
    theirs = next(r for r in first if r["method"].startswith("laplace"))
    left.plot([theirs["seconds"]], [theirs["mc_error"]], "s", color="#8a8a8a", label="laplace-torch, MC n = 100")
    closed = {r["method"]: r for r in first}
    diag, full = closed["closed form, diag"], closed["closed form, full"]
    left.plot([diag["seconds"]], [diag["own_error"]], "D", color="#e0a030", label="closed form, diag")
    left.plot([full["seconds"]], [full["error"]], "D", color="#c1440e", label="closed form, full")
    left.set(
        xscale="log", yscale="log", xlabel="seconds for one image", ylabel="relative error of the variance (rms)",
        title=f"{rows[0]['head']}, {device}", ylim=(1e-8, 3),
    )  # fmt: skip
    left.legend(frameon=False, fontsize=8)
    methods = {
        "closed form, diag": "#e0a030", "closed form, full": "#c1440e", "batched MC, n = 100": "#1f4e79",
        "laplace-torch, MC n = 100": "#8a8a8a",
    }  # fmt: skip
    heads = list(dict.fromkeys(r["head"] for r in rows))
    for k, (method, color) in enumerate(methods.items()):
        values = [next(r["forwards"] for r in rows if r["head"] == h and r["method"] == method) for h in heads]
        right.barh([i + 0.2 * k - 0.3 for i in range(len(heads))], values, 0.19, color=color, label=method)
    right.set(
        xscale="log", xlabel="time, in forwards of the head", title="What a variance costs", yticks=range(len(heads))
    )
    right.set_yticklabels(heads)
    right.invert_yaxis()
    right.axvline(1, color="k", lw=0.8)
    right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=4)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(
    device: Annotated[str, typer.Option(help="Where the heads run: cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the features: float32, bfloat16 or float16.")] = "float32",
    unet: Annotated[bool, typer.Option(help="Time one call of a U-Net of SD 1.5's size, too.")] = True,
    glm: Annotated[bool, typer.Option(help="Time laplace-torch's GLM predictive, too: minutes and gigabytes.")] = False,
    shapes: Annotated[int, typer.Option(help="Only the first so many shapes.")] = len(SHAPES),
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Time and errors of closed forms and Monte Carlo, at the true shapes of heads."""
    folder = results_folder(f"mc_vs_analytic/{device}", out)
    where, kind = torch.device(device), getattr(torch, dtype)
    SHAPES[0].layer().to(where)(SHAPES[0].features(1, 0).to(where))  # what a process sets up once is not timed
    rows: list[dict[str, Any]] = []
    cache: dict[int, tuple[Head, Statistics]] = {}
    for shape in SHAPES[:shapes]:
        if shape.in_channels not in cache:
            cache.clear()
            cache[shape.in_channels] = fitted(shape)
        rows += measure_shape(shape, *cache[shape.in_channels], where, kind, glm=glm)
        columns = {
            "head": "", "method": "", "seconds": ".4g", "forwards": ".1f", "megabytes": ".0f", "error": ".2g",
            "mc_error": ".3f", "theory": ".3f", "glm_error": ".2g",
        }  # fmt: skip
        print(table([r for r in rows if r["head"] == shape.name], columns), flush=True)
    links = measure_links(SHAPES[0], *fitted(SHAPES[0], 2), where)
    print(table(links, {"link": "", "approximation": "", "seconds": ".4g", "mean_error": ".2g", "std_error": ".2g"}))
    shipped, likelihood = measure_shipped_model()
    columns = {
        "covariance": "", "structure": "", "left_out": ".3f", "ratio": ".3f", "log_correlation": ".3f",
        "relative_l2": ".3f", "heldout_nats": ".4f",
    }  # fmt: skip
    print(table(shipped, columns))
    for name, value in likelihood.items():
        print(f"held-out log-likelihood, {name}: {value:.4f} nats for each pixel")
    seconds = None
    if unet:
        network = sd15_unet().to(where, kind)
        arguments = (
            torch.zeros(1, 4, 64, 64, device=where, dtype=kind),
            10,
            torch.zeros(1, 77, 768, device=where, dtype=kind),
        )
        with torch.no_grad():
            seconds = cost(lambda: network(*arguments), where, most=3).seconds
        share = next(r["seconds"] for r in rows if r["method"] == "closed form, full") / seconds
        print(f"One call of a U-Net of SD 1.5's size: {seconds:.2f} s; the full closed form is {share:.1%} of it")
    write_figure(folder / "mc_vs_analytic.png", plot(rows, device))
    settings = {"device": device, "dtype": dtype, "rank": RANK, "threads": torch.get_num_threads()}
    settings |= {"command": command("mc_vs_analytic")}
    results = {"heads": rows, "links": links, "shipped": shipped, "heldout": likelihood, "sd15_unet_seconds": seconds}
    record(folder, settings, results, device)
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
