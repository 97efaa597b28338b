"""Writes the tables of README, docs/propagation.md and docs/design.md from the results files.

python -m experiments.readme
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from bayesdiff.propagation.settings import Tangents
from experiments.pages import NOT_RUN, markdown, read, written
from experiments.posterior_check.__main__ import folder_name

PAGES = (Path("README.md"), Path("docs/propagation.md"), Path("docs/design.md"))
MODELS = ("fashion-ddpm", "fashion-4step", "earth-sd", "earth-sd3")
#: Posterior checks: what they are called, and their folders.
CHECKS = {
    "`fashion-ddpm`": folder_name("fashion-ddpm"), "the same, L1": folder_name("fashion-ddpm", "l1", draws=8),
    "`fashion-4step`": folder_name("fashion-4step"),
    "the same, its head at the minimum": folder_name("fashion-4step", settle=True), "`earth-sd`": folder_name("earth-sd"),
    "`earth-sd3`": folder_name("earth-sd3"), "the same, m = 24": folder_name("earth-sd3", draws=24),
}  # fmt: skip
#: What is shown of a posterior check, and how it is called.
POSTERIORS = {
    "M is told": "sandwich, M told", "lowrank": "the same, `lowrank`", "kron": "the same, Kronecker factors",
    "diag": "the same, diagonal", "M = m assumed": "sandwich, M = m assumed", "ggn": "GGN",
}  # fmt: skip


def is_default(row: dict[str, Any]) -> bool:
    return row["detail"].endswith("default")


def accuracy(_: str) -> str:
    """Correlation and ratio of means: samplers × the default, budgets and ensembles."""
    found = read("propagation")
    if found is None:
        return NOT_RUN
    lines, head = [], ["sampler"]
    for sampling, group in groupby(found["results"], lambda r: r["sampling"]):
        rows = [r for r in group if r["method"] == "tangents"] + [
            r for r in found["results"] if r["sampling"] == sampling and r["detail"] in ("M = 4", "M = 32")
        ]
        rows.sort(key=lambda r: not is_default(r))
        head = ["sampler", *(f"**{r['detail']}**" if is_default(r) else f"{r['method']}, {r['detail']}" for r in rows)]
        cells = (f"{r['correlation']:.3f}, {r['ratio']:.2f}, {r['calls_ratio']:.1f}×" for r in rows)
        lines.append([sampling, *cells])
    return markdown(head, lines)


def samplers(_: str) -> str:
    """Every row that was measured."""
    found = read("propagation")
    if found is None:
        return NOT_RUN
    lines = []
    for row in found["results"]:
        name = f"{row['method']}, {row['detail']}" + (", against redrawn" if row.get("against") == "redrawn" else "")
        name = f"**{name}**" if is_default(row) else name
        if "refused" in row:
            lines.append([row["sampling"], name, "refused", *[""] * 5])
            continue
        lines.append([
            row["sampling"], name, f"{row['calls_ratio']:.1f}×", f"{row['correlation']:.3f} ± {row['correlation_sd']:.3f}",
            f"{row['ratio']:.2f} ± {row['ratio_sd']:.2f}", f"{row['relative_l2']:.2f}", f"{row['rank_correlation']:.2f}",
            f"{row['negative']:.0%}",
        ])  # fmt: skip
    head = "sampler,method,calls,correlation,ratio of means,relative L2,rank corr. of images,negative"
    return markdown(head.split(","), lines)


def span(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


def refits(_: str) -> str:
    """Of one step: the sandwich that is told M, and the plain GGN, against refits; the worst and best timestep."""
    lines = []
    for label, folder in CHECKS.items():
        found = read(folder)
        if found is None:
            continue
        rows = {n: [r for r in found["results"]["agreement"] if r["posterior"] == n] for n in ("M is told", "ggn")}
        lowest = min(rows["M is told"], key=lambda r: r["log_correlation"])
        ceilings = {r["t"]: r["log_correlation"] for r in found["results"].get("halves", ())}
        told = ceilings.get(lowest["t"])
        lines.append([
            label, str(found["settings"]["refits"]), span([r["ratio"] for r in rows["M is told"]], 2),
            span([r["log_correlation"] for r in rows["M is told"]], 3),
            f"{lowest['t']}" + (f" (halves of the refits: {told:.3f})" if told is not None else ""),
            span([r["ratio"] for r in rows["ggn"]], 2),
        ])  # fmt: skip
    head = [
        "model",
        "refits",
        "variance / that of the refits",
        "log-correlation",
        "lowest at t =",
        "plain GGN / refits",
    ]
    return markdown(head, lines) if lines else NOT_RUN


def judged(folder: str) -> str:
    """Of one run of ``posterior_check``: posteriors × timesteps, with what was run."""
    found = read(folder)
    if found is None:
        return NOT_RUN
    settings, results = found["settings"], found["results"]
    rows = {(r["posterior"], r["t"]): r for r in results["agreement"]}
    times = list(dict.fromkeys(r["t"] for r in results["agreement"]))
    lines = [
        [label, *(f"{rows[n, t]['ratio']:.2f}; {rows[n, t]['log_correlation']:.3f}" for t in times)]
        for n, label in POSTERIORS.items()
        if (n, times[0]) in rows
    ]
    halves = {r["t"]: f"{r['log_correlation']:.3f}" for r in results.get("halves", ())}
    lines.append(["half of the refits against the other", *(halves.get(t, "") for t in times)])
    bins = [next(s for s in results["shares"] if s["t_low"] <= t < s["t_high"]) for t in times]
    lines.append(["share between images (A/N)", *(f"{b['share_between']:.2f}" for b in bins)])
    said = (
        f"{settings['images']} images, m = {settings['draws_of_fit']:.3g}, M = {settings['training_draws']}, "
        f"{settings['refits']} refits, {settings['test_images']} held-out images"
        + (", the head put at the minimum of this loss first" if settings["settled"] else "")
    )
    head = ["variance / that of the refits; log-correlation, t =", *map(str, times)]
    return f"{said} (`{settings['command']}`):\n\n" + markdown(head, lines)


def maps(_: str) -> str:
    """Of the decoded and few-step models: default tangents, and half of the reference against the other."""
    lines = []
    for model in MODELS:
        found = read(f"zoo_maps/{model}")
        if found is None:
            continue
        halves, *rows = found["results"]
        for r in rows:
            name = r["method"].removeprefix("tangents, ")
            if name != f"K = {Tangents().draws}, default":  # of results that are older than the default
                name = name.removesuffix(", default")
            lines.append([
                f"`{model}`", f"**{name}**" if name.endswith("default") else name,
                f"{r['correlation']:.3f} ± {r['correlation_sd']:.3f}", f"{r['ratio']:.2f} ± {r['ratio_sd']:.2f}",
                f"{r['worst']:.2f}", f"{r['calls_ratio']:.1f}×", str(r["decoder_calls"]), f"{halves['correlation']:.3f}",
            ])  # fmt: skip
    head = "model,tangents,correlation,ratio,worst of eight,network calls,decoder calls,halves of the reference"
    return markdown(head.split(","), lines) if lines else NOT_RUN


def retrained(_: str) -> str:
    """At the sample: the default's share of the variance of networks trained anew, and how well its map agrees with theirs."""
    lines = []
    for problem, label in (("sines", "sines: MLP"), ("fashion", "Fashion-MNIST, trained shortly: U-Net")):
        found = read(f"retraining/{problem}")
        if found is None:
            continue
        own = {r["method"]: r for r in found["results"]["agreement"] if r["place"] == "sample"}
        row, halves = own["sandwich"], own["half of the networks against the others"]
        digits = 2 if row["ratio"] > 0.01 else 4
        lines.append([
            f"{label} of {found['settings']['weights']:,} weights", f"{row['ratio']:.{digits}f} ± {row['ratio_se']:.{digits}f}",
            f"{row['log_correlation']:.2f} ± {row['log_correlation_se']:.2f}", f"{halves['log_correlation']:.2f}",
        ])  # fmt: skip
    head = [
        "",
        "variance: head / networks trained anew",
        "log-correlation of the maps",
        "half of the networks against the other half",
    ]
    return markdown(head, lines) if lines else NOT_RUN


def cost(_: str) -> str:
    """Time beyond the network calls, and memory beyond the image alone."""
    lines = []
    found = read("cost")
    for r in found["results"] if found else ():
        s = found["settings"]  # type: ignore[index]
        lines.append([
            f"{s['samples']} images of 28² (`{s['model']}`)", f"DDIM, {s['steps']}", str(r["draws"]), f"{r['calls_ratio']:.1f}×",
            f"{r['overhead']:.2f}", "",
        ])  # fmt: skip
    found = read("memory")
    for r in found["results"] if found else ():
        lines.append([
            f"one of {r['size']}² × 3 (random U-Net)", f"{r['sampler']}, {r['steps']}", str(r["draws"]),
            f"{r['calls_ratio']:.1f}×", f"{r['overhead']:.2f}", f"{r['growth_mb']:.0f} MB",
        ])  # fmt: skip
    head = "images,sampler and steps,K,network calls,time / that of its calls,memory beyond the image alone"
    return markdown(head.split(","), lines) if lines else NOT_RUN


TABLES = {
    "accuracy": accuracy,
    "samplers": samplers,
    "refits": refits,
    "judged": judged,
    "maps": maps,
    "cost": cost,
    "retrained": retrained,
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
