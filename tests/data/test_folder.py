"""Folders of images: what belongs to each file, and one error for all that is wrong."""

from __future__ import annotations

import json
from itertools import chain

import pytest
import torch
from PIL import Image

from bayesdiff.checks import ArgumentError, BadImagesError, BayesdiffWarning, EmptyDataError, UnknownNameError
from bayesdiff.data import Framing, open_images
from bayesdiff.data.folder import read_folder_of_images
from tests.data.conftest import pictures, write

FRAMING = Framing(size=8, channels=3)


def whole(data):
    batches = list(data.batches(2))
    images = torch.cat([images for images, _ in batches])
    rest = {}
    for key in batches[0][1]:
        values = [rest[key] for _, rest in batches]
        rest[key] = torch.cat(values) if isinstance(values[0], torch.Tensor) else list(chain.from_iterable(values))
    return images, rest


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_with_text(folder, kind):
    texts = ["a sea, with waves", "a coast", "an island", "ice", 'a "desert"' if kind == "jsonl" else "a desert"]
    images = pictures()
    write(folder, images, [{"text": t} for t in texts], kind)
    out, rest = whole(open_images(folder, None, FRAMING))
    assert rest == {"prompts": texts}
    assert torch.equal(out, torch.stack([FRAMING.picture(image) for image in images]))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_with_labels(folder, kind):
    write(folder, pictures(), [{"label": i} for i in (3, 0, 2, 2, 1)], kind)
    _, rest = whole(open_images(folder, None, FRAMING))
    assert rest["class_labels"].tolist() == [3, 0, 2, 2, 1]
    assert rest["class_labels"].dtype == torch.int64


def test_labels_by_name_are_the_models_numbers(folder):
    write(folder, pictures(n=3), [{"label": c} for c in ("Cat", "sea lion", "cat")])
    data = open_images(folder, None, FRAMING, names={"dog": 0, "cat": 7, "sea_lion": 3})
    assert whole(data)[1]["class_labels"].tolist() == [7, 3, 7]
    with pytest.raises(UnknownNameError, match=r"got 'Cat' \(did you mean 'bat'\?\), 'cat'.*, 'sea lion'"):
        open_images(folder, None, FRAMING, names={"bat": 0})


def test_folders_are_classes_in_the_order_of_their_names(folder):
    for name in ("zebra", "ant"):
        write(folder / name, pictures(n=2))
    with pytest.warns(BayesdiffWarning, match="in the order of their names: 'ant' 0, 'zebra' 1"):
        _, rest = whole(open_images(folder, None, FRAMING))
    assert rest["class_labels"].tolist() == [0, 0, 1, 1]


def test_folders_that_are_numbers_must_be_in_order(folder):
    for name in ("0", "1", "2", "10"):
        write(folder / name, pictures(n=1))
    with pytest.raises(ArgumentError, match="'10' 2, '2' 3: give each image its number"):
        open_images(folder, None, FRAMING)
    (folder / "10").rename(folder / "3")
    with pytest.warns(BayesdiffWarning):
        assert whole(open_images(folder, None, FRAMING))[1]["class_labels"].tolist() == [0, 1, 2, 3]


def test_links_are_followed(folder, tmp_path):
    write(folder / "cat", pictures(n=1))
    write(tmp_path / "elsewhere", pictures(n=2))
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "again").symlink_to(folder)
    assert [e.label for e in read_folder_of_images(folder)] == ["cat", "dog", "dog"]
    (folder / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BadImagesError, match=r"dog/gone\.png: a link to nothing"):
        open_images(folder, None, FRAMING)


def test_names_in_the_metadata_that_are_written_otherwise(folder):
    write(folder, pictures(n=3))
    (folder / "1.png").rename(folder / "cafe\u0301.png")
    rows = [{"file_name": n, "text": "a"} for n in ("./0.png", "caf\u00e9.png", "x/../2.png")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_folder_of_images(folder)) == 3
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": str(folder / "0.png"), "text": "a"}))
    with pytest.raises(BadImagesError, match="not in the folder: file_name is relative to it"):
        read_folder_of_images(folder)


def test_a_caption_with_commas_that_is_not_quoted(folder):
    write(folder, pictures(n=1))
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a sea, with waves\n")
    with pytest.raises(
        BadImagesError, match=r"more cells than columns in metadata\.csv: texts with commas must be in quotes"
    ):
        open_images(folder, None, FRAMING)


def test_a_transparent_colour(folder):
    image = pictures(n=1)[0]
    image.putpixel((0, 0), (1, 2, 3))
    folder.mkdir()
    image.save(folder / "0.png", transparency=(1, 2, 3))
    with pytest.raises(BadImagesError, match="with a transparent colour"):
        open_images(folder, None, Framing(channels=3))
    (out,) = next(open_images(folder, None, Framing(channels=3, convert=True)).batches(1))[0]
    assert out[:, 0, 0].tolist() == [1, 1, 1]


def test_text_files_beside_images(folder):
    write(folder, pictures(n=2))
    (folder / "0.txt").write_text("a sea\n")
    with pytest.raises(BadImagesError, match=r"1\.png: no text file beside it"):
        open_images(folder, None, FRAMING)
    (folder / "1.txt").write_text("ice")
    assert whole(open_images(folder, None, FRAMING))[1] == {"prompts": ["a sea", "ice"]}


