"""A killed fit goes on to the same bits; the checkpoint of another fit is refused; nothing is written twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import accumulate

import pytest
import torch

from bayesdiff import fit
from bayesdiff.checks import ArgumentError, CheckpointError, OutputFolderError
from bayesdiff.fitting.repeats import ASKED
from bayesdiff.laplace.checkpoint import Checkpoint, named, remove
from tests import cases

N = 12


def images(n=N):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def fitted(folder=None, network=None, data=None, seed=3, **kwargs):
    return fit(
        network or cases.tiny_unet(channels=1), images() if data is None else data, scheduler=cases.scheduler(),
        generator=torch.Generator().manual_seed(seed), progress=False, checkpoint=folder,
        **{"draws_per_image": 2, "batch_size": 2, **kwargs},
    )  # fmt: skip


def assert_same_bits(a, b):
    for x, y in zip(bits(a), bits(b), strict=True):
        assert torch.equal(x, y)


def bits(posterior):
    s = posterior.statistics
    sums = (s.gram, s.squared_residuals, s.positions, s.image_scores(torch.ones(s.num_bins)))
    parts = (posterior.precision, *posterior.sigma.parts.values(), posterior.noise_variance)
    return *sums, *parts, torch.as_tensor(posterior.prior_precision)


class Killed(BaseException):
    pass


def kill_at(network, call):
    """The network stops everything at its n-th call."""
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == call:
            raise Killed

    network.register_forward_hook(stop)
    return network


def asked(calls):
    """How often the network is called for so many calls: some are made twice, to see whether it is a function."""
    return calls + (calls > 0) + sum(n <= calls for n in ASKED)


@pytest.mark.parametrize("call", [1, 2, 4, 6, 11, 14])
@pytest.mark.parametrize("form", ["tensor", "batches"])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(call, form, tmp_path):
    """Two images with two draws each are two network calls; a batch of one image is one. What is begun is begun again."""
    data = {"tensor": lambda: images(), "batches": lambda: iter([images()[:5], images()[5:]])}[form]
    expected = fitted(data=data())
    often = Checkpoint(tmp_path / "c", seconds=0)
    with pytest.raises(Killed):
        fitted(often, kill_at(cases.tiny_unet(channels=1), call), data())
    calls = []
    network = cases.tiny_unet(channels=1)
    network.register_forward_hook(lambda *_: calls.append(1))
    assert_same_bits(fitted(often, network, data()), expected)
    ends = list(accumulate({"tensor": [2] * 6, "batches": [2, 2, 1, 2, 2, 2, 1]}[form]))
    assert len(calls) == asked(ends[-1] - max(end for end in [0, *ends] if asked(end) < call))
    calls.clear()
    assert_same_bits(fitted(often, network, data()), expected)  # all is there
    assert not calls


SCRIPT = """
import sys, time, torch
from tests.laplace.test_checkpoint import Checkpoint, cases, fitted
network = cases.tiny_unet(channels=1)
network.register_forward_hook(lambda *_: time.sleep(float(sys.argv[2])))
out = fitted(Checkpoint(sys.argv[1], seconds=0), network)
out.save(sys.argv[3])
"""


def test_sigkill(tmp_path):
    """A real process, killed without warning, again and again, at any point."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "c")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for at_least in (2, 6):
        with subprocess.Popen([*command, "0.1", str(tmp_path / "never")], env=environment) as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                index = tmp_path / "c/checkpoint.json"
                if index.exists() and json.loads(index.read_text())["images"] >= at_least:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.01)
            kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert 6 <= json.loads((tmp_path / "c/checkpoint.json").read_text())["images"] < N
    assert not (tmp_path / "never").exists()
    subprocess.run([*command, "0", str(tmp_path / "resumed")], env=environment, check=True)
    whole = [sys.executable, "-c", SCRIPT, str(tmp_path / "other"), "0", str(tmp_path / "whole")]
    subprocess.run(whole, env=environment, check=True)
    resumed, once = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("resumed", "whole"))
    assert resumed == once  # files are named for their content
    assert len(resumed) >= 2


def test_only_what_is_new_is_written(tmp_path):
    inodes = []

    class Watched(list):
        def __getitem__(self, i):
            inodes.append({p.name: p.stat().st_ino for p in tmp_path.glob("draws-*")})
            return super().__getitem__(i)

    from torch.utils.data import Dataset

    class Data(Dataset):
        items = Watched(images())

        def __len__(self):
            return N

        def __getitem__(self, i):
            return self.items[i]

    fitted(Checkpoint(tmp_path, seconds=0), data=Data())
    last = {p.name: p.stat().st_ino for p in tmp_path.glob("draws-*")}
    assert len(last) == 6
    assert all(last[name] == inode for seen in inodes for name, inode in seen.items())
    assert len(list(tmp_path.glob("sums-*"))) == 1


