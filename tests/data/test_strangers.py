"""People in no training set: a folder without a split, or further drawn faces."""

import os
from argparse import Namespace

import pytest
import torch

import data
from data import build_datasets, build_strangers
from data.image_folder import flat_folder
from data.synthetic_faces import synthetic_faces
from tests.data.conftest import SIZE, noise, save
from util.runtime.errors import RunError, UsageError
from util.storage.hashes import image_hashes

CPU = torch.device("cpu")


@pytest.fixture
def load_flat(tmp_path):
    return lambda root: flat_folder(root, SIZE, tmp_path / "cache")


def arguments(cache_dir, source="synthetic_faces", strangers=None, seed=7):
    counts = {"identities": 5, "train_per_identity": 4, "test_per_identity": 2, "data_seed": seed}
    return Namespace(data=source, strangers=strangers, cache_dir=cache_dir, val_fraction=None, images="auto", **counts)


def test_a_folder_without_a_split_has_the_pixels_of_one_with_a_split(root, load, load_flat):
    train, _ = load(root)
    flat = load_flat(root / "train")
    assert torch.equal(flat.images, train.images) and torch.equal(flat.labels, train.labels)
    assert (flat.name, flat.classes) == ("train", train.classes) == ("train", ("a", "b"))


def test_it_is_decoded_once_and_may_hold_one_identity(tmp_path, load_flat, decoded):
    save(noise(0), tmp_path / "strangers" / "ann" / "1.png")
    first, second = (load_flat(tmp_path / "strangers") for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert [*decoded.values()] == [1]
    assert (first.classes, first.labels.tolist()) == (("ann",), [0])


def test_skipped_files_are_told_with_the_first_of_them(root, load_flat, capsys):
    (root / "train/a/notes.txt").write_text("")
    (root / "train/b/.hidden.png").write_text("")
    assert len(load_flat(root / "train")) == 4
    (root / "train/outside.png").write_text("")
    (root / "train/c").mkdir()
    assert len(load_flat(root / "train")) == 4
    told = ["3 files that are hidden or no image of a class (outside.png, …)", "1 class folders without images (c)"]
    assert capsys.readouterr().err.splitlines()[1] == f"{root}/train: skipped {', '.join(told)}"


def test_damaged_images_are_named_and_nothing_is_kept(tmp_path, root, load_flat):
    (root / "train/b/3.png").write_bytes(b"no image at all")
    with pytest.raises(RunError) as error:
        load_flat(root / "train")
    expected = f"{root}/train: 1 of 5 images cannot be decoded: b/3.png (not an image); replace or remove them"
    assert str(error.value) == expected
    assert not [*(tmp_path / "cache").glob("*.raw*")]


WRONG_FOLDERS = {
    "No such file or directory": lambda folder: folder.rename(folder.with_name("moved")),
    "0 class folders; at least 1 are needed, <class>/<image>": lambda folder: (folder / "ann").rename(folder / ".ann"),
    ": 0 class folders; at least 1 are needed, <class>/<image>": lambda folder: (folder / "ann/1.png").unlink(),
    "Not a directory": lambda folder: (folder.rename(folder.with_name("moved")), folder.write_text("")),
}


@pytest.mark.parametrize("message", WRONG_FOLDERS)
def test_wrong_folders(tmp_path, load_flat, message):
    folder = tmp_path / "strangers"
    save(noise(0), folder / "ann" / "1.png")
    WRONG_FOLDERS[message](folder)
    with pytest.raises(UsageError) as error:
        load_flat(folder)
    assert str(error.value).startswith(f"{folder}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_further_drawn_faces_are_those_of_a_larger_draw():
    many, few = synthetic_faces(7, 3, 2, SIZE, seed=3), synthetic_faces(2, 3, 2, SIZE, seed=3, first=4)
    for whole, part in zip(many, few, strict=True):
        assert part.classes == ("id004", "id005")
        assert part.labels.unique().tolist() == [0, 1]
        for label in range(2):
            same = whole.images[whole.labels == 4 + label].int() - part.images[part.labels == label].int()
            assert same.abs().max() <= 1  # how images are cut into chunks moves a rounding


def test_faces_from_another_number_on_are_cached_apart(tmp_path):
    first, further = (synthetic_faces(2, 2, 1, SIZE, cache_dir=tmp_path, first=first)[0] for first in (0, 2))
    assert not set(image_hashes(first)) & set(image_hashes(further))
    assert len([*tmp_path.glob("*.raw")]) == 2


def test_drawn_strangers_share_no_identity_and_no_image_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "STRANGERS_SIZE", (20, 4, 0))
    args = arguments(tmp_path)
    sets, strangers = build_datasets(args, SIZE, CPU), build_strangers(args, SIZE, CPU)
    assert (len(strangers.classes), len(strangers), strangers.image_size) == (20, 80, SIZE)
    for images in sets:
        assert not {*strangers.classes} & {*images.classes}
        assert not set(image_hashes(strangers)) & set(image_hashes(images))
    again = build_strangers(arguments(tmp_path), SIZE, CPU)
    assert torch.equal(again.images, strangers.images)
    other = build_strangers(arguments(tmp_path, seed=8), SIZE, CPU)
    assert not set(image_hashes(strangers)) & set(image_hashes(other))


def test_strangers_of_a_folder_or_none(tmp_path, root):
    assert build_strangers(arguments(tmp_path / "cache", str(root)), SIZE, CPU) is None
    save(noise(0), tmp_path / "strangers" / "ann" / "1.png")
    for source in (str(root), "synthetic_faces"):
        found = build_strangers(arguments(tmp_path / "cache", source, tmp_path / "strangers"), SIZE, CPU)
        assert (found.name, found.classes, found.image_size) == ("strangers", ("ann",), SIZE)


def test_a_folder_given_relative_or_absolute_is_one_folder(tmp_path, load_flat, decoded, monkeypatch):
    save(noise(0), tmp_path / "strangers" / "ann" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_flat("strangers").images, load_flat(tmp_path / os.curdir / "strangers").images)
    assert [*decoded.values()] == [1]
