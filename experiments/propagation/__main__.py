"""Every way to carry a variance through a sampler, against many whole trajectories with other weights.

    python -m experiments.propagation

For several schedulers, numbers of steps and guidance: tangents with several budgets of network calls, small ensembles, the
published recursion of BayesDiff with and without its "skip", and the same with its covariance centred. Judged by
references of 512 trajectories whose draws are independent of all of these: correlation, ratio of means and relative L2
of the per-pixel standard deviation, rank correlation of the images' mean, share of negative variances, against the network
calls in all, in those of the plain pipeline. Errors are over sets of draws. References are kept (``references/``),
and with ``--only`` the results of the other ways to sample, too, if they were made with the same settings.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

import bayesdiff
from bayesdiff.checks import NegativeVarianceWarning, UnsupportedSchedulerError
from bayesdiff.io import write_figure
from bayesdiff.propagation.settings import Settings
from experiments.common import agreement, command, record, results_folder, seeded, table
from experiments.propagation.references import SAMPLINGS, Sampling, Setting, reference

#: Network calls of tangents, in those of the plain pipeline.
BUDGETS = (2.2, 3.3, 5.6)
MEMBERS = (4, 8, 16, 32)
#: What is above is drawn at the upper edge, with its number.
OFF_SCALE = 4.0
DEFAULT = "tangents, default"
STYLES = {
    "tangents": ("#c1440e", "o-"), DEFAULT: ("#c1440e", "D"), "ensemble": ("#1f4e79", "s-"), "bayesdiff": ("#6b6b6b", "x"),
    "bayesdiff-centered": ("#b8860b", "^"), "redrawn at every step": ("#3c8d5a", "*"),
}  # fmt: skip


def measures(maps: list[Tensor], negative: list[float], against: Tensor) -> dict[str, float]:
    """Mean and standard deviation over sets of draws of how well maps agree with a reference."""
    runs = []
    for m in maps:
        found = agreement(m, against)
        sums = [v.flatten(1).mean(1).tolist() for v in (m, against)]
        found["rank_correlation"] = float(spearmanr(*sums).statistic) if len(m) > 2 else 1.0
        runs.append(found)
    out = {"negative": sum(negative) / len(negative)}
    for key in ("correlation", "ratio", "relative_l2", "rank_correlation"):
        values = torch.tensor([r[key] for r in runs], dtype=torch.float64)
        out[key] = float(values.mean())
        out[f"{key}_sd"] = float(values.std()) if len(values) > 1 else 0.0
    return out


def subsets(output: bayesdiff.UncertaintyOutput, size: int) -> list[Tensor]:
    """Standard deviations of disjoint subsets of an ensemble's members, each about its own mean."""
    assert output.factors is not None
    members = output.factors.double() * (len(output.factors) - 1) ** 0.5
    return [m.std(0).float() for m in members.split(size) if len(m) == size]


