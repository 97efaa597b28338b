"""A fit that is killed goes on where it was: its sums on disk, whole or not at all, as often as costs little.

The folder holds ``checkpoint.json``, which is replaced last and names all else; the sums (``sums-….safetensors``,
replaced); and the gradients of single draws (``draws-….safetensors``), which only grow: each file has those since the last
time, none is written again. A fit that goes on adds the same numbers in the same order, so its result is the same to the
last bit on the same machine with as many threads and the same batch size.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bayesdiff.checks import ArgumentError, CheckpointError, PosteriorFileError, check_output_folder
from bayesdiff.data import ImageData, modules_of
from bayesdiff.head.layer import Head
from bayesdiff.io import checksum, read_named, write_json, write_named
from bayesdiff.laplace.statistics import Statistics

FORMAT = 3
_INDEX = "checkpoint.json"
_LOCK = "checkpoint.lock"
_SHARE = 0.02  # of the time may go into writing
_SAMPLED = 1024  # numbers of each tensor of the model that its fingerprint is made of


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit keeps what it has done.

    Args:
        folder: Of its own; made if need be. What is there of the same fit is taken up, of another fit refused.
        seconds: It is written no more often than this, and than costs 2 % of the time; 0 is after every batch.

    Raises:
        ArgumentError: ``folder`` is no path, or ``seconds`` negative or no number.
    """

    folder: str | os.PathLike[str]
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)):
            raise ArgumentError(f"expected a folder for the checkpoint, got {self.folder!r}")
        if (
            isinstance(self.seconds, bool)
            or not isinstance(self.seconds, (int, float))
            or not 0 <= self.seconds < float("inf")
        ):
            raise ArgumentError(f"expected seconds >= 0 between checkpoints, got {self.seconds!r}")


