"""One result however the images come, from any image on, and errors by name."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bayesdiff.checks import (
    ArgumentError,
    BadImagesError,
    BayesdiffWarning,
    NonFiniteError,
    ShapeError,
    UnknownNameError,
)
from bayesdiff.data import Framing, open_images
from bayesdiff.data.model import framing_of, resolution
from tests.data.conftest import pictures, pixels, write
from tests.pipelines.build import CASES

N = 5
FRAMING = Framing(size=8, channels=3)
TEXTS = ["a sea", "a coast", "an island", "ice", "a desert"]
LABELS = [3, 0, 2, 2, 1]
EXPECTED = torch.stack([FRAMING.picture(image) for image in pictures()])


class Stored(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Streamed(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def table(**columns):
    datasets = pytest.importorskip("datasets")
    out = datasets.Dataset.from_dict({"image": pictures(), **columns})
    return out.cast_column("image", datasets.Image())


def files(tmp_path, **kwargs):
    return write(
        tmp_path / "images",
        pictures(),
        [dict(zip(kwargs, row, strict=True)) for row in zip(*kwargs.values(), strict=True)],
    )


ALONE = {
    "pil": lambda _: pictures(),
    "tuple-of-pil": lambda _: tuple(pictures()),
    "arrays": lambda _: list(pixels()),
    "array": lambda _: pixels(),
    "tensor": lambda _: torch.from_numpy(pixels()).movedim(-1, 1),
    "tensors": lambda _: list(torch.from_numpy(pixels()).movedim(-1, 1)),
    "dataset": lambda _: Stored(pictures()),
    "dataset-of-tuples": lambda _: Stored([(p,) for p in pictures()]),
    "stream": lambda _: Streamed(pictures()),
    "mapping": lambda _: {"images": pixels()},
    "mapping-of-pil": lambda _: {"image": pictures()},
    "table": lambda _: table(),
    "table-stream": lambda _: table().to_iterable_dataset(),
    "folder": lambda tmp: write(tmp / "images", pictures()),
    "folder-by-text": lambda tmp: str(write(tmp / "images", pictures())),
    "files": lambda tmp: sorted(write(tmp / "images", pictures()).glob("*.png")),
    "batches": lambda _: [pixels()[:2], pixels()[2:]],
    "generator-of-batches": lambda _: (pixels()[i : i + 2] for i in (0, 2, 4)),
    "again": lambda _: open_images(pictures(), None, FRAMING),
}  # fmt: skip
WITH_TEXT = {
    "pairs": lambda _: list(zip(pictures(), TEXTS, strict=True)),
    "mappings": lambda _: [{"image": p, "text": t} for p, t in zip(pictures(), TEXTS, strict=True)],
    "dataset-of-pairs": lambda _: Stored(list(zip(pictures(), TEXTS, strict=True))),
    "dataset-of-mappings": lambda _: Stored([{"pixel_values": p, "caption": t} for p, t in zip(pictures(), TEXTS, strict=True)]),
    "stream": lambda _: Streamed(list(zip(pictures(), TEXTS, strict=True))),
    "mapping": lambda _: {"images": pixels(), "prompts": TEXTS},
    "mapping-of-pil": lambda _: {"images": pictures(), "text": TEXTS},
    "table": lambda _: table(text=TEXTS, url=list("abcde"), width=[16] * N),
    "table-stream": lambda _: table(text=TEXTS).to_iterable_dataset(),
    "folder": lambda tmp: files(tmp, text=TEXTS),
    "batches": lambda _: [(pixels()[:2], TEXTS[:2]), (pixels()[2:], TEXTS[2:])],
    "loader": lambda _: DataLoader(
        Stored([{"images": torch.from_numpy(a).movedim(-1, 0), "text": t} for a, t in zip(pixels(), TEXTS, strict=True)]),
        batch_size=2,
    ),
}  # fmt: skip
WITH_LABELS = {
    "pairs": lambda _: list(zip(pictures(), LABELS, strict=True)),
    "mappings": lambda _: [{"image": p, "label": i} for p, i in zip(pictures(), LABELS, strict=True)],
    "dataset-of-pairs": lambda _: Stored(list(zip(pictures(), torch.tensor(LABELS), strict=True))),
    "tensors": lambda _: TensorDataset(torch.from_numpy(pixels()).movedim(-1, 1), torch.tensor(LABELS)),
    "mapping": lambda _: {"images": pixels(), "class_labels": np.array(LABELS)},
    "table": lambda _: table(label=LABELS),
    "folder": lambda tmp: files(tmp, label=LABELS),
    "loader": lambda _: DataLoader(
        TensorDataset(torch.from_numpy(pixels()).movedim(-1, 1), torch.tensor(LABELS)), batch_size=3
    ),
}  # fmt: skip


def whole(data, size=2, first=0):
    batches = list(data.batches(size, first))
    images = torch.cat([images for images, _ in batches])
    rest = {}
    for key in batches[0][1]:
        values = [rest[key] for _, rest in batches]
        rest[key] = (
            torch.cat(values).tolist() if isinstance(values[0], torch.Tensor) else list(chain.from_iterable(values))
        )
    return images, rest


@pytest.mark.parametrize("form", ALONE)
def test_images_are_the_same_in_every_form(form, tmp_path):
    images, rest = whole(open_images(ALONE[form](tmp_path), None, FRAMING))
    assert rest == {}
    assert images.dtype == torch.float32
    assert torch.equal(images, EXPECTED)


@pytest.mark.parametrize("form", WITH_TEXT)
def test_captions_stay_with_their_images(form, tmp_path):
    images, rest = whole(open_images(WITH_TEXT[form](tmp_path), None, FRAMING))
    assert rest == {"prompts": TEXTS}
    assert torch.equal(images, EXPECTED)


@pytest.mark.parametrize("form", WITH_LABELS)
def test_labels_stay_with_their_images(form, tmp_path):
    images, rest = whole(open_images(WITH_LABELS[form](tmp_path), None, FRAMING))
    assert rest == {"class_labels": LABELS}
    assert torch.equal(images, EXPECTED)


@pytest.mark.parametrize("form", ["pil", "array", "dataset", "stream", "table", "table-stream", "folder", "batches"])
def test_batches_begin_at_any_image(form, tmp_path):
    data = open_images(ALONE[form](tmp_path), TEXTS, FRAMING)
    images, rest = whole(data, 2, 2)
    assert torch.equal(images, EXPECTED[2:])
    assert rest == {"prompts": TEXTS[2:]}
    assert data.length in (N, None)
    if data.length is None:
        with pytest.raises(TypeError):
            len(data)
    else:
        assert len(data) == N


@pytest.mark.parametrize("form", ["pil", "array", "folder", "stream"])
def test_prompts_given_apart_count(form, tmp_path):
    own = {**WITH_TEXT, **ALONE}[form](tmp_path)
    assert whole(open_images(own, [t.upper() for t in TEXTS], FRAMING))[1]["prompts"] == [t.upper() for t in TEXTS]
    assert whole(open_images(own, LABELS, FRAMING))[1]["class_labels"] == LABELS
    assert whole(open_images(own, torch.tensor(LABELS), FRAMING))[1]["class_labels"] == LABELS


@pytest.mark.parametrize("form", ["pil", "stream", "batches"])
@pytest.mark.parametrize("prompts", [TEXTS[:4], [*TEXTS, "more"]])
def test_as_many_prompts_as_images(form, prompts, tmp_path):
    with pytest.raises(ArgumentError, match=f"got {len(prompts)}"):
        whole(open_images(ALONE[form](tmp_path), prompts, FRAMING))


def test_names_of_a_tables_classes_are_the_models():
    datasets = pytest.importorskip("datasets")
    data = table(label=[0, 1, 1, 0, 1]).cast_column("label", datasets.ClassLabel(names=["sea", "ice"]))
    assert whole(open_images(data, None, FRAMING))[1]["class_labels"] == [0, 1, 1, 0, 1]
    named = open_images(data, None, FRAMING, names={"ice": 4, "Sea": 9})
    assert whole(named)[1]["class_labels"] == [9, 4, 4, 9, 4]
    with pytest.raises(UnknownNameError, match="got 'ice'"):
        whole(open_images(data, None, FRAMING, names={"sea": 0}))


def test_columns_of_tensors_reach_the_network():
    extra = np.arange(N * 3, dtype=np.float32).reshape(N, 3)
    data = table(embedding=list(extra)).with_format("torch", columns=["embedding"], output_all_columns=True)
    _, rest = whole(open_images(data, None, FRAMING))
    assert rest == {"embedding": extra.tolist()}
    _, rest = whole(
        open_images([{"image": p, "embedding": e} for p, e in zip(pictures(), extra, strict=True)], None, FRAMING)
    )
    assert rest == {"embedding": extra.tolist()}


def test_torchs_own_generator_is_left_alone():
    class Random(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return torch.rand(3, 8, 8) * 2 - 1

    before = torch.get_rng_state()
    open_images(Random(), None, FRAMING).digest()
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_pictures_in_lists_and_tables_are_all_listed():
    images = pictures()
    images[1] = images[1].convert("L")
    images[3] = images[3].convert("RGBA")
    with pytest.raises(BadImagesError, match=r"(?s)image 1: grey.*image 3: with transparency"):
        open_images(images, None, FRAMING)
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": b"no image", "path": None}, {"bytes": b"", "path": None}]
    broken = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(BadImagesError, match=r"(?s)image 0: cannot be read.*image 1: cannot be read"):
        open_images(broken, None, FRAMING)
    with pytest.raises(ArgumentError, match="number 1: grey"):
        whole(open_images(Stored(images), None, FRAMING))


def test_a_range_that_cannot_be_right():
    x = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for form in (x, x.numpy(), list(x), Stored(x), Streamed(x), [x[:2], x[2:]], {"images": x}):
        with pytest.raises(ArgumentError, match=r"value_range=\(0, 1\)"):
            whole(open_images(form, None, FRAMING))
        kind = Framing(size=8, channels=3, value_range=(0, 1))
        torch.testing.assert_close(whole(open_images(form, None, kind))[0], 2 * x - 1)


BAD = {
    "one-picture": (lambda: pictures()[0], ArgumentError, "put it into a list"),
    "splits": (lambda: {"train": table(), "test": table()}, ArgumentError, "one split of a data set, got train, test"),
    "no-image-column": (lambda: table().rename_column("image", "photo"), ArgumentError, "the key 'images'"),
    "two-images": (lambda: {"image": pixels(), "img": pixels()}, ArgumentError, "the key 'images'"),
    "two-captions": (lambda: [{"image": p, "text": "a", "caption": "b"} for p in pictures()], ArgumentError, "of a kind"),
    "sizes": (lambda: [torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], ShapeError, "images of one size"),
    "not-all-have-text": (lambda: [(pictures()[0], "a"), (pictures()[1],)], ArgumentError, "the same beside every image"),
    "rows": (lambda: {"images": pixels(), "class_labels": [1, 2]}, ShapeError, "5 rows of 'class_labels'"),
    "rows-of-pil": (lambda: {"images": pictures(), "prompts": ["a"]}, ArgumentError, "5 of each beside the images"),
    "nan": (lambda: torch.full((2, 3, 8, 8), float("nan")), NonFiniteError, "NaN"),
    "path-that-is-a-file": (lambda: __file__, ArgumentError, "a folder of images"),
    "missing-file": (lambda: ["nowhere.png"], BadImagesError, "nowhere.png: cannot be read"),
    "float-labels": (lambda: [(p, 0.5) for p in pictures()], ArgumentError, "integer label"),
    "objects": (lambda: [object()], ArgumentError, "got object"),
    "endless": (lambda: type("Endless", (Dataset,), {"__getitem__": lambda s, i: i})(), ArgumentError, "which has none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_data(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        whole(open_images(make(), None, Framing(channels=3)))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(["a", 3], "got int as number 1"), (7, "a list of prompts"),
     (torch.ones(5), "labels as integers"), (torch.ones(5, 1).long(), "labels as integers")],
)  # fmt: skip
def test_bad_prompts(prompts, message):
    with pytest.raises(ArgumentError, match=message):
        open_images(pictures(n=2), prompts, FRAMING)


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [("sd-ddim-guided", 16, 3), ("if", 8, 3), ("ddim-pixels", 8, 3), ("sd3", 16, 3), ("dit", 16, 3)],
)
def test_the_model_says_what_it_takes(name, size, channels):
    case = next(c for c in CASES if c.name.startswith(name))
    pipe = case.make()
    network = getattr(pipe, "unet", None) or pipe.transformer
    assert resolution(pipe, network) == (size, size)
    framing = framing_of(pipe, network)
    assert (framing.size, framing.channels, framing.arrays_too) == ((size, size), channels, False)
    assert framing_of(pipe, network, 4, (0, 1), True) == Framing(4, channels, (0, 1), True)


def test_one_line():
    assert repr(open_images(pictures(), None, FRAMING)) == "ImageData(items, 5 images)"


NAMED = ["ice", "sea", "sea", "coast", "ice"]
NUMBERED = [1, 2, 2, 0, 1]


@pytest.mark.parametrize(
    "form",
    [
        lambda: [{"image": p, "label": c} for p, c in zip(pictures(), NAMED, strict=True)],
        lambda: {"images": pictures(), "label": NAMED},
        lambda: {"images": pixels(), "label": np.array(NAMED)},
    ],
)
def test_names_of_classes_are_one_numbering_for_all_batches(form):
    with pytest.warns(BayesdiffWarning, match="'coast' 0, 'ice' 1, 'sea' 2"):
        data = open_images(form(), None, FRAMING)
    assert whole(data)[1]["class_labels"] == NUMBERED
    assert whole(open_images(form(), None, FRAMING, names={"sea": 5, "coast": 7, "ice": 9}))[1]["class_labels"] == [
        9, 5, 5, 7, 9,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [Stored, Streamed])
def test_names_of_classes_that_come_one_by_one_are_not_numbered(kind):
    items = [{"image": p, "label": c} for p, c in zip(pictures(), NAMED, strict=True)]
    with pytest.raises(ArgumentError, match="numbers where the model names no classes, got 'ice'"):
        whole(open_images(kind(items), None, FRAMING))


def test_files_beside_what_belongs_to_them(tmp_path):
    folder = write(tmp_path / "images", pictures())
    names = [folder / f"{i}.png" for i in range(N)]
    forms = (
        list(zip(map(str, names), TEXTS, strict=True)), {"images": names, "prompts": TEXTS},
        [{"image": str(n), "text": t} for n, t in zip(names, TEXTS, strict=True)],
        Stored(list(zip(names, TEXTS, strict=True))), iter(list(zip(pictures(), TEXTS, strict=True))),
    )  # fmt: skip
    for form in forms:
        out, rest = whole(open_images(form, None, FRAMING))
        assert torch.equal(out, EXPECTED)
        assert rest == {"prompts": TEXTS}
    with pytest.raises(BadImagesError, match="image 1: cannot be read"):
        open_images([(str(names[0]), "a"), ("gone.png", "b")], None, FRAMING)


def test_batches_that_are_lists_of_pictures():
    for size in (2, 3):
        batches = [pictures()[i : i + size] for i in range(0, N, size)]
        for form in (batches, iter(batches)):
            assert torch.equal(whole(open_images(form, None, FRAMING))[0], EXPECTED)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda: [(p, None) for p in pictures()], "a caption or an integer label"),
        (
            lambda: Stored([{"image": p, "label": i or None} for i, p in enumerate(pictures())]),
            "got None .* as number 0",
        ),
        (lambda: [{"image": p, "label": 10**30} for p in pictures()], "integers or names of classes"),
        (lambda: {"images": "photos"}, "an array or tensor, a list of images or of files, got str"),
        (lambda: np.array([None, 1], dtype=object), "arrays of numbers, got object"),
        (lambda: [[*pictures()[:1], None]], "beside an image, got NoneType"),
    ],
)
def test_what_is_no_image_or_label(form, message):
    with pytest.raises(ArgumentError, match=message):
        whole(open_images(form(), None, FRAMING))


def test_arrays_and_prompts_of_other_kinds():
    x = np.linspace(-1, 1, N * 3 * 64, dtype=np.float32).reshape(N, 3, 8, 8)
    assert torch.equal(whole(open_images(x.astype(">f4"), None, FRAMING))[0], torch.from_numpy(x))
    assert whole(open_images(x, np.array(TEXTS), FRAMING))[1] == {"prompts": TEXTS}
    assert whole(open_images(x, list(np.array(LABELS)), FRAMING))[1] == {"class_labels": LABELS}
    assert whole(open_images([(p, np.int64(i)) for i, p in enumerate(x)], None, FRAMING))[1] == {
        "class_labels": list(range(N))
    }