def judge(
    setting: Setting, sampling: Sampling, against: Tensor, repeats: int, draws: int, only_tangents: bool = False
) -> list[dict[str, Any]]:
    """All methods for one way to sample, or tangents alone."""
    pipe, posterior = setting.pipe(sampling)
    rows: list[dict[str, Any]] = []

    def add(method: str, detail: str, calls: float, maps: list[Tensor], negative: list[float], seconds: float) -> None:
        rows.append(
            {
                "sampling": sampling.name, "method": method, "detail": detail, "calls_ratio": calls,
                **measures(maps, negative, against), "seconds": seconds,
            }
        )  # fmt: skip

    def run(method: str, detail: str, propagation: Settings) -> None:
        clock = time.perf_counter()
        outputs = [
            setting.run(
                pipe, posterior, sampling, replace(propagation, generator=seeded(setting.seed + 1000 * (i + 1)))
            )
            for i in range(repeats)
        ]
        add(
            method, detail, outputs[0].calls / outputs[0].plain_calls, [o.std for o in outputs],
            [float((o.variance < 0).double().mean()) for o in outputs], (time.perf_counter() - clock) / repeats,
        )  # fmt: skip

    for budget in BUDGETS:
        run("tangents", f"K = {draws}, {budget}×", bayesdiff.Tangents(draws=draws, extra_calls=budget - 1))
    run("tangents", f"K = {bayesdiff.Tangents().draws}, default", bayesdiff.Tangents())
    if only_tangents:
        return rows
    clock = time.perf_counter()
    many = MEMBERS[-1] * repeats
    members = bayesdiff.Ensemble(members=many, factors=True, generator=seeded(setting.seed + 77))
    ensemble = setting.run(pipe, posterior, sampling, members)
    seconds = time.perf_counter() - clock
    for m in MEMBERS:
        maps = subsets(ensemble, m)
        add("ensemble", f"M = {m}", 1 + m, maps, [0.0] * len(maps), seconds * (1 + m) / (1 + many))
    for method, centered in (("bayesdiff", False), ("bayesdiff-centered", True)):
        for interval in (1, 5):
            try:
                settings = bayesdiff.BayesDiff(skip_interval=interval, centered=centered)
                run(method, f"S = 10, every {interval}", settings)
            except UnsupportedSchedulerError as error:
                rows.append(
                    {"sampling": sampling.name, "method": method, "detail": f"every {interval}", "refused": str(error)}
                )
    return rows


