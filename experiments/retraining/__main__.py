"""Networks trained anew against posteriors of one of them: ``python -m experiments.retraining --problem sines``.

Networks are trained on data of their own and kept in ``--work``; their outputs at the same (x_t, t), and their samples from the
same initial noise, spread by everything that a training draws. That spread is what a posterior of one network should have.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from bayesdiff.io import write_figure
from experiments.common import record, results_folder, table
from experiments.retraining.analysis import rows_of
from experiments.retraining.judge import TIMESTEPS, Points, kept_or_judged, retrained
from experiments.retraining.methods import Sizes
from experiments.retraining.problems import FASHION, Fashion, Problem, Sines
from experiments.retraining.train import train

SIZES = {
    "sines": Sizes(
        images=2000, draws_per_image=16, draws=256, refits=40, subset=500, subsets=4, pairs=4000, whole=True
    ),
    "fashion": Sizes(images=1000, draws=32, refits=24, subset=500, subsets=2, pairs=1000),
}
#: Held-out images, initial noises, DDIM steps; base networks; images and noises of the loss gap; draws of an image in refits.
POINTS = {"sines": (200, 200, 50), "fashion": (48, 16, 25)}
BASES: dict[str, int] = {"sines": 3, "fashion": 2}
TWINS: dict[str, int] = {"sines": 24, "fashion": 6}
GAP, DRAWS = {"sines": (2000, 32), "fashion": (4000, 1)}, {"sines": 768, "fashion": 8}


def main(
    problem: Annotated[str, typer.Option(help="sines or fashion.")] = "sines",
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = FASHION,
    work: Annotated[Path | None, typer.Option(help="Trained networks; those there are not trained again.")] = None,
    rounds: Annotated[int | None, typer.Option("--train", help="Rounds of training; judge if none is left.")] = None,
    twins: Annotated[int | None, typer.Option(help="Networks of one data set; 24 of sines, 6 of fashion.")] = None,
    base: Annotated[int | None, typer.Option(help="Judge this network only, keep what it found, and stop.")] = None,
    bases: Annotated[int | None, typer.Option(help="Networks whose posteriors are judged.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Train the networks that are missing, then judge."""
    if problem not in SIZES:
        raise typer.BadParameter(f"expected sines or fashion, got {problem!r}", param_hint="--problem")
    chosen: Problem = Sines() if problem == "sines" else Fashion(folder=data)
    work = work or Path("build/retraining") / problem
    left = train(chosen, work, rounds)
    if left:
        print(f"{left} networks are still to be trained")
        return
    number = TWINS[problem] if twins is None else twins
    if number:
        train(chosen.of_one_data_set(number), work / "same_data", rounds)
    run(chosen, work, out, SIZES[problem], POINTS[problem], bases or BASES[problem], GAP[problem], DRAWS[problem], base)


def run(
    problem: Problem, work: Path, out: Path | None, sizes: Sizes, points: tuple[int, int, int], bases: int,
    gap: tuple[int, int], draws: int, only: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Judge, print, write; the rows."""
    started = time.perf_counter()
    places = Points(problem, *points)
    found = []
    for number in range(bases) if only is None else [only]:
        # All weights of one network only: it takes minutes.
        found.append(
            kept_or_judged(
                number,
                places,
                work,
                replace(sizes, whole=sizes.whole and number == 0),
                range(problem.recipe.networks),
                gap,
                draws,
            )
        )
    if only is not None:
        return []
    networks = retrained(places, work)
    seen = sorted((work / "same_data").glob("network-*.safetensors"))
    if seen:
        of_seeds = retrained(replace(places, problem=problem.of_one_data_set(len(seen))), work / "same_data")
        for maps, _ in found:
            maps |= {f"other networks, same data|{place}": v.var(0) for place, v in of_seeds.items()}
    rows = rows_of(networks, [m for m, _ in found])
    gaps = [{"network": i, **row} for i, (_, measured) in enumerate(found) for row in measured["gap"]]
    truth = {place: float(v.var(0).mean()) for place, v in networks.items()}
    for row in gaps:
        row["retrained"] = truth[f"t={row['t']}"]
    columns = {
        "place": "", "method": "", "ratio": ".3g", "ratio_se": ".2g", "log_correlation": ".3f", "log_correlation_se": ".3f",
        "correlation": ".3f", "rank_of_sums": ".3f",
    }  # fmt: skip
    print(table(rows, columns))
    columns = {
        "network": "d", "t": "d", "own": ".5f", "other": ".5f", "gap": ".2e", "se": ".1e", "head": ".2e", "share_between": ".2f",
        "factor": ".2f", "retrained": ".2e",
    }  # fmt: skip
    print(table(gaps, columns))
    folder = results_folder(f"retraining/{problem.name}", out)
    write_figure(folder / "retraining.png", plot(rows))
    settings = {
        "problem": problem.name, "recipe": asdict(problem.recipe), "training_draws": problem.recipe.training_draws,
        "sizes": asdict(sizes), "heldout_images": points[0], "noises": points[1], "ddim_steps": points[2],
        "bases": len(found), "networks_of_one_data_set": len(seen),
        "gap_images_and_noises": gap, "draws_in_refits": draws,
        "weights": sum(p.numel() for p in problem.build().parameters()),
        "seconds_of_the_judge": round(time.perf_counter() - started, 1),
        "command": f"python -m experiments.retraining --problem {problem.name} --bases {len(found)}",
    }  # fmt: skip
    record(folder, settings, {"agreement": rows, "loss_gap": gaps, "variance_of_retrained": truth})
    print(f"Written to {folder}")
    return rows


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Ratio and log-correlation by t, and at the sample."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = [*[f"t={t}" for t in TIMESTEPS], "sample"]
    for i, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
        own = {r["place"]: r for r in rows if r["method"] == method}
        style = {"color": f"C{i % 10}", "marker": "os^v"[i // 10 % 4], "ms": 4, "capsize": 2, "lw": 1}
        for axis, key in ((left, "ratio"), (right, "log_correlation")):
            where = [k for k, p in enumerate(places) if key in own.get(p, {})]
            y = [own[places[k]][key] for k in where]
            e = [own[places[k]].get(f"{key}_se", own[places[k]].get(f"{key}_sd", 0)) for k in where]
            axis.errorbar([k + 0.03 * i for k in where], y, e, label=method, **style)
    left.set(yscale="log", ylabel="mean variance / that of retrained networks")
    left.axhline(1, color="grey", lw=0.8)
    right.set(ylabel="correlation of log variances")
    for axis in (left, right):
        axis.set_xticks(range(len(places)), places)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8)
    return figure


if __name__ == "__main__":
    typer.run(main)
