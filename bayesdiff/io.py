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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesdiff.checks import PosteriorFileError, ShapeError, check_finite, check_output_folder

#: Bytes of the largest JSON file that is read.
LARGEST_JSON = 2**24
PACKAGES = ("torch", "diffusers", "laplace-torch", "numpy")


@contextmanager
def atomic_path(path: str | os.PathLike[str], named: Callable[[Path], Path] | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``, with its suffix; at the end of the block it takes that name, or that of ``named`` of it.

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
        os.replace(temporary, path if named is None else named(temporary))
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
    checksum(meta)  # fails on what is not JSON before anything is written
    # The file's name carries its content, so name.json, replaced last, always names a complete one.
    final, digest = write_named(path, name, tensors)
    content = {"format": version, "tensors": final.name, "sha256": digest, **meta}
    content["checksum"] = checksum(content)
    write_json(path / f"{name}.json", content)
    for old in path.glob(f"{name}-*.safetensors"):
        if old != final:
            old.unlink()


def write_named(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[Path, str]:
    """Write ``name-….safetensors``, named for its content; its path and its SHA-256. Nothing is copied in memory."""
    found: list[tuple[Path, str]] = []

    def named(file: Path) -> Path:
        digest = digest_of(file)
        found.append((folder / f"{name}-{digest[:16]}.safetensors", digest))
        return found[0][0]

    with atomic_path(folder / f"{name}.safetensors", named) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    return found[0]


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a JSON file says, however it is indented; without the checksum itself.

    Raises:
        ValueError, TypeError: It is not JSON (NaN, infinity, other objects).
    """
    plain = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_folder(folder: str | os.PathLike[str], name: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_folder` wrote; takes no more memory than twice the file's size.

    Raises:
        PosteriorFileError: A file is missing, damaged, truncated or of an unknown version.
    """
    try:
        return _read(Path(folder), name, version)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, RuntimeError) as error:
        if isinstance(error, PosteriorFileError):
            raise
        saved = {"posterior": "LaplacePosterior", "statistics": "Statistics"}.get(name, name)
        raise PosteriorFileError(
            f"expected what {saved}.save wrote in {str(folder)!r}, got {type(error).__name__}: {error}"
        ) from error


def _read(path: Path, name: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    json_file = path / f"{name}.json"
    if json_file.stat().st_size > LARGEST_JSON:
        raise PosteriorFileError(
            f"expected {json_file.name} in {str(path)!r} with at most {LARGEST_JSON} bytes, got more"
        )
    meta = json.loads(json_file.read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or meta["format"] != version:
        raise PosteriorFileError(
            f"expected {name} format {version}, got {meta['format'] if isinstance(meta, dict) else meta!r} in {str(path)!r}: it "
            "was written by another version of bayesdiff; fit again"
        )
    if meta["checksum"] != checksum(meta):
        raise PosteriorFileError(
            f"expected {json_file.name} in {str(path)!r} as it was written, got another checksum: it was edited or is damaged; "
            "change a posterior with recut and save it again"
        )
    file = path / Path(str(meta["tensors"])).name  # in this folder and no other
    return read_named(file, meta["sha256"]), meta


def read_named(file: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a file with this SHA-256; takes twice its size in memory for a time.

    Raises:
        PosteriorFileError: It has another.
        OSError, SafetensorError: It cannot be read.
    """
    if digest_of(file) != digest:
        raise PosteriorFileError(
            f"expected {file.name} in {str(file.parent)!r} to have the checksum that is recorded of it, got another: the "
            "file is damaged or truncated; save it again"
        )
    with safe_open(file, "pt") as tensors:
        # Copied: tensors within the file's bytes are not aligned as others are, and would be summed in another order.
        return {key: tensors.get_tensor(key).clone() for key in tensors.keys()}  # noqa: SIM118


def fitting(name: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of a file, if it has the shape and dtype that it should have and finite numbers.

    Raises:
        ShapeError, NonFiniteError: It has not.
    """
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        raise ShapeError(f"expected {name} as {dtype} {tuple(shape)}, got {value.dtype} {tuple(value.shape)}")
    return check_finite(name, value)


def digest_of(file: Path) -> str:
    """SHA-256 of a file, a piece at a time."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


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
