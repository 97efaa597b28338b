"""Writes the tables of docs/evidence.md and docs/meaning.md from the results files: ``python -m experiments.evidence``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.pages import NOT_RUN, markdown, read, written

PAGES = (Path("docs/evidence.md"), Path("docs/meaning.md"))


def number(value: float | None, error: float | None = None, digits: int = 2) -> str:
    """With its standard error, if there is one."""
    if value is None:
        return ""
    text = f"{value:.{digits}f}" if abs(value) >= 10**-digits or value == 0 else f"{value:.1g}"
    return (
        text if error is None else f"{text} ± {error:.{digits}f}" if error >= 10**-digits else f"{text} ± {error:.1g}"
    )


def retraining(key: str) -> Callable[[str], str]:
    """One statistic of the retraining of a problem: methods × places."""

    def table(problem: str) -> str:
        found = read(f"retraining/{problem}")
        if found is None:
            return NOT_RUN
        rows = found["results"]["agreement"]
        places = list(dict.fromkeys(r["place"] for r in rows))
        lines = []
        for method in dict.fromkeys(r["method"] for r in rows):
            own = {r["place"]: r for r in rows if r["method"] == method}
            if any(key in r for r in own.values()):
                cells = [number(own[p].get(key), own[p].get(f"{key}_se")) if p in own else "" for p in places]
                lines.append([method, *cells])
        return markdown(["", *[p.replace("=", " = ") for p in places]], lines)

    return table


def gaps(problem: str) -> str:
    """What the loss gap says of the variance, by t, mean over the base networks."""
    found = read(f"retraining/{problem}")
    if found is None:
        return NOT_RUN
    rows = found["results"]["loss_gap"]
    lines = []
    for t in dict.fromkeys(r["t"] for r in rows):
        own = [r for r in rows if r["t"] == t]
        half = sum(r["gap"] for r in own) / len(own) / 2
        error = sum(r["se"] ** 2 for r in own) ** 0.5 / len(own) / 2
        head = sum(r["head"] * r["share_between"] for r in own) / len(own)
        lines.append([str(t), f"{half:.2g} ± {error:.1g}", f"{own[0]['retrained']:.2g}", f"{head:.2g}"])
    head_line = ["t", "half of the loss gap", "variance of the networks trained anew", "the head's, between images"]
    return markdown(head_line, lines)


def origins(problem: str) -> str:
    """What of the spread is of the data: all of it minus that of networks which saw the same data."""
    found = read(f"retraining/{problem}")
    if found is None:
        return NOT_RUN
    results = found["results"]
    same, head = (
        {r["place"]: r for r in results["agreement"] if r["method"] == m}
        for m in ("other networks, same data", "sandwich")
    )
    lines = []
    for place, row in same.items():
        total, left = results["variance_of_retrained"][place], 1 - row["ratio"]
        own = [r for r in results["loss_gap"] if f"t={r['t']}" == place]
        half = sum(r["gap"] for r in own) / len(own) / 2 / total if own else None
        error = sum(r["se"] ** 2 for r in own) ** 0.5 / len(own) / 2 / total if own else None
        lines.append([
            place.replace("=", " = "), number(row["ratio"], row["ratio_se"]), number(left, row["ratio_se"]),
            number(half, error), number(head[place]["ratio"], head[place]["ratio_se"]),
        ])  # fmt: skip
    head_line = [
        "share of all",
        "other seeds, same data",
        "so left for the data",
        "half of the loss gap",
        "the head's sandwich",
    ]
    return markdown(head_line, lines)


def factors(_: str) -> str:
    """A factor by t found on the sines, and what it makes of the other problem."""
    found = [read(f"retraining/{problem}") for problem in ("sines", "fashion")]
    if None in found:
        return NOT_RUN
    sines, fashion = (
        {r["place"]: r for r in f["results"]["agreement"] if r["method"] == "sandwich"} for f in found if f is not None
    )
    lines = [
        [
            place.replace("=", " = "), number(1 / r["ratio"], None, 1), number(fashion[place]["ratio"]),
            number(fashion[place]["ratio"] / r["ratio"]),
        ]
        for place, r in sines.items()
    ]  # fmt: skip
    return markdown(["", "factor found on sines", "fashion: head / truth", "fashion, times the factor"], lines)


def shares(_: str) -> str:
    """The default's ratio on all problems."""
    lines, places = [], []
    for problem in ("sines", "fashion"):
        found = read(f"retraining/{problem}")
        if found is not None:
            rows = [r for r in found["results"]["agreement"] if r["method"] == "sandwich"]
            places = [r["place"].replace("=", " = ") for r in rows]
            lines.append([problem, *(number(r["ratio"], r["ratio_se"]) for r in rows)])
    return markdown(["", *places], lines) if lines else NOT_RUN


