"""Files are whole or not there, and say what they were made with."""

from __future__ import annotations

import json
import platform
import stat

import pytest
import torch
from safetensors.torch import load_file

from bayesdiff.io import atomic_path, environment, write_json, write_tensors


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert temporary.suffix == ".json"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_written_tensors_are_as_readable_as_other_files(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.arange(6.0).view(2, 3).T})
    (tmp_path / "other").touch()
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_environment_names_versions_and_no_machine():
    env = environment()
    assert env["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "bayesdiff", "diffusers", "laplace-torch", "numpy"} < env["versions"].keys()
    assert env["device"] == "cpu"
    assert env["cpu_threads"] == torch.get_num_threads()
    assert platform.node() not in json.dumps(env)