def test_it_is_written_seldom(tmp_path):
    fitted(tmp_path)
    assert len(list(tmp_path.glob("draws-*"))) == 1  # at the end
    assert json.loads((tmp_path / "checkpoint.json").read_text())["images"] == N


def other_network():
    network = cases.tiny_unet(channels=1)
    with torch.no_grad():
        next(network.parameters()).add_(0.01)
    return network


DIFFERENT = {
    "seed": ({"seed": 4}, "seed"),
    "draws": ({"draws_per_image": 1}, r"draws_per_image \(2 there, 1 here\)"),
    "bins": ({"noise_bins": 5}, r"noise_bins \(10 there, 5 here\)"),
    "model": ({"network": other_network()}, "model"),
    "data": ({"data": images(N + 1)}, "data"),
    "numbers": ({"data": images() * 0.9}, "data"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_checkpoint_of_another_fit_is_refused(name, tmp_path):
    kwargs, message = DIFFERENT[name]
    fitted(tmp_path)
    with pytest.raises(CheckpointError, match=f"one of another: .*{message}.*use another folder"):
        fitted(tmp_path, **kwargs)


def test_what_is_cut_from_the_sums_may_differ(tmp_path):
    fitted(tmp_path, structure="full", covariance="sandwich")
    other = {"structure": "diag", "covariance": "ggn", "dataset_size": 100, "batch_size": 6}
    out = fitted(tmp_path, **other)
    assert torch.equal(out.precision, fitted(None, structure="diag", covariance="ggn", dataset_size=100).precision)


def damage(path, how):
    payload = path.read_bytes()
    path.write_bytes({"cut": payload[:-10], "changed": payload[:-1] + bytes([payload[-1] ^ 1]), "empty": b""}[how])


@pytest.mark.parametrize("how", ["cut", "changed", "empty", "gone"])
@pytest.mark.parametrize("which", ["checkpoint.json", "sums-*", "draws-*"])
def test_damage_is_found(which, how, tmp_path):
    fitted(tmp_path)
    path = next(tmp_path.glob(which))
    if how == "gone":
        if which == "checkpoint.json":
            pytest.skip("a folder without it is a new one")
        path.unlink()
    else:
        damage(path, how)
    if (which, how) == ("checkpoint.json", "changed"):
        pytest.skip("the last byte is a line's end")
    with pytest.raises(CheckpointError, match="remove the folder"):
        fitted(tmp_path)


def test_settings_are_checked(tmp_path):
    for seconds in (-1, "often", float("nan"), True):
        with pytest.raises(ArgumentError, match="seconds >= 0"):
            Checkpoint(tmp_path, seconds)
    (tmp_path / "file").touch()
    with pytest.raises(OutputFolderError):
        fitted(tmp_path / "file" / "c")


def test_remove(tmp_path):
    fitted(tmp_path / "c")
    (tmp_path / "c/mine").touch()
    remove(tmp_path / "c")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["mine"]
    (tmp_path / "c/mine").unlink()
    remove(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    remove(tmp_path / "nothing")


def test_two_fits_at_once_do_not_share_a_folder(tmp_path):
    network, caught = cases.tiny_unet(channels=1), []

    def another(*_):
        if not caught:
            caught.append(None)  # its own calls come here, too
            with pytest.raises(CheckpointError, match="another that is running"):
                fitted(tmp_path)
            caught[0] = True

    network.register_forward_hook(another)
    once = fitted(tmp_path, network, data=images(2))
    assert caught == [True]
    assert_same_bits(fitted(tmp_path, data=images(2)), once)  # and it is free again
    with pytest.raises(CheckpointError, match="of another"):
        fitted(tmp_path)
    assert_same_bits(fitted(tmp_path, data=images(2)), once)  # also after an error


def test_what_a_killed_fit_had_begun_to_write_is_removed(tmp_path):
    for name in (".sums-0123456789abcdef-00ff.safetensors", ".checkpoint-00ff.json"):
        (tmp_path / name).write_bytes(b"half")
    fitted(tmp_path, data=images(2))
    assert not list(tmp_path.glob(".*"))
    (tmp_path / ".draws-000000-00ff.safetensors").write_bytes(b"half")
    remove(tmp_path)
    assert not tmp_path.exists()


def scaled(by):
    return lambda net, x, t, batch: net(x, t * by).sample


def test_a_function_is_told_by_what_it_does(tmp_path):
    fitted(tmp_path, data=images(2), call=scaled(1.0))
    fitted(tmp_path, data=images(2), call=scaled(1.0))
    for other in (scaled(0.5), lambda net, x, t, batch: net(x, t + 0).sample):
        with pytest.raises(CheckpointError, match="call"):
            fitted(tmp_path, data=images(2), call=other)
    source = "lambda u, k=(2, 'a'): [v for v in (u, 3)]"
    first, second = (eval(compile(space + source, name, "eval")) for space, name in (("", "a.py"), ("\n\n", "b.py")))
    assert named(first) == named(second) != named(eval(source.replace("3", "4")))
