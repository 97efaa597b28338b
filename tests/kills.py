"""Commands that are killed at random moments, and what is there afterwards.

    python -m tests.kills --what fit --number 40

A process that has imported everything forks one for each trial and kills it without warning. ``fit`` is killed and run again
until it ends, over a folder that holds a posterior already; ``map`` over a folder that holds maps; ``save`` over a posterior.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bayesdiff.cli import app
from bayesdiff.laplace.posterior import LaplacePosterior
from tests.data.conftest import pictures, write
from tests.pipelines.build import CASES


def command(*arguments):
    """Run a command of ours in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            app([str(a) for a in arguments], standalone_mode=False)
        code = 0
    finally:
        os._exit(code)


def ended(child):
    """Whether it ended by itself; it must have done so well."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return False
    assert os.WEXITSTATUS(status) == 0, status
    return True


def whole(*arguments):
    """Run a command to its end; its seconds."""
    clock = time.perf_counter()
    assert ended(command(*arguments))
    return time.perf_counter() - clock


def killed(rng, seconds, *arguments):
    """Run a command and kill it somewhere in so many seconds; whether it had ended before."""
    child = command(*arguments)
    time.sleep(seconds * rng.random())
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return ended(child)


def posterior_bits(folder):
    """The bytes of a posterior that can be loaded."""
    LaplacePosterior.load(folder)
    name = json.loads((folder / "posterior.json").read_text())["tensors"]
    return hashlib.sha256((folder / "posterior.json").read_bytes() + (folder / name).read_bytes()).hexdigest()


def of_fit(root, rng, number, model, data):
    """Kills, resumed fits that came to the same bits."""

    def arguments(out, seed):
        return ("fit", "--model", model, "--data", data, "--out", out, "--seed", seed, "--batch-size", 1, "--overwrite",
                "--checkpoint-every", 0)  # fmt: skip

    whole(*arguments(root / "old", 0))
    seconds = whole(*arguments(root / "new", 1))
    old, new = posterior_bits(root / "old"), posterior_bits(root / "new")
    kills = resumed = 0
    while kills < number:
        out = root / f"out-{kills}"
        shutil.copytree(root / "old", out)
        once, done = 0, False
        while once < 3 and not done:
            done = killed(rng, 1.1 * seconds, *arguments(out, 1))
            once += not done
            assert posterior_bits(out) in (old, new)
        kills += once
        if not done:
            whole(*arguments(out, 1))
        assert posterior_bits(out) == new
        resumed += once > 0
        shutil.rmtree(out)
    return {"kills": kills, "resumed": resumed, "seconds_of_a_run": round(seconds, 2)}


def file_bits(folder):
    """What a folder of maps holds: every file can be read."""
    found = {}
    for file in folder.iterdir():
        if file.name.startswith("."):
            continue  # what a killed process had begun to write, under no name of ours
        if file.suffix == ".png":
            with Image.open(file) as image:
                image.load()
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                assert all(np.isfinite(arrays[k]).all() for k in arrays)
        elif file.suffix == ".json":
            assert json.loads(file.read_text())["command"] == "map"
            continue  # with times
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def of_one_run(folder):
    """Whether the record of a folder is of the files that lie there."""
    files = json.loads((folder / "settings.json").read_text())["sha256"]
    return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in files.items())


def of_map(root, rng, number, model, data):
    """Kills; how often the record said that the folder was not of one run."""
    whole("fit", "--model", model, "--data", data, "--out", root / "posterior")

    def arguments(out, seed):
        return ("map", "--model", model, "--posterior", root / "posterior", "--out", out, "--seed", seed, "--num-samples", 2,
                "--steps", 3, "--num-tangents", 2)  # fmt: skip

    whole(*arguments(root / "old", 0))
    seconds = whole(*arguments(root / "new", 1))
    old, new = file_bits(root / "old"), file_bits(root / "new")
    kills = mixed = 0
    while kills < number:
        out = root / "out"
        shutil.copytree(root / "old", out)
        if killed(rng, 1.1 * seconds, *arguments(out, 1)):
            assert file_bits(out) == new
            assert of_one_run(out)
        else:
            kills += 1
            found = file_bits(out)
            assert found.keys() == old.keys()
            assert all(found[name] in (old[name], new[name]) for name in found)
            if of_one_run(out):
                assert found in (old, new)
            else:
                mixed += 1
            if kills == number:  # and again
                whole(*arguments(out, 1))
                assert file_bits(out) == new
                assert of_one_run(out)
        shutil.rmtree(out)
    return {"kills": kills, "told_as_mixed": mixed, "seconds_of_a_run": round(seconds, 2)}


def of_save(root, rng, number, model, data):
    """Kills of a process that does nothing but save two posteriors in turns."""
    for seed in (0, 1):
        whole("fit", "--model", model, "--data", data, "--out", root / str(seed), "--seed", seed)
    made = [LaplacePosterior.load(root / str(seed)) for seed in (0, 1)]
    for one in made:
        one.save(root / "out")
    clock = time.perf_counter()
    made[0].save(root / "out")
    seconds = time.perf_counter() - clock
    allowed = {posterior_bits(root / str(seed)) for seed in (0, 1)}
    for _ in range(number):
        child = os.fork()
        if not child:
            while True:
                for one in made:
                    one.save(root / "out")
        time.sleep(4 * seconds * rng.random())
        os.kill(child, signal.SIGKILL)
        assert not ended(child)
        assert posterior_bits(root / "out") in allowed
    return {"kills": number, "seconds_of_a_save": round(seconds, 4)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=("fit", "map", "save"), nargs="+", required=True)
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pipe = next(c for c in CASES if c.name == "ddim-pixels").make()
        with contextlib.redirect_stdout(io.StringIO()):
            pipe.save_pretrained(root / "model")
        data = write(root / "data", pictures(n=8, height=20, width=24), None)
        for what in given.what:
            run, own = {"fit": of_fit, "map": of_map, "save": of_save}[what], root / what
            own.mkdir()
            found = run(own, random.Random(given.seed), given.number, root / "model", data)
            print(json.dumps({"what": what, **found}), flush=True)


if __name__ == "__main__":
    main()
