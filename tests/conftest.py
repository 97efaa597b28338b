"""What many tests share: the shipped model with a posterior, made once."""

from __future__ import annotations

import os

import pytest
import torch

import bayesdiff as bd


def pytest_configure(config):
    """Processes side by side (pytest -n) share the cores: more threads than cores make all of them several times slower."""
    if hasattr(config, "workerinput"):
        threads = max(1, (os.cpu_count() or 1) // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start


@pytest.fixture(scope="session")
def shipped():
    """The shipped pipeline and a posterior fitted to 200 images; nobody changes them."""
    pipe, data = bd.zoo.load("fashion-ddpm")
    posterior = bd.fit(
        pipe, data.subset(slice(200)), dataset_size=data.dataset_size, generator=torch.Generator().manual_seed(0),
        progress=False,
    )  # fmt: skip
    return pipe, posterior
