"""A folder of images in the form that Hugging Face calls ``imagefolder``: what each file is captioned with or belongs to.

One of, in this order:

- ``metadata.jsonl`` or ``metadata.csv`` in the folder: a row for each image, with ``file_name`` (relative to the folder) and
  ``text`` (also ``prompt`` or ``caption``) or ``label`` (a number, or a class's name), or both;
- a text file beside each image (``cat.png``, ``cat.txt``);
- images in folders named for their classes;
- images only.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bayesdiff.checks import ArgumentError, BadImagesError, EmptyDataError

PROMPT_KEYS = ("text", "prompt", "prompts", "caption")
LABEL_KEYS = ("label", "labels", "class_label", "class_labels")
_METADATA = ("metadata.jsonl", "metadata.csv")
_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}
_OTHER = {".csv", ".json", ".jsonl", ".md", ".parquet", ".txt", ".yaml", ".yml"}  # files that lie beside images


@dataclass(frozen=True)
class Entry:
    """One image file, and what the folder says about it."""

    name: str
    path: Path
    text: str | None = None
    label: int | str | None = None


def listed(
    name: str, problems: list[tuple[str, str]], total: int, what: str = "images that can be used"
) -> BadImagesError:
    """One error that lists all that is wrong."""
    lines = ";\n".join(f"  {file}: {why}" for file, why in problems)
    return BadImagesError(f"expected {total} {what} in {name}, got {len(problems)} that cannot be:\n{lines}", problems)


def read_folder_of_images(folder: str | os.PathLike[str]) -> list[Entry]:
    """The images of a folder, sorted by name, with their texts and labels.

    Raises:
        ArgumentError: It is no folder, or one of several splits; metadata have no ``file_name``, or neither text nor label.
        EmptyDataError: There is no image in it.
        BadImagesError: Files are missing, have no row or two, or are of another kind.
    """
    root = Path(folder)
    if not str(folder) or not root.is_dir():
        raise ArgumentError(f"expected a folder of images, got {os.fspath(folder)!r}, which is not there or no folder")
    files = sorted(_files(root, ()), key=lambda p: p.relative_to(root).as_posix())
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = {p.relative_to(root).as_posix(): p for p in files if p.suffix.lower() in known and p.is_file()}
    problems = [(p.relative_to(root).as_posix(), "a link to nothing") for p in files if not p.is_file()]
    problems += [
        (p.relative_to(root).as_posix(), "no image by its name")
        for p in files
        if p.suffix.lower() not in known | _OTHER
        and p.name.upper() not in ("LICENSE", "LICENCE", "README")
        and p.is_file()
    ]
    splits = {Path(name).parts[0] for name in images if len(Path(name).parts) > 1}
    if splits and splits <= _SPLITS and all(len(Path(name).parts) > 1 for name in images):
        one = root / sorted(splits)[0]
        if len(splits) > 1:
            raise ArgumentError(
                f"expected one split of a data set, got {', '.join(sorted(splits))} in {str(root)!r}: give one"
            )
        return read_folder_of_images(one)
    metadata = [root / name for name in _METADATA if (root / name).is_file()]
    if (root / "metadata.parquet").is_file():
        raise ArgumentError(
            f"expected metadata.jsonl or metadata.csv in {str(root)!r}, got metadata.parquet: convert it"
        )
    if len(metadata) > 1:
        raise ArgumentError(f"expected one of {' and '.join(_METADATA)} in {str(root)!r}, got both")
    nested = [p for p in files if p.name in _METADATA and p.parent != root]
    if nested and not metadata:
        place = nested[0].relative_to(root).as_posix()
        raise ArgumentError(
            f"expected metadata in {str(root)!r} itself, got {place!r}: give that folder, or move its rows up"
        )
    if not images and not metadata:
        raise EmptyDataError(f"expected images in {str(root)!r}, got none among {len(files)} files")
    entries = _by_metadata(metadata[0], images, problems) if metadata else _without_metadata(images, problems)
    if problems:
        raise listed(repr(str(root)), sorted(problems), max(len(images), len(entries)))
    if not entries:
        raise EmptyDataError(f"expected rows in {metadata[0].name} of {str(root)!r}, got none")
    return entries


def _files(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """All files in a folder that are not hidden, links followed but into a folder that they lie in; links to nothing, too.

    Raises:
        ArgumentError: A folder cannot be read.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        entries = [e for e in folder.iterdir() if not e.name.startswith(".")]
    except OSError as error:
        raise ArgumentError(f"expected folders that can be read, got {str(folder)!r}: {error.strerror}") from error
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry, (*above, here))
        elif entry.is_file() or entry.is_symlink():
            yield entry


