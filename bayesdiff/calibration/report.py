"""What an evaluation found: a table, a JSON file, a figure."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bayesdiff.calibration.noise_models import Noise
from bayesdiff.checks import check_output_folder
from bayesdiff.io import environment, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The noise model that is recommended.
DEFAULT = "log-linear, quantiles"
#: Methods of the figure, with their colours.
SHOWN = {
    "weights only": "#8a8a8a", "BayesDiff, σ = 1": "#c9a227", "constant": "#2b6777", "tweedie": "#6a4c93",
    "log-linear": "#52ab98", DEFAULT: "#c1440e",
}  # fmt: skip


def aligned(lines: list[list[str]], left: int) -> str:
    """Lines of a table in columns of one width, the first ``left`` of them aligned on the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


@dataclass(frozen=True, repr=False)
class Report:
    """Scores of methods by bins of t; ``print`` it for a table.

    Args:
        rows: For each bin and method: ``t_low``, ``t_high``, ``method``, ``coverage`` and ``width`` of each level,
            ``coverage_error`` (standard error over images), ``nll`` (nats a number), ``crps``, ``ence``, ``spread`` (root of the
            mean predicted variance), ``squared_residual``, ``weights_variance`` and ``weights_share``, the part of the weights'
            variance in the squared residual; in units of the network's target (ε, v, x_0 or a flow's velocity).
        levels: Nominal probabilities.
        noise: For each bin, the fitted noise models by method.
        fitted_on: Images that noise models were fitted to.
        judged_on: Other images, that all methods were judged on.
        notes: What could not be had.
    """

    rows: list[dict[str, Any]]
    levels: tuple[float, ...]
    noise: list[dict[str, Noise]] = field(repr=False)
    fitted_on: int
    judged_on: int
    notes: list[str]

    @property
    def meaning(self) -> str:
        """Which number tests which variance."""
        shares = [r["weights_share"] for r in self.rows]
        return (
            "Held-out residuals test the sum of (1) what the weights leave open and (2) what the data leave open at x_t. Here "
            f"(1) is {min(shares):.1g} to {max(shares):.1g} of it: these do not test (1); refits and retrainings do. Noise "
            f"models were fitted to {self.fitted_on} of the held-out images; all was judged on the other {self.judged_on}."
        )

    def methods(self) -> list[str]:
        """In their order."""
        return list(dict.fromkeys(r["method"] for r in self.rows))

    def of(self, method: str) -> list[dict[str, Any]]:
        """One method's rows, by rising t."""
        return [r for r in self.rows if r["method"] == method]

    def summary(self) -> list[dict[str, Any]]:
        """For each method: the worst deviation of its coverage over bins, at each level, and means of the other scores."""
        out = []
        for method in self.methods():
            rows = self.of(method)
            worst = [max((r["coverage"][i] - p for r in rows), key=abs) for i, p in enumerate(self.levels)]
            means = {k: sum(r[k] for r in rows) / len(rows) for k in ("nll", "crps", "ence")}
            out.append({"method": method, "worst": worst, **means})
        return out

    def table(self) -> str:
        """The worst deviation of coverage, in points, and mean scores, for each method."""
        head = ["method", *(f"{p:.0%}" for p in self.levels), "NLL", "CRPS", "ENCE"]
        lines = [head] + [
            [s["method"], *(f"{100 * w:+.1f}" for w in s["worst"]), *(f"{s[k]:.4g}" for k in ("nll", "crps", "ence"))]
            for s in self.summary()
        ]
        return aligned(lines, 1)

    def __str__(self) -> str:
        """The table and what it means."""
        title = "coverage − nominal in the worst bin of t (points); means over bins of the other scores"
        return "\n".join([title, self.table(), self.meaning, *self.notes])

    def __repr__(self) -> str:
        """One line."""
        return f"Report({len(self.methods())} methods, {len(self.of(self.methods()[0]))} bins, {self.judged_on} images)"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "levels": list(self.levels), "fitted_on": self.fitted_on, "judged_on": self.judged_on, "meaning": self.meaning,
            "notes": self.notes, "summary": self.summary(), "rows": self.rows,
        }  # fmt: skip

    def figure(self) -> Figure:
        """Coverage against t at each level, and the root mean square of what is predicted beside that of what came."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.1 * (len(self.levels) + 1), 3.4), layout="constrained")
        *axes, last = figure.subplots(1, len(self.levels) + 1)
        present = {m: c for m, c in SHOWN.items() if m in self.methods()}
        for i, (axis, level) in enumerate(zip(axes, self.levels, strict=True)):
            for method, color in present.items():
                rows = self.of(method)
                t = [(r["t_low"] + r["t_high"]) / 2 for r in rows]
                error = [2 * r["coverage_error"][i] for r in rows]
                axis.errorbar(t, [r["coverage"][i] for r in rows], error, color=color, lw=1.2, capsize=2, label=method)
            bar = 0.04 if level <= 0.5 else 0.02
            axis.axhspan(level - bar, level + bar, color="#e8e2d5", zorder=0)
            axis.set(title=f"{level:.0%} intervals", xlabel="timestep t", ylim=(0, 1.02))
        axes[0].set_ylabel("share inside (bars: 2 standard errors)")
        for method, color in present.items():
            rows = self.of(method)
            last.plot([(r["t_low"] + r["t_high"]) / 2 for r in rows], [r["spread"] for r in rows], color=color, lw=1.2)
        rows = self.of(self.methods()[0])
        t = [(r["t_low"] + r["t_high"]) / 2 for r in rows]
        last.plot(t, [r["squared_residual"] ** 0.5 for r in rows], "k--", lw=1, label="residuals")
        last.set(title="predicted std (rms)", xlabel="timestep t", yscale="log")
        last.legend(frameon=False, fontsize=8)
        axes[-1].legend(frameon=False, fontsize=7)
        for axis in (*axes, last):
            axis.spines[["top", "right"]].set_visible(False)
        return figure

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``calibration.json`` and ``calibration.png``.

        Raises:
            OutputFolderError: The folder cannot be written.
        """
        path = check_output_folder(folder)
        write_json(path / "calibration.json", {**self.as_dict(), "environment": environment("cpu")})
        write_figure(path / "calibration.png", self.figure())
