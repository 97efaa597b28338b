"""Folders that were edited, damaged or made by others: a typed error or the same numbers, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch

from bayesdiff.checks import BayesdiffError, CheckpointError, PosteriorFileError
from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.checkpoint import Checkpoint, Journal
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from tests import cases

#: Mutated folders of each kind in the suite; BAYESDIFF_FUZZ asks for more.
MUTATIONS, SEED = int(os.environ.get("BAYESDIFF_FUZZ", "150")), int(os.environ.get("BAYESDIFF_FUZZ_SEED", "20"))
STRUCTURES = ("full", "kron", "diag", "lowrank")
CASE = cases.layer_cases()[0]


def statistics(sketch=None):
    out = Statistics(HeadGeometry.of(CASE.layer), 3, sketch=sketch)
    n = len(CASE.inputs)
    out.update(CASE.inputs, CASE.residuals, torch.arange(n) % 3, torch.arange(n) // 2)
    return out


def posterior(**kwargs):
    sums = statistics()
    return LaplacePosterior.from_statistics(sums, Head("head", CASE.layer, sums.geometry), **kwargs)


def large_statistics(features, images=60):
    sums = Statistics(HeadGeometry.of(torch.nn.Linear(features, 4)), 1)
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.randn(images, k, generator=generator) for k in (features, 4))
    sums.update(x, r, torch.zeros(images, dtype=torch.long), torch.arange(images))
    return sums


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


STRANGE = [
    None,
    True,
    -1,
    0,
    1,
    7,
    1e308,
    -0.5,
    "",
    "x",
    "F32",
    "I64",
    [],
    {},
    2**70,
    2**40,
    [[1]],
    [3, 3],
    {"kind": "conv"},
]


def mutated_json(rng, text):
    meta = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = meta
        key = rng.choice(list(where))
        while isinstance(where[key], dict) and where[key] and rng.random() < 0.7:
            where = where[key]
            key = rng.choice(list(where))
        kind = rng.random()
        if kind < 0.2:
            del where[key]
        elif kind < 0.3:
            where[rng.choice(["x", "sigma.rest", "sketch", "weights"])] = where.pop(key)
        elif kind < 0.4 and isinstance(where[key], list) and where[key]:
            where[key][rng.randrange(len(where[key]))] = copy.deepcopy(rng.choice(STRANGE))
        else:
            where[key] = copy.deepcopy(rng.choice(STRANGE))
        if not meta:
            break
    return meta


def mutated_header(rng, payload):
    """A safetensors file whose header is JSON, but says other things of the same bytes."""
    n = int.from_bytes(payload[:8], "little")
    header = json.dumps(mutated_json(rng, payload[8 : 8 + n].decode())).encode()
    return len(header).to_bytes(8, "little") + header + payload[8 + n :]


def mutated_numbers(rng, payload):
    """Some numbers of the tensors are others."""
    data, start = bytearray(payload), 8 + int.from_bytes(payload[:8], "little")
    for _ in range(rng.choice((1, 3, 20))):
        at = start + 8 * rng.randrange((len(data) - start) // 8)
        number = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e300, -1e300, 1e-320, 3.0, 1e20))
        data[at : at + 8] = struct.pack("<d", number) if rng.random() < 0.8 else rng.randbytes(8)
    return bytes(data)


class Watch:
    """What no loading may do: run code, or open files of other folders."""

    FORBIDDEN = (
        "exec",
        "compile",
        "pickle.find_class",
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.posix_spawn",
        "ctypes.dlopen",
    )

    def __init__(self):
        self.folder, self.seen = None, []
        str(torch.zeros(1))  # PyTorch imports some of itself when a tensor is first written out, as messages do
        sys.addaudithook(self.hook)  # for the rest of the process, quiet but in a block

    def hook(self, event, args):
        if self.folder is None:
            return
        outside = (
            event == "open" and isinstance(args[0], (str, os.PathLike)) and self.folder not in os.path.abspath(args[0])
        )
        if event in self.FORBIDDEN or outside:
            self.seen.append((event, str(args)[:200]))

    @contextlib.contextmanager
    def __call__(self, folder):
        self.folder = str(folder)
        try:
            yield
        finally:
            self.folder = None
        assert not self.seen


@pytest.fixture(scope="module")
def watch():
    return Watch()


class Growth:
    """How much more memory a process has at its highest than now; as Linux tells it."""

    def __init__(self):
        self.known = os.access("/proc/self/clear_refs", os.W_OK)
        self.before = self.begin()

    def _kilobytes(self, name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name))

    def begin(self):
        if not self.known:
            return 0
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.before = self._kilobytes("VmRSS")
        return self.before

    def bytes(self):
        return 1024 * (self._kilobytes("VmHWM") - self.before) if self.known else 0


def saved(kind, folder):
    """Something saved in a folder; its name, and what reads it and works with it."""
    if kind in STRUCTURES:
        posterior(structure=kind, covariance="ef" if kind == "kron" else "sandwich").save(folder)
    elif kind == "large":
        large_statistics(700).save(folder)
    elif kind == "checkpoint":
        sums = statistics()
        journal = journal_of(folder)
        journal.keep(sums, Head("head", CASE.layer, sums.geometry), 8, now=True)
        journal.close()
        return "checkpoint", lambda: read_journal(folder), use_statistics
    else:
        statistics(4 if kind == "sketch" else None).save(folder)
    if kind in STRUCTURES:
        return "posterior", lambda: LaplacePosterior.load(folder), use_posterior
    return "statistics", lambda: Statistics.load(folder), use_statistics


def journal_of(folder):
    return Journal(Checkpoint(folder, 0), lambda: {"seed": 1})


def read_journal(folder):
    journal = journal_of(folder)
    journal.close()
    assert journal.statistics is not None
    return journal.statistics


def use_posterior(loaded):
    assert len(repr(loaded)) < 300
    assert bool(torch.isfinite(loaded.deviations(2, torch.Generator().manual_seed(0))).all())
    loaded.log_marginal_likelihood()
    found = loaded.variance(CASE.inputs)
    assert bool((torch.isfinite(found) & (found >= 0)).all())
    return found


def use_statistics(loaded):
    layer = CASE.layer if loaded.geometry == HeadGeometry.of(CASE.layer) else None
    if layer is not None and loaded.sketch is None:
        made = LaplacePosterior.from_statistics(loaded, Head("head", layer, loaded.geometry), prior_precision=1.0)
        found = made.variance(CASE.inputs)
        assert bool((torch.isfinite(found) & (found >= 0)).all())
    return loaded.gram


def mutation(rng, n, folder, name, text, payload):
    """One of six: bytes of a file; JSON; JSON under a right checksum; tensors, their header, or their numbers."""
    file, tensors = folder / f"{name}.json", next(folder.glob(TENSORS.get(name, "*.safetensors")))
    file.write_text(text)
    tensors.write_bytes(payload)
    what = n % 6
    if what == 0:
        if rng.random() < 0.5:
            tensors.write_bytes(mutated(rng, payload))
        else:
            file.write_bytes(mutated(rng, text.encode()))
    elif what == 1:
        file.write_text(json.dumps(mutated_json(rng, text)))
    elif what == 2:
        changed = mutated_json(rng, text)
        rewritten(folder, name, lambda _: changed)
    else:
        bad = (mutated, mutated_header, mutated_numbers)[what - 3](rng, payload)
        tensors.write_bytes(bad)
        digest = {"sha256": hashlib.sha256(bad).hexdigest()}
        rewritten(
            folder, name, lambda meta: meta | ({"sums": meta["sums"] | digest} if name == "checkpoint" else digest)
        )
    return what < 2, file.stat().st_size + tensors.stat().st_size


#: Which file of tensors is changed, where there are several.
TENSORS = {"checkpoint": "sums-*.safetensors"}
#: What loading may take beside twice the file: what the interpreter and the allocator hold on to.
SLACK = 2**21


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.ProjectionWarning")
@pytest.mark.parametrize("kind", [*STRUCTURES, "statistics", "sketch", "large", "checkpoint"])
def test_mutated_folders(tmp_path, kind, watch):
    """A typed error, or the same numbers; with checksums that fit, other numbers, but a variance all the same."""
    rng, growth = random.Random(SEED), Growth()
    name, load, use = saved(kind, tmp_path)
    text, payload = (
        (tmp_path / f"{name}.json").read_text(),
        next(tmp_path.glob(TENSORS.get(name, "*.safetensors"))).read_bytes(),
    )
    expected, errors, later, same, largest = use(load()), 0, 0, 0, 0.0
    for n in range(MUTATIONS // 10 if kind == "large" else MUTATIONS):
        covered, size = mutation(rng, n, tmp_path, name, text, payload)
        growth.begin()
        loaded = None
        try:
            with watch(tmp_path):
                loaded = load()
        except (PosteriorFileError, CheckpointError):
            errors += 1
        grown = growth.bytes()
        if grown > 2 * size + SLACK:  # the process itself may have grown, once, by what it had not needed before
            growth.begin()
            with contextlib.suppress(PosteriorFileError, CheckpointError):
                load()
            grown = growth.bytes()
        largest = max(largest, grown / size)
        assert grown <= 2 * size + SLACK, (n, grown, size)
        if loaded is None:
            continue
        try:
            found = use(loaded)
        except BayesdiffError:
            assert not covered, n
            later += 1
            continue
        assert not covered or torch.equal(found, expected), n  # what no checksum covers does not matter
        same += 1
    assert errors > 0.5 * n
    print(
        f"{kind}: {n + 1} folders, {errors} typed errors, {later} when used, {same} loaded, {largest:.2f} times the file at most"
    )


def test_memory_of_loading(tmp_path):
    """No more than twice the file, on top of what was there."""
    sums = large_statistics(1500, 800)
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
