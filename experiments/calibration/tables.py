"""Writes the tables of docs/calibration.md from the results files.

python -m experiments.calibration.tables
"""

from __future__ import annotations

from pathlib import Path

from bayesdiff.calibration.report import DEFAULT
from experiments.pages import NOT_RUN, markdown, read, written

PAGE = Path("docs/calibration.md")
MODELS = ("fashion-ddpm", "fashion-4step", "earth-sd", "earth-sd3")


def methods(model: str) -> str:
    """Worst deviations of coverage and mean scores of all methods, of one model."""
    found = read(f"calibration/{model}")
    if found is None:
        return NOT_RUN
    results, settings = found["results"], found["settings"]
    levels = [f"{100 * p:.0f}" for p in results["levels"]]
    rows = [
        [
            f"**{r['method']}**" if r["method"] == DEFAULT else r["method"],
            *(f"{r[f'worst_{p}']:+.1f} ± {r[f'error_{p}']:.1f}" for p in levels),
            "yes" if r["within"] else "no", f"{r['nll']:.4g}", f"{r['crps']:.3g}", f"{r['ence']:.2g}",
        ]
        for r in results["bars"]
    ]  # fmt: skip
    head = ["method", *(f"{p} %" for p in levels), "within the bar", "NLL", "CRPS", "ENCE"]
    bins = len({r["t_low"] for r in results["rows"]})
    said = (
        f"`{model}`, {bins} {'timesteps' if settings['timesteps'] else 'bins of t'}; noise models fitted to "
        f"{results['fitted_on']} held-out images, all judged on {results['judged_on']} others.\n\n"
    )
    return said + markdown(head, rows)


def shipped(_: str) -> str:
    """The recommended noise model by bins of t, for all models: coverage minus nominal at each level."""
    rows = []
    for model in MODELS:
        results = (read(f"calibration/{model}") or {"results": {"rows": (), "levels": ()}})["results"]
        for r in results["rows"]:
            if r["method"] == DEFAULT:
                off = [100 * (c - p) for c, p in zip(r["coverage"], results["levels"], strict=True)]
                where = f"{r['t_low']:.0f}" if r["t_low"] == r["t_high"] else f"{r['t_low']:.0f}–{r['t_high']:.0f}"
                rows.append([
                    model, where, *(f"{o:+.1f}" for o in off), f"{r['nll']:.3f}", f"{r['ence']:.2f}",
                    f"{r['squared_residual']:.2g}", f"{r['weights_share']:.1g}",
                ])  # fmt: skip
    head = ["model", "t", "50 %", "80 %", "90 %", "95 %", "NLL", "ENCE", "squared residual", "share of the weights"]
    return markdown(head, rows) if rows else NOT_RUN


def spread(model: str) -> str:
    """The Tweedie map against samples, of one model."""
    found = read(f"tweedie_check/{model}")
    if found is None:
        return NOT_RUN
    settings = found["settings"]
    rows = [
        [
            f"{r['t']:.0f}", r["way"], f"{r['log_correlation']:.3f} ± {r.get('log_correlation_error', 0):.3f}",
            f"{r['ceiling']:.3f}", f"{r['ratio']:.2f} ± {r.get('ratio_error', 0):.2f}", f"{r['negative']:.1%}", f"{r['std']:.3f}",
        ]
        for r in found["results"]["summary"]
    ]  # fmt: skip
    said = f"`{model}`, {settings['trajectories']} trajectories, {settings['samples']} samples of each x_t.\n\n"
    return said + markdown(
        ["t", "from", "log-correlation of std", "ceiling", "variance / samples'", "negative", "std"], rows
    )


TABLES = {"methods": methods, "shipped": shipped, "spread": spread}


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
