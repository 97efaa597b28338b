"""What many tests share: the shipped model with a posterior, made once."""

from __future__ import annotations

import pytest
import torch

import bayesdiff as bd


@pytest.fixture(scope="session")
def shipped():
    """The shipped pipeline and a posterior fitted to 200 images; nobody changes them."""
    pipe, data = bd.zoo.load("fashion-ddpm")
    posterior = bd.fit(
        pipe, data.subset(slice(200)), dataset_size=data.dataset_size, generator=torch.Generator().manual_seed(0),
        progress=False,
    )  # fmt: skip
    return pipe, posterior
