"""The scripts in ``examples/`` run, and are short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
#: What each leaves behind, and says.
LEFT = {
    "evaluate_calibration.py": ("calibration.png", "do not test (1)"),
    "compare_mc_analytic.py": ("comparison.png", "variance (1)"),
    "make_maps.py": ("make_maps.png", "network calls of which 25 plain"),
}


@pytest.mark.parametrize("name", LEFT)
def test_an_example_runs(name, tmp_path):
    script = EXAMPLES / name
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 30
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "20"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, said = LEFT[name]
    assert (tmp_path / file).stat().st_size > 5_000
    assert said in done.stdout