class Journal:
    """A fit's own view of its checkpoint: what was done before, and writing what is.

    Args:
        checkpoint: The settings, a folder, or None for a fit that keeps nothing.
        identity: Returns all that the sums depend on: settings, seed, model, data (:func:`identity`). Values are JSON's.
        device: Where the sums are kept.

    Raises:
        CheckpointError: What is there is damaged, of a fit with another identity (the message says what differs), or another
            process is at it.
        OutputFolderError: The folder cannot be written.
    """

    def __init__(
        self, checkpoint: Checkpoint | str | os.PathLike[str] | None, identity: Callable[[], Mapping[str, Any]],
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        self.settings = checkpoint
        self.images = 0
        self.statistics: Statistics | None = None
        self.head: str | None = None  # where the head was found
        self._draws: list[dict[str, str]] = []
        self._written = 0  # batches of draws that are in files
        self._pause = 0.0
        self._last = time.monotonic()
        self._lock: IO[bytes] | None = None
        if checkpoint is not None:
            self.folder = check_output_folder(checkpoint.folder)
            self._lock = _locked(self.folder)
            try:
                _sweep(self.folder)
                self.identity = json.loads(json.dumps(dict(identity())))
                self._pause = checkpoint.seconds
                self._read(device)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read(self, device: torch.device | str) -> None:
        """Take up what is there."""
        index = self.folder / _INDEX
        if not index.exists():
            return
        try:
            meta = json.loads(index.read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise CheckpointError(
                    f"expected a checkpoint of format {FORMAT} in {str(self.folder)!r}, got {meta['format']!r}"
                )
            if meta["checksum"] != checksum(meta):
                raise CheckpointError(
                    f"expected {_INDEX} in {str(self.folder)!r} as it was written, got another checksum: it is damaged; remove "
                    "the folder to begin again"
                )
            self._compare(meta["identity"])
            sums = self._load(meta["sums"])
            draws = [self._load(entry) for entry in meta["draws"]]
            self.statistics = Statistics.from_state(meta["statistics"], sums, draws, device)
            self.images, self.head, self._draws = int(meta["images"]), str(meta["head"]), list(meta["draws"])
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError, SafetensorError
        ) as error:  # fmt: skip
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"expected a whole checkpoint in {str(self.folder)!r}, got {type(error).__name__}: {error}; remove the folder to "
                "begin again"
            ) from error
        self._written = len(draws)

    def _compare(self, theirs: Mapping[str, Any]) -> None:
        different = [
            f"{key} ({_short(theirs.get(key))} there, {_short(self.identity.get(key))} here)"
            for key in sorted({*theirs, *self.identity})
            if theirs.get(key) != self.identity.get(key)
        ]
        if different:
            raise CheckpointError(
                f"expected the checkpoint of this very fit in {str(self.folder)!r}, got one of another: {', '.join(different)}; "
                "use another folder, or remove this one to begin again"
            )

    def _load(self, entry: Mapping[str, str]) -> dict[str, Tensor]:
        try:
            return read_named(self.folder / Path(entry["file"]).name, entry["sha256"])
        except PosteriorFileError as error:
            raise CheckpointError(
                f"expected {entry['file']} in {str(self.folder)!r} as it was written, got another checksum: it is damaged; "
                "remove the folder to begin again"
            ) from error

    def keep(self, statistics: Statistics | None, head: Head | None, images: int, *, now: bool = False) -> None:
        """Write down that the first ``images`` images are in the ``statistics`` of a head, if it is time to or ``now``.

        Raises:
            OutputFolderError: The folder cannot be written.
        """
        self.images = images
        if self.settings is None or statistics is None or head is None:
            return
        begun = time.monotonic()
        if not now and begun - self._last < self._pause:
            return
        if statistics.num_batches < self._written:  # what was kept of single draws is in a sketch now
            self._draws, self._written = [], 0
        batches = statistics.draws_since(self._written)
        if batches:
            self._draws.append(self._store("draws", batches))
        sums = self._store("sums", statistics.sums())
        index = {
            "format": FORMAT, "images": images, "identity": self.identity, "head": head.path,
            "statistics": statistics.meta(), "sums": sums, "draws": self._draws,
        }  # fmt: skip
        write_json(self.folder / _INDEX, {**index, "checksum": checksum(index)})
        named = {sums["file"], *(entry["file"] for entry in self._draws)}
        for old in [*self.folder.glob("sums-*.safetensors"), *self.folder.glob("draws-*.safetensors")]:
            if old.name not in named:
                old.unlink()
        self._written = statistics.num_batches
        self._last = time.monotonic()
        if self.settings.seconds:
            self._pause = max(self.settings.seconds, (self._last - begun) / _SHARE)

    def _store(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        file, digest = write_named(self.folder, f"draws-{len(self._draws):06d}" if name == "draws" else name, tensors)
        return {"file": file.name, "sha256": digest}


def identity(pipe: Any, data: ImageData, **settings: Any) -> dict[str, Any]:
    """All that the sums of a fit mean, as far as it can be told quickly: settings, model and data.

    Neither the batch size, nor the device, nor the versions: a fit may go on with others, whose rounding differs.
    """
    return {**settings, "model": model_digest(*modules_of(pipe).values()), "data": data.digest()}


def told(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text that is the same in every process: a scheduler's configuration has sets among its private entries."""
    return {str(k): str(model_value(v)) for k, v in sorted(settings.items()) if not str(k).startswith("_")}


def named(choice: Any) -> str | None:
    """A function by its name and what it does, a settings object by what it prints."""
    name = getattr(choice, "__qualname__", None)
    code = getattr(choice, "__code__", None)
    if choice is None or not isinstance(name, str):
        return None if choice is None else repr(choice)
    if not isinstance(code, CodeType):
        return name
    try:
        held = [_plain(cell.cell_contents) for cell in choice.__closure__ or ()]
    except ValueError:  # one of them is empty
        held = []
    said = [_instructions(code), _plain(choice.__defaults__), _plain(choice.__kwdefaults__), held]
    return f"{name} {hashlib.sha256(repr(said).encode()).hexdigest()[:16]}"


def _instructions(code: CodeType) -> list[Any]:
    """What a function does, whatever file and line it stands in."""
    constants = [_instructions(c) if isinstance(c, CodeType) else _plain(c) for c in code.co_consts]
    return [code.co_code.hex(), code.co_names, code.co_varnames, constants]


def _plain(value: Any) -> str:
    """A value as text that is the same in every process; of what is no number, text or tensor the type."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, frozenset):
        return f"({', '.join(sorted(map(_plain, value)))})"
    if isinstance(value, dict):
        return _plain(sorted((str(k), _plain(v)) for k, v in value.items()))
    simple = value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor))
    return str(model_value(value)) if simple else type(value).__qualname__


def model_value(value: Any) -> Any:
    """A tensor by what it holds, and everything else as it is."""
    return [tuple(value.shape), value.detach().flatten()[:_SAMPLED].tolist()] if isinstance(value, Tensor) else value


def model_digest(*modules: nn.Module) -> str:
    """What tells a model from others: names and shapes of all its tensors, and 1,024 numbers of each, evenly spread."""
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, tensor in module.state_dict().items():
            name = name.replace("_orig_mod.", "")  # of a compiled module
            if not isinstance(tensor, Tensor):
                continue
            digest.update(f"{number} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def remove(folder: str | os.PathLike[str]) -> None:
    """Remove the files of a checkpoint, and the folder if it holds nothing else."""
    path = Path(folder)
    _sweep(path)
    for file in [path / _INDEX, path / _LOCK, *path.glob("sums-*.safetensors"), *path.glob("draws-*.safetensors")]:
        file.unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _locked(folder: Path) -> IO[bytes] | None:
    """A file that is locked until it is closed or its process ends, so that no two fits write into one folder.

    Raises:
        CheckpointError: Another has it.
    """
    if importlib.util.find_spec("fcntl") is None:  # Windows
        return None
    fcntl = importlib.import_module("fcntl")
    file = open(folder / _LOCK, "ab")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise CheckpointError(
            f"expected the checkpoint in {str(folder)!r} for this fit alone, got another that is running and writes there: wait "
            "for it, or use another folder"
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return None
    return file


def _sweep(folder: Path) -> None:
    """Remove what a fit that was killed had begun to write."""
    for name in ("sums", "draws", "checkpoint"):
        for file in folder.glob(f".{name}-*"):
            file.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
