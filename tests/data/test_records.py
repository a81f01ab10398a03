"""insightface's .rec: packed here by an independent writer, as MXNet packs it."""

import io
import struct

import numpy as np
import pytest
import torch

from data.image_folder import decode_image, image_folder
from data.records import list_records
from tests.data.conftest import SIZE, noise
from util.runtime.errors import RunError, UsageError

MAGIC = struct.pack("<I", 0xCED7230A)


def jpeg(seed, comment=b""):
    file = io.BytesIO()
    noise(seed).save(file, "JPEG", comment=comment)
    return file.getvalue()


def record(content: bytes) -> bytes:
    """Cut wherever the magic stands at a multiple of four, as dmlc-core does."""
    cuts = [at for at in range(0, len(content) - 3, 4) if content[at : at + 4] == MAGIC]
    starts, ends = [0, *(at + 4 for at in cuts)], [*cuts, len(content)]
    written = b""
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        kind = 0 if not cuts else 1 if number == 0 else 3 if number == len(cuts) else 2
        part = content[start:end]
        written += MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
    return written


def packed(label, image, number):
    if isinstance(label, (int, float)):
        return struct.pack("<IfQQ", 0, label, number, 0) + image
    return struct.pack(f"<IfQQ{len(label)}f", len(label), 0, number, 0, *label) + image


def write(path, contents):
    """`contents`: (label or labels, image) of the records from 0."""
    body, lines = b"", []
    for number, (label, image) in enumerate(contents):
        lines.append(f"{number}\t{len(body)}\n")
        body += record(packed(label, image, number))
    path.write_bytes(body)
    path.with_suffix(".idx").write_text("".join(lines))
    return path


LABELS = [0, 0, 0, 2, 2, 2, 10, 10, 10]
PICTURES = [jpeg(seed) for seed in range(9)]


def insightface(many_labels):
    """Record 0: where the identities begin and end; the images; an identity each, with its range."""
    images = [([label, 1] if many_labels else label, image) for label, image in zip(LABELS, PICTURES, strict=True)]
    return [([10, 13], b""), *images, *(([1 + 3 * i, 4 + 3 * i], b"") for i in range(3))]


@pytest.mark.parametrize("kind", ["ranges", "labels", "plain"])
def test_images_and_labels(kind, tmp_path):
    contents = list(zip(LABELS, PICTURES, strict=True)) if kind == "plain" else insightface(kind == "labels")
    path = write(tmp_path / "train.rec", contents)
    train, held = image_folder(path, SIZE, tmp_path / "cache", 0.3)
    assert train.classes == held.classes == ("0", "10", "2")
    assert sorted(train.labels.tolist()) == [0, 0, 1, 1, 2, 2] and sorted(held.labels.tolist()) == [0, 1, 2]
    seen = set()
    for images in (train, held):
        for pixels, label, file in zip(images.images, images.labels, images.files, strict=True):
            name, key = file.split("/")
            position = int(key) - (kind != "plain")
            seen.add(position)
            assert name == images.classes[label] == str(LABELS[position])
            assert np.array_equal(pixels, decode_image(io.BytesIO(PICTURES[position]), SIZE))
    assert seen == set(range(9))
    again, _ = image_folder(path, SIZE, tmp_path / "cache", 0.3)
    assert torch.equal(again.images, train.images) and again.digests == train.digests
    other, _ = image_folder(path, SIZE, tmp_path / "cache", 0.6)
    assert len(other) == 3


def test_an_image_with_the_magic_in_it_is_cut_and_joined(tmp_path):
    comment = b"".join(MAGIC * 3 + b"x" * shift for shift in range(1, 5))  # at every place of four
    pictures = [jpeg(seed, comment) for seed in range(4)]
    path = write(tmp_path / "a.rec", list(zip([0, 0, 1, 1], pictures, strict=True)))
    listed = list_records(path)
    assert struct.unpack("<I", path.read_bytes()[4:8])[0] >> 29 == 1
    assert [listed.read(i) for i in range(4)] == pictures


def damaged_magic(path):
    path.write_bytes(b"RIFF" + path.read_bytes()[4:])


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def of_another(path):
    path.with_suffix(".idx").write_text("0\t0\n1\t4\n")


def far_away(path):
    path.with_suffix(".idx").write_text("0\t0\n1\t999999999996\n")


def before_the_file(path):
    path.with_suffix(".idx").write_text("0\t0\n1\t-64\n")


def no_numbers(path):
    path.with_suffix(".idx").write_text("0\tx\n")


def odd_count(path):
    path.with_suffix(".idx").write_text("0\t0\n1")


def emptied(path):
    path.write_bytes(b"")


def without_index(path):
    path.with_suffix(".idx").write_text("")


def one_class(path):
    write(path, [(3, image) for image in PICTURES])


def half_labels(path):
    write(path, [(0.5 * n, image) for n, image in enumerate(PICTURES)])


@pytest.mark.parametrize(
    "damage",
    [
        *(damaged_magic, truncated, of_another, far_away, before_the_file, no_numbers, odd_count, emptied),
        *(without_index, one_class, half_labels),
    ],
)
def test_damage_is_told_in_one_line(damage, tmp_path):
    path = write(tmp_path / "train.rec", list(zip(LABELS, PICTURES, strict=True)))
    damage(path)
    with pytest.raises(RunError) as error:
        list_records(path)
    assert str(error.value).startswith(f"{path}: no readable records of images: ")
    assert "\n" not in str(error.value)


def test_a_damaged_image_is_named(tmp_path):
    path = write(tmp_path / "train.rec", list(zip(LABELS, [*PICTURES[:-1], b"no image"], strict=True)))
    with pytest.raises(RunError, match=r"1 of 9 images cannot be decoded: 10/8 \(not an image\)"):
        image_folder(path, SIZE, tmp_path / "cache", 0.3)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"no file .*train.idx"):
        list_records(tmp_path / "train.rec")
    (tmp_path / "train.idx").write_text("0\t0\n")
    with pytest.raises(UsageError, match=r"no file .*train.rec"):
        list_records(tmp_path / "train.rec")


def test_without_held_out_images_there_is_no_test_set(tmp_path):
    with pytest.raises(
        UsageError, match=r"train\.rec has no test images: hold some of each class out, with --val-fraction 0.1"
    ):
        image_folder(tmp_path / "train.rec", SIZE, tmp_path)