def part(name: str, columns: dict[str, str], digits: int = 3) -> Callable[[str], str]:
    """A part of the usefulness; ``columns`` are keys and headings, and a key with a standard error has both in one cell."""

    def table(model: str) -> str:
        lines = []
        for row in used(name, model):
            cells = []
            for key in columns:
                value = row.get(key)
                cells.append(value if isinstance(value, str) else number(value, row.get(f"{key}_se"), digits))
            lines.append(cells)
        return markdown(list(columns.values()), lines) if lines else NOT_RUN

    return table


def used(name: str, model: str) -> list[dict[str, Any]]:
    """The rows of a part of the usefulness."""
    found = read("usefulness")
    return [] if found is None else [r for r in found["results"].get(name, []) if r["model"] == model]


def outside(model: str) -> str:
    """AUROC: scores × other sets."""
    rows = used("ood", model)
    sets = list(dict.fromkeys(r["set"] for r in rows))
    cell = {(r["score"], r["set"]): number(r["auroc"], r["auroc_se"]) for r in rows}
    lines = [[score, *(cell[score, s] for s in sets)] for score in dict.fromkeys(r["score"] for r in rows)]
    return markdown(["score", *sets], lines) if rows else NOT_RUN


def filtered(model: str) -> str:
    """Score × measure: difference from chance."""
    rows = used("filtering", model)
    measures = list(dict.fromkeys(r["measure"] for r in rows))
    cell = {(r["score"], r["measure"]): number(r["difference"], r["difference_se"], 3) for r in rows}
    chance = {r["measure"]: r["chance"] for r in rows}
    lines = [["*chance itself*", *(number(chance[m], None, 3) for m in measures)]]
    lines += [
        [score, *(cell.get((score, m), "") for m in measures)] for score in dict.fromkeys(r["score"] for r in rows)
    ]
    return markdown(["score", *measures], lines) if rows else NOT_RUN


def total(model: str) -> str:
    """The law of total variance."""
    found = read(f"uncertainty_maps/{model}")
    if found is None:
        return NOT_RUN
    rows = found["results"]["total_variance"]
    return markdown(
        ["part", "variance", "share"], [[r["part"], f"{r['variance']:.3e}", f"{r['share']:.6f}"] for r in rows]
    )


TABLES: dict[str, Callable[[str], str]] = {
    "ratio": retraining("ratio"),
    "correlation": retraining("log_correlation"),
    "ranks": retraining("rank_of_sums"),
    "gap": gaps,
    "factor": factors,
    "origin": origins,
    "share": shares,
    "ood": outside,
    "restoration": part(
        "restoration",
        {
            "task": "task", "map": "map", "ause": "AUSE", "aurg": "AURG", "spearman": "Spearman, pixels of an image",
            "images_spearman": "Spearman, images", "ratio_rms": "rms map / rms error",
        },
    ),
    "filtering": filtered,
    "prompts": part(
        "prompts",
        {"score": "score", "kind": "prompts", "mean": "mean over prompts", "auroc": "AUROC against the first"}, 4,
    ),
    "total": total,
}  # fmt: skip


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