def kept(folder: Path, settings: dict[str, Any], chosen: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the other ways to sample, and the command that made each, if their settings were the same."""
    path = folder / "results.json"
    before = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    if {k: before["settings"].get(k) for k in settings} != settings:
        return [], {}
    commands = {k: v for k, v in before["settings"]["commands"].items() if k not in chosen}
    return [r for r in before["results"] if r["sampling"] in commands], commands


def series(row: dict[str, Any]) -> str:
    """Which line of the figure a row belongs to."""
    return DEFAULT if row["method"] == "tangents" and row["detail"].endswith("default") else row["method"]


def plot(rows: list[dict[str, Any]], names: list[str], trajectories: int) -> Figure:
    """Relative L2 against network calls, one panel for each way to sample; what is off the scale has its number."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * lines + 0.9), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axis, name in zip(panels, names, strict=False):
        for method, (color, style) in STYLES.items():
            chosen = [r for r in rows if r["sampling"] == name and series(r) == method and "refused" not in r]
            chosen = [r for r in chosen if r.get("against", "shared") == "shared"]
            if method == "redrawn at every step":
                for r in chosen:  # as many calls as the reference
                    axis.axhline(r["relative_l2"], color=color, ls=":", lw=1.4, label=method)
                continue
            inside = sorted((r for r in chosen if r["relative_l2"] < OFF_SCALE), key=lambda r: r["calls_ratio"])
            if chosen:
                axis.errorbar(
                    [r["calls_ratio"] for r in inside], [r["relative_l2"] for r in inside],
                    [r["relative_l2_sd"] for r in inside], fmt=style, color=color, ms=5, lw=1.2, label=method,
                )  # fmt: skip
            for r in chosen:
                if r not in inside:
                    place, side = (r["calls_ratio"], OFF_SCALE * 0.82), 1 if method == "bayesdiff" else -1
                    axis.plot(*place, style, color=color, ms=5)
                    axis.annotate(
                        f"{r['relative_l2']:,.0f}", place, (5 * side, 0), textcoords="offset points", fontsize=7,
                        color=color, va="center", ha="left" if side > 0 else "right",
                    )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlim=(0.8, 48), ylim=(0.06, OFF_SCALE))
        axis.set_title(name, fontsize=9)
        axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axis.set_xticks([], minor=True)
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        axis.set_yticks([], minor=True)
        axis.tick_params(labelbottom=True)
        axis.grid(color="#e6e6e6", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in panels[len(names) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis in panels:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [m for m in STYLES if m in handles]
    figure.legend(
        handles=[handles[m] for m in labels], labels=labels, loc="outside upper center", ncols=len(labels),
        frameon=False, fontsize=9,
    )  # fmt: skip
    figure.supxlabel("network calls, in those of the plain pipeline", fontsize=9)
    figure.supylabel(f"relative L2 error of per-pixel std (against {trajectories} trajectories)", fontsize=9)
    return figure


def main(
    trajectories: Annotated[int, typer.Option(help="Trajectories of each reference.")] = 512,
    samples: Annotated[int, typer.Option(help="Images, over the classes in turn.")] = 6,
    repeats: Annotated[int, typer.Option(help="Sets of weight draws for each setting.")] = 3,
    draws: Annotated[int, typer.Option(help="K of the tangents.")] = 128,
    only: Annotated[list[str] | None, typer.Option(help="Names of the ways to sample; by default all.")] = None,
    only_tangents: Annotated[
        bool, typer.Option("--only-tangents", help="Keep the rows of all other methods, which change less often.")
    ] = False,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare all propagators with large ensembles."""
    chosen = [s for s in SAMPLINGS if not only or s.name in only]
    if not chosen:
        raise typer.BadParameter(f"expected --only among {', '.join(s.name for s in SAMPLINGS)}, got {only}")
    folder = results_folder("propagation", out)
    setting = Setting(samples, trajectories, seed)
    warnings.simplefilter("ignore", NegativeVarianceWarning)  # their share is a column of the table
    settings = {
        "trajectories": trajectories, "samples": samples, "repeats": repeats, "draws": draws, "seed": seed,
        "model": "fashion-ddpm",
    }  # fmt: skip
    started = time.perf_counter()
    rows, commands = kept(folder, settings, [] if only_tangents else [s.name for s in chosen])
    others = {s.name: [r for r in rows if r["sampling"] == s.name and r["method"] != "tangents"] for s in chosen}
    rows = [r for r in rows if r["sampling"] not in others]
    commands |= {s.name: command("propagation") for s in chosen}
    for sampling in tqdm(chosen, desc="ways to sample"):
        shared = reference(folder, setting, sampling)
        found = judge(setting, sampling, shared, repeats, draws, only_tangents)
        if only_tangents:
            found += others[sampling.name]
        elif sampling.redrawn:
            redrawn = reference(folder, setting, sampling, redraw=True)
            found.append(
                {
                    "sampling": sampling.name, "method": "redrawn at every step", "detail": f"M = {trajectories}",
                    "calls_ratio": 1 + trajectories, **measures([redrawn], [0.0], shared),
                }
            )  # fmt: skip
            pipe, posterior = setting.pipe(sampling)
            for method, centered in (("bayesdiff", False), ("bayesdiff-centered", True)):
                settings_of = bayesdiff.BayesDiff(centered=centered, generator=seeded(setting.seed + 1000))
                output = setting.run(pipe, posterior, sampling, settings_of)
                found.append(
                    {
                        "sampling": sampling.name, "method": method, "detail": "S = 10, every 1", "against": "redrawn",
                        "calls_ratio": output.calls / output.plain_calls,
                        **measures([output.std], [float((output.variance < 0).double().mean())], redrawn),
                    }
                )  # fmt: skip
        rows += [{"against": "shared", **r} for r in found]
    columns = {
        "sampling": "", "method": "", "detail": "", "against": "", "calls_ratio": ".2f", "correlation": ".3f",
        "correlation_sd": ".3f", "ratio": ".2f", "ratio_sd": ".2f", "relative_l2": ".2f", "rank_correlation": ".2f",
        "negative": ".0%", "seconds": ".1f",
    }  # fmt: skip
    everything = [s for s in SAMPLINGS if s.name in commands]
    rows.sort(key=lambda r: [s.name for s in everything].index(r["sampling"]))
    print(table(rows, columns))
    write_figure(folder / "propagation.png", plot(rows, [s.name for s in everything], trajectories))
    record(
        folder,
        {
            **settings, "samplings": [vars(s) for s in everything], "commands": commands,
            "seconds_without_kept_references": round(time.perf_counter() - started, 1),
        },
        rows,
    )  # fmt: skip
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