def test_images_alone_are_sorted_and_other_files_are_no_matter(folder):
    write(folder, pictures(n=3))
    (folder / "README.md").write_text("what these are")
    (folder / ".DS_Store").write_bytes(b"\0")
    entries = read_folder_of_images(folder)
    assert [e.name for e in entries] == ["0.png", "1.png", "2.png"]
    assert whole(open_images(folder, None, FRAMING))[1] == {}


def test_one_split_is_taken_of_two_none(folder):
    write(folder / "train", pictures(n=2), [{"text": "a"}, {"text": "b"}])
    assert whole(open_images(folder, None, FRAMING))[1] == {"prompts": ["a", "b"]}
    write(folder / "test", pictures(n=1))
    with pytest.raises(ArgumentError, match="one split of a data set, got test, train"):
        open_images(folder, None, FRAMING)


def test_all_that_is_wrong_is_in_one_error(folder):
    write(folder, pictures(n=4))
    whole_png = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole_png[: len(whole_png) // 2])
    (folder / "fake.jpg").write_bytes(b"no image")
    Image.new("L", (16, 16)).save(folder / "grey.png")
    Image.new("RGBA", (16, 16)).save(folder / "clear.png")
    Image.new("RGB", (7, 16)).save(folder / "tiny.png")
    with pytest.raises(BadImagesError) as caught:
        open_images(folder, None, FRAMING)
    assert [name for name, _ in caught.value.problems] == ["clear.png", "cut.png", "fake.jpg", "grey.png", "tiny.png"]
    message = str(caught.value)
    assert "expected 9 images that can be used" in message
    assert "got 5 that cannot be" in message
    for words in ("with transparency (RGBA)", "cut.png: cannot be read", "fake.jpg: cannot be read", "grey, expected coloured",
                  "7 × 16, smaller than 8 × 8"):  # fmt: skip
        assert words in message
    assert str(folder) not in message.split("\n", 1)[1]  # names are relative
    with pytest.raises(BadImagesError) as caught:
        open_images(folder, None, Framing(size=8, channels=3, convert=True))
    assert [name for name, _ in caught.value.problems] == ["cut.png", "fake.jpg", "tiny.png"]


def test_metadata_and_files_must_be_of_each_other(folder):
    write(folder, pictures(n=3), [{"text": "a"}, {"text": ""}, {"text": 3}])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n{"file_name": "0.png", "text": "y"}\n{"text": "z"}\n')
    pictures(n=1)[0].save(folder / "extra.png")
    (folder / "clip.mp4").write_bytes(b"")
    with pytest.raises(BadImagesError) as caught:
        open_images(folder, None, FRAMING)
    assert dict(caught.value.problems) == {
        "0.png": "two rows in the metadata",
        "2.png": "no text in column 'text'",
        "clip.mp4": "no image by its name",
        "extra.png": "no row in metadata.jsonl",
        "gone.png": "a row in the metadata, but no such file",
        "row 6 of metadata.jsonl": "no file_name",
    }


def test_empty_and_missing_folders(folder):
    with pytest.raises(ArgumentError, match="expected a folder of images"):
        open_images(folder)
    folder.mkdir()
    with pytest.raises(EmptyDataError, match="got none among 0 files"):
        open_images(folder)
    (folder / "notes.md").write_text("")
    with pytest.raises(EmptyDataError, match="got none among 1 files"):
        open_images(folder)
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(EmptyDataError, match=r"rows in metadata\.jsonl"):
        open_images(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file": "0.png"}\n', "the column file_name"),
        ("metadata.jsonl", '{"file_name": "0.png", "colour": "red"}\n', "a column text or label"),
        ("metadata.jsonl", "not json\n", "cannot be read"),
        ("metadata.jsonl", "[1]\n", "line 1 is no object"),
        ("metadata.csv", 'file_name,text\n"0.png,a', "cannot be read"),
        ("metadata.parquet", "PAR1", "got metadata.parquet"),
    ],
)
def test_metadata_that_cannot_be_used(folder, name, text, message):
    write(folder, pictures(n=1))
    (folder / name).write_text(text)
    with pytest.raises(ArgumentError, match=message):
        open_images(folder, None, FRAMING)


def test_two_metadata_files_and_nested_ones(folder):
    write(folder, pictures(n=1), [{"text": "a"}])
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    with pytest.raises(ArgumentError, match="got both"):
        open_images(folder, None, FRAMING)
    other = folder.parent / "other"
    write(other / "sub", pictures(n=1), [{"text": "a"}])
    pictures(n=1)[0].save(other / "0.png")
    with pytest.raises(ArgumentError, match=r"got 'sub/metadata\.jsonl'"):
        open_images(other, None, FRAMING)


def test_the_digest_knows_names_sizes_and_texts(folder):
    write(folder, pictures(n=3), [{"text": t} for t in "abc"])
    digests = [open_images(folder, None, FRAMING).digest()]
    assert open_images(folder, None, FRAMING).digest() == digests[0]
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1]["text"] = "B"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    digests.append(open_images(folder, None, FRAMING).digest())
    digests.append(open_images(folder, ["x", "y", "z"], FRAMING).digest())
    assert len(set(digests)) == 3
