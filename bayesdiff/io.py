"""Files that are either whole or not there, and the environment that a result was made in.

A run that is killed while it writes must not leave half a posterior behind. Everything here is written
to a temporary file in the same folder, flushed to disk, and moved over its name in one step.
"""

from __future__ import annotations

import hashlib
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
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from bayesdiff.checks import PosteriorFileError, check_output_folder

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


def write_folder(
    folder: str | os.PathLike[str], name: str, version: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write ``name.json`` and a safetensors file; what was there stays whole until the new is.

    Raises:
        OutputFolderError: The folder cannot be written.
    """
    path = check_output_folder(folder)
    payload = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    digest = hashlib.sha256(payload).hexdigest()
    # The file's name carries its content, so name.json, replaced last, always names a complete one.
    final = path / f"{name}-{digest[:16]}.safetensors"
    with atomic_path(final) as temporary:
        temporary.write_bytes(payload)
    write_json(path / f"{name}.json", {"format": version, "tensors": final.name, "sha256": digest, **meta})
    for old in path.glob(f"{name}-*.safetensors"):
        if old != final:
            old.unlink()


def read_folder(folder: str | os.PathLike[str], name: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_folder` wrote.

    Raises:
        PosteriorFileError: A file is missing, damaged, truncated or of an unknown version.
    """
    path = Path(folder)
    try:
        meta = json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
        if meta["format"] != version:
            raise PosteriorFileError(f"expected {name} format {version}, got {meta['format']!r} in {str(path)!r}")
        payload = (path / meta["tensors"]).read_bytes()
        if hashlib.sha256(payload).hexdigest() != meta["sha256"]:
            raise PosteriorFileError(
                f"expected {meta['tensors']} in {str(path)!r} to have the checksum that {name}.json records, got another: the "
                "file is damaged or truncated; save it again"
            )
        # Copied: tensors within the file's bytes are not aligned as others are, and would be summed in another order.
        return {k: v.clone() for k, v in load(payload).items()}, meta
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, PosteriorFileError):
            raise
        saved = {"posterior": "LaplacePosterior", "statistics": "Statistics"}.get(name, name)
        raise PosteriorFileError(
            f"expected what {saved}.save wrote in {str(path)!r}, got {type(error).__name__}: {error}"
        ) from error


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
