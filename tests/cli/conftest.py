"""What the tests of the commands share."""

from __future__ import annotations

import pytest
from diffusers import UNet2DModel


@pytest.fixture(scope="session")
def posterior(shipped, tmp_path_factory):
    """The folder of a saved posterior of the shipped model."""
    folder = tmp_path_factory.mktemp("posterior")
    shipped[1].save(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Any call of a network is a failure of the test."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the network was called before the arguments were checked")

    monkeypatch.setattr(UNet2DModel, "forward", forbidden)
