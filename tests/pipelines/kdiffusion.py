"""k-diffusion's samplers as they are published, without the rest of the package.

``import k_diffusion`` needs CLIP, wandb and more, which no sampler does: ``sampling.py`` is loaded by itself, from the
installed package (``pip install --no-deps k-diffusion``).
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

NAME = "k_diffusion"
ALONE = "k_diffusion_alone"  # what the modules are called here, for k_diffusion itself stays importable


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """All that ``sampling.py`` takes from ``k_diffusion.utils``, a module that needs torchvision."""
    return x.reshape(*x.shape, *(1,) * (target_dims - x.ndim))


def file() -> Path:
    package = importlib.util.find_spec(NAME)  # finds a top-level package without running it
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError("k-diffusion is not installed: pip install --no-deps k-diffusion", name=NAME)
    return Path(package.submodule_search_locations[0]) / "sampling.py"


@functools.cache
def sampling() -> Any:
    """The module ``k_diffusion.sampling``."""
    spec = importlib.util.spec_from_file_location(f"{ALONE}.sampling", file())
    assert spec is not None
    assert spec.loader is not None
    parent, utils = ModuleType(ALONE), ModuleType(f"{ALONE}.utils")
    parent.__path__ = []  # a package, and an empty one
    utils.append_dims = append_dims  # type: ignore[attr-defined]
    parent.utils = utils  # type: ignore[attr-defined]
    module = importlib.util.module_from_spec(spec)
    sys.modules.update({ALONE: parent, utils.__name__: utils, spec.name: module})
    spec.loader.exec_module(module)
    return module
