"""Files that are either whole or not there, and the environment that a result was made in.

A run that is killed while it writes must not leave half a posterior behind. Everything here is written
to a temporary file in the same folder, flushed to disk, and moved over its name in one step.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGES = ("torch", "diffusers", "laplace-torch", "numpy")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, with its suffix; at the end of the block it takes that name.

    When the block raises, the temporary file is removed and what was at ``path`` stays as it was.

    Raises:
        OSError: The folder doesn't exist or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(6)}{path.suffix}")
    with open(temporary, "xb") as file:
        # Some writers (safetensors) make their files private; what this process usually makes is kept.
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all; NaN and infinity are not JSON, and raise ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` as safetensors, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=dict(metadata or {}))


def write_figure(path: str | os.PathLike[str], figure: Any, *, dpi: int = 200) -> None:
    """Write a matplotlib ``Figure`` in the format of the suffix, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions and hardware that a result depends on; no names of machines or folders."""
    import bayesdiff

    device = torch.device(device)
    versions = {"python": platform.python_version(), "bayesdiff": bayesdiff.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
