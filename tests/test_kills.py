"""Commands killed at random moments (:mod:`tests.kills`): a few here; ``BAYESDIFF_KILLS`` asks for more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

KILLS = os.environ.get("BAYESDIFF_KILLS", "2")


def test_killed_at_random_moments():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "tests.kills", "--number", KILLS, "--what", "fit", "map", "save"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(*found, sep="\n")
    assert [f["what"] for f in found] == ["fit", "map", "save"]
    assert all(f["kills"] >= int(KILLS) for f in found)
