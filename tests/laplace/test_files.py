"""Folders that were edited, damaged or made by others: a typed error or the same numbers, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from bayesdiff.checks import PosteriorFileError
from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from tests import cases

#: Mutated folders of each kind in the suite; BAYESDIFF_FUZZ asks for more.
MUTATIONS = int(os.environ.get("BAYESDIFF_FUZZ", "150"))
CASE = cases.layer_cases()[0]


def statistics(sketch=None):
    out = Statistics(HeadGeometry.of(CASE.layer), 3, sketch=sketch)
    n = len(CASE.inputs)
    out.update(CASE.inputs, CASE.residuals, torch.arange(n) % 3, torch.arange(n) // 2)
    return out


def posterior(**kwargs):
    sums = statistics()
    return LaplacePosterior.from_statistics(sums, Head("head", CASE.layer, sums.geometry), **kwargs)


def rewritten(folder, name, change):
    """The JSON changed by one who knows how its checksum is made."""
    file = folder / f"{name}.json"
    meta = json.loads(file.read_text())
    meta = change(meta)
    plain = {k: v for k, v in meta.items() if k != "checksum"}
    meta["checksum"] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(meta))


EDITS = [
    {"structure": "diag"}, {"structure": "kron"}, {"structure": 3}, {"covariance": "x"}, {"temperature": "2"},
    {"temperature": -1},
    {"temperature": None}, {"temperature": True}, {"geometry": 5}, {"geometry": {}}, {"geometry": {"kind": "linear"}},
    {"rank": "1"},
    {"rank": 0}, {"tolerance": 2}, {"num_images": 0.5}, {"num_images": -3}, {"dataset_size": "60000"}, {"dataset_size": []},
    {"num_timesteps": 0}, {"log_likelihood": "x"}, {"draws_per_image": None}, {"training_draws": -1}, {"head": 5},
    {"form": "joint2"},
    {"form": "diagonal"}, {"form": None}, {"approximation_error": "x"}, {"cut_share": [1]}, {"network": 5}, {"network": "abc"},
    {"fingerprint": "x"}, {"tensors": "../../etc/passwd"}, {"tensors": 5}, {"sha256": 0}, {"format": 2}, {"format": None},
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_edited_json(tmp_path, edit):
    posterior().save(tmp_path)
    file = tmp_path / "posterior.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | edit))
    with pytest.raises(PosteriorFileError, match=r"checksum|format"):
        LaplacePosterior.load(tmp_path)
    file.write_text(whole)
    rewritten(tmp_path, "posterior", lambda meta: meta | edit)
    with pytest.raises(PosteriorFileError):
        LaplacePosterior.load(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        {"geometry": 5},
        {"loss": None},
        {"loss": {"kind": "x"}},
        {"weighted": "yes", "loss": 3},
        {"sketch": 7},
        {"sketch": "2"},
    ],
    ids=str,
)
def test_edited_statistics(tmp_path, edit):
    statistics().save(tmp_path)
    rewritten(tmp_path, "statistics", lambda meta: meta | edit)
    with pytest.raises(PosteriorFileError):
        Statistics.load(tmp_path)


def test_nothing_of_another_folder_is_read(tmp_path):
    posterior().save(tmp_path / "a")
    posterior(structure="diag").save(tmp_path / "b")
    theirs = next((tmp_path / "b").glob("*.safetensors"))
    rewritten(tmp_path / "a", "posterior", lambda meta: meta | {"tensors": f"../b/{theirs.name}"})
    with pytest.raises(PosteriorFileError):
        LaplacePosterior.load(tmp_path / "a")


def test_a_save_that_fails_writes_nothing(tmp_path):
    fitted = posterior()
    object.__setattr__(fitted, "head_path", object())  # nothing that JSON has
    with pytest.raises(TypeError):
        fitted.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank"])
def test_what_is_saved_is_what_prediction_needs(tmp_path, structure):
    fitted = posterior(structure=structure)
    fitted.save(tmp_path)
    loaded = LaplacePosterior.load(tmp_path)
    assert loaded.precision is None
    assert loaded.statistics is None
    c, d = fitted.mean.shape
    numbers = sum(p.numel() for p in fitted.sigma.parts.values())
    assert (
        numbers
        <= {"full": 8 * c * d + c * d * d, "kron": d * d + c * c, "diag": c * d, "lowrank": 9 * c * d}[structure]
    )
    assert torch.equal(loaded.variance(CASE.inputs), fitted.variance(CASE.inputs))


def mutated(rng, data):
    """Some bytes changed, left out, doubled or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else min(len(data) - 1, rng.randrange(400))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def mutated_json(rng, text):
    meta = json.loads(text)
    other = [None, True, -1, 0, 1e308, "", "x", [], {}, 2**70, [[1]], {"kind": "conv"}]
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = meta
        key = rng.choice(list(where))
        if isinstance(where[key], dict) and where[key] and rng.random() < 0.7:
            where = where[key]
            key = rng.choice(list(where))
        if rng.random() < 0.2:
            del where[key]
        else:
            where[key] = rng.choice(other)
        if not meta:
            break
    return meta