def _by_metadata(path: Path, images: dict[str, Path], problems: list[tuple[str, str]]) -> list[Entry]:
    """In the order of the rows."""
    entries: dict[str, Entry] = {}
    rows = list(_rows(path))
    columns: dict[str, None] = {key: None for row in rows for key in row if key is not None}
    if rows and "file_name" not in columns:
        raise ArgumentError(f"expected the column file_name in {str(path)!r}, got {', '.join(columns)}")
    text = next((key for key in PROMPT_KEYS if key in columns), None)
    label = next((key for key in LABEL_KEYS if key in columns), None)
    composed = {unicodedata.normalize("NFC", name): name for name in images}  # some systems write é as e and an accent
    if rows and len(columns) > 1 and text is None and label is None:
        raise ArgumentError(f"expected a column text or label in {str(path)!r}, got {', '.join(columns)}")
    for number, row in enumerate(rows, 1):
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            problems.append((f"row {number} of {path.name}", "no file_name"))
            continue
        if None in row:  # what the CSV reader has left
            problems.append((name, f"more cells than columns in {path.name}: texts with commas must be in quotes"))
        name = Path(os.path.normpath(name)).as_posix()
        name = name if name in images else composed.get(unicodedata.normalize("NFC", name), name)
        if name in entries:
            problems.append((name, "two rows in the metadata"))
        elif name not in images:
            there = (path.parent / name).is_file()
            outside = Path(name).is_absolute() or name.startswith("..")
            why = "no image by its name" if there else "a row in the metadata, but no such file"
            problems.append((name, "not in the folder: file_name is relative to it" if outside else why))
        else:
            said, kind = row.get(text) if text else None, row.get(label) if label else None
            if text and not isinstance(said, str):
                problems.append((name, f"no text in column {text!r}"))
            if label and (kind is None or kind == "" or isinstance(kind, (float, bool, list, dict))):
                problems.append((name, f"no label in column {label!r}, which takes an integer or a class's name"))
            entries[name] = Entry(name, images[name], said, _label(kind))
    told = {name for name, _ in problems}
    problems += [(name, f"no row in {path.name}") for name in images if name not in entries and name not in told]
    return list(entries.values())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file, strict=True)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is no object")
                    yield row
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ArgumentError(f"expected {path.suffix[1:]} in {str(path)!r}, got what cannot be read: {error}") from error


def _label(kind: Any) -> int | str | None:
    """A number, also where a CSV file has it as text."""
    return int(kind) if isinstance(kind, str) and kind.isdecimal() else kind


def _without_metadata(images: dict[str, Path], problems: list[tuple[str, str]]) -> list[Entry]:
    texts = {name: path.with_suffix(".txt") for name, path in images.items() if path.with_suffix(".txt").is_file()}
    if texts:
        problems += [(name, "no text file beside it, as others have") for name in images if name not in texts]
        out = []
        for name, path in images.items():
            try:
                said = texts[name].read_text(encoding="utf-8").strip() if name in texts else ""
            except (OSError, ValueError) as error:
                problems.append((name, f"its text file cannot be read: {error}"))
                said = ""
            out.append(Entry(name, path, said))
        return out
    folders = {name: Path(name).parts[:-1] for name in images}
    if not any(folders.values()):
        return [Entry(name, path) for name, path in images.items()]
    problems += [(name, "in no class's folder, as others are") for name, parts in folders.items() if not parts]
    return [Entry(name, path, None, folders[name][-1] if folders[name] else "") for name, path in images.items()]