@pytest.mark.parametrize("kind", ["posterior", "statistics", "sketch"])
def test_mutated_folders(tmp_path, kind):
    rng = random.Random(20)
    name = "posterior" if kind == "posterior" else "statistics"
    made = posterior() if kind == "posterior" else statistics(4 if kind == "sketch" else None)
    made.save(tmp_path)
    file, tensors = tmp_path / f"{name}.json", next(tmp_path.glob("*.safetensors"))
    text, payload = file.read_text(), tensors.read_bytes()

    def load():
        if kind == "posterior":
            return LaplacePosterior.load(tmp_path).variance(CASE.inputs)
        return Statistics.load(tmp_path).gram

    expected, errors, same = load(), 0, 0
    for n in range(MUTATIONS):
        file.write_text(text)
        tensors.write_bytes(payload)
        what = n % 4
        if what == 0:  # bytes of either file
            if rng.random() < 0.5:
                tensors.write_bytes(mutated(rng, payload))
            else:
                file.write_bytes(mutated(rng, text.encode()))
        elif what == 1:
            file.write_text(json.dumps(mutated_json(rng, text)))
        elif what == 2:  # JSON with a right checksum
            changed = mutated_json(rng, text)
            rewritten(tmp_path, name, lambda _, changed=changed: changed)
        else:  # tensors with right checksums
            bad = mutated(rng, payload)
            tensors.write_bytes(bad)
            rewritten(tmp_path, name, lambda meta, bad=bad: meta | {"sha256": hashlib.sha256(bad).hexdigest()})
        try:
            found = load()
        except PosteriorFileError:
            errors += 1
            continue
        if what in (0, 1):
            assert torch.equal(found, expected), n  # what no checksum covers does not matter
        same += 1
    assert errors > 0.5 * MUTATIONS
    print(f"{kind}: {MUTATIONS} folders, {errors} typed errors, {same} loaded")


def test_memory_of_loading(tmp_path):
    """No more than twice the file, on top of what was there."""
    layer = torch.nn.Linear(1500, 4)
    sums = Statistics(HeadGeometry.of(layer), 1)
    generator = torch.Generator().manual_seed(0)
    sums.update(
        torch.randn(800, 1500, generator=generator), torch.randn(800, 4, generator=generator), torch.zeros(800, dtype=torch.long),
        torch.arange(800),
    )  # fmt: skip
    sums.save(tmp_path)
    size = next(tmp_path.glob("*.safetensors")).stat().st_size
    code = (
        "import resource, sys, bayesdiff; from bayesdiff.laplace.statistics import Statistics\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "Statistics.load(sys.argv[1]); print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert size > 2e7
    assert float(done.stdout) < 2 * size + 2**24


def test_a_save_that_is_killed(tmp_path):
    """At a moment of its own each time: what is there is whole, the old or the new."""
    made = [posterior(temperature=t) for t in (1.0, 2.0)]
    allowed = {float(p.weight_variance().sum()) for p in made}
    rng = random.Random(1)
    made[0].save(tmp_path)
    for _ in range(40):
        child = os.fork()
        if not child:
            while True:
                for one in made:
                    one.save(tmp_path)
        time.sleep(0.02 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert float(LaplacePosterior.load(tmp_path).weight_variance().sum()) in allowed
    made[1].save(tmp_path)  # and it can be written again
    assert float(LaplacePosterior.load(tmp_path).weight_variance().sum()) == float(made[1].weight_variance().sum())
