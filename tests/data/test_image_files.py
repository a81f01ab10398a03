"""Which files a data folder has, where its links lead, and the files' hashes."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import data.image_files
from data.image_files import file_digests, list_images
from data.image_folder import flat_folder, image_folder
from tests.conftest import ROOT
from tests.data.conftest import SIZE, noise, save, tag_of
from util.runtime.errors import RunError, UsageError


@pytest.fixture
def hashed(monkeypatch):
    """The files that have been hashed."""
    opened, digest_of = [], data.image_files.digest_of

    def count(file):
        opened.append(file.name)
        return digest_of(file)

    monkeypatch.setattr(data.image_files, "digest_of", count)
    return opened


def refused(load, root):
    with pytest.raises(UsageError) as error:
        load(root)
    assert str(error.value).startswith(str(root))
    assert str(error.value).isprintable()
    return str(error.value)


def test_files_and_digests_of_every_image(root, load):
    train, test = load(root)
    assert train.files == ("train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png")
    assert test.files == ("test/a/1.png", "test/b/1.png")
    for images in (train, test):
        assert images.digests == tuple(hashlib.sha256((root / file).read_bytes()).hexdigest() for file in images.files)
    flat = flat_folder(root / "train", SIZE, root / "cache")
    assert flat.files == tuple(file.removeprefix("train/") for file in train.files)
    assert flat.digests == train.digests


def test_subfolders_are_in_the_order_of_their_paths(root):
    """As they always were: the order decides which images a class lends."""
    for name in ("a-/1.png", "a/z/1.png", "a.b/1.png", "z.png", "B/1.png"):
        save(noise(0), root / "train/a" / name)
    found = [file.removeprefix("train/a/") for file in list_images(root).files if file.startswith("train/a")]
    assert found == ["1.png", "2.png", "z.png", "B/1.png", "a-/1.png", "a.b/1.png", "a/z/1.png"]


def test_later_starts_read_no_image_file(root, load, hashed, monkeypatch):
    first = load(root)
    assert len(hashed) == 6
    hashed.clear()
    for size in (SIZE, SIZE + 1):  # the hashes serve all sizes
        again = load(root, size)
        assert [one.digests for one in again] == [one.digests for one in first]
    assert not hashed
    monkeypatch.setattr("builtins.open", lambda path, *_, **__: pytest.fail(f"{path} is opened"))
    assert list_images(root).files


def emptied(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-70])


def no_text(path):
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [emptied, truncated, no_text, folder, Path.unlink])
def test_damaged_hashes_are_computed_anew(tmp_path, root, load, hashed, damage):
    expected = load(root)[0].digests
    (kept,) = (tmp_path / "cache").glob("*.sha256")
    damage(kept)
    hashed.clear()
    assert load(root)[0].digests == expected
    assert len(hashed) == 6
    load(root)
    assert len(hashed) == (12 if damage is folder else 6)


def test_changed_files_are_hashed_anew(root, load):
    before = load(root)[0].digests
    save(noise(50), root / "train/a/1.png")
    after = load(root)[0].digests
    assert after[0] != before[0] and after[1:] == before[1:]


def test_without_a_cache_the_hashes_are_held_in_memory(tmp_path, root, load):
    (tmp_path / "file").write_text("")
    assert image_folder(root, SIZE, tmp_path / "file")[0].digests == load(root)[0].digests


def test_a_file_that_can_no_longer_be_read_is_named(tmp_path, root, load, monkeypatch):
    """Root may read everything, so the refusal is made up."""
    load(root)
    (kept,) = (tmp_path / "cache").glob("*.sha256")
    kept.unlink()
    digest_of = data.image_files.digest_of

    def refuse(file):
        if file.name.endswith("a/1.png"):
            raise PermissionError(13, "Permission denied")
        return digest_of(file)

    monkeypatch.setattr(data.image_files, "digest_of", refuse)
    with pytest.raises(RunError, match=r"2 of 6 images cannot be decoded: train/a/1\.png \(\[Errno 13\] Permission denied"):
        load(root)
    assert not [*(tmp_path / "cache").glob("*.sha256")]


def test_odd_names(tmp_path, root, load, capsys):
    names = [os.fsdecode(b"no \xff text"), "two\nlines", "a, b", 'quo"ted', "it's", "  spaces "]
    for number, name in enumerate(names):
        for split in ("train", "test"):
            save(noise(60 + number), root / split / name / f"{name}.png")
    odd = root.rename(root.with_name(names[0] + names[1]))
    train, test = load(odd)
    assert train.classes == test.classes == tuple(sorted([*names, "a", "b"]))
    assert {f"train/{name}/{name}.png" for name in names} < {*train.files}
    err = capsys.readouterr().err
    assert "no \\udcff texttwo\\nlines: 6 of 8 test images are training images as well" in err
    assert len(err.splitlines()) == 1
    (odd / "train" / names[1] / "new\nline.png").write_bytes(b"")
    with pytest.raises(RunError) as error:
        load(odd)
    assert "train/two\\nlines/new\\nline.png (not an image)" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / f"cache/damaged-{odd.name}.txt").read_text().splitlines() == [
        "train/two\\nlines/new\\nline.png (not an image)"
    ]
    (odd / "train" / names[1] / "new\nline.png").unlink()
    script = subprocess.run([sys.executable, ROOT / "scripts/data_tag.py", odd], capture_output=True, check=True)
    assert script.stdout == f"{tag_of(load(odd))}\n".encode()


@pytest.mark.parametrize("place", ["train/c", "test/a2", "train/c.png", "train/a/night", "train/a/itself"])
def test_a_dead_link_that_may_be_a_folder_is_named(root, load, place):
    (root / place).symlink_to("itself" if place.endswith("itself") else "nowhere")
    assert f"{root}/{place}: a link that leads nowhere" in refused(load, root)


def test_a_hidden_dead_link_is_skipped(root, load, capsys):
    (root / "train/.c").symlink_to("nowhere")
    assert load(root)[0].classes == ("a", "b")
    assert "skipped 1 files that are hidden or no image of a class (train/.c)" in capsys.readouterr().err


LOOPS = {
    "train/a/loop": ["..", ".", "../..", "/", "{root}/train"],
    "train/a/deep/loop": ["..", "../..", "."],
    "train/loop": [".", "..", "/"],
    "test/loop": [".", ".."],
}


@pytest.mark.parametrize(("place", "target"), [(place, target) for place, targets in LOOPS.items() for target in targets])
def test_a_link_that_leads_back_is_skipped_and_told(root, load, capsys, place, target):
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to(target.format(root=root))
    train, test = load(root)
    assert (len(train), len(test), train.classes) == (4, 2, ("a", "b"))
    assert f"skipped 1 folders that are there twice ({place})" in capsys.readouterr().err


def test_a_folder_that_is_twice_in_a_class_counts_once(root, load, capsys):
    save(noise(50), root / "train/a/night/1.png")
    (root / "train/a/more").symlink_to("night")
    assert load(root)[0].labels.tolist() == [0, 0, 0, 1, 1]
    assert "skipped 1 folders that are there twice (train/a/night)" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["train/c", "train/a/x", "test/b/x"])
def test_one_folder_of_two_classes_is_refused(root, load, place):
    (root / place).symlink_to(root / place.split("/")[0] / ("a" if "/b" in place else "b"))
    message = refused(load, root)
    assert place in message and "are one folder: one person under two names" in message


def test_a_class_inside_another_is_refused(root, load):
    save(noise(50), root / "train/a/night/1.png")
    (root / "train/c").symlink_to("a/night")
    assert "train/c and train/a/night are one folder" in refused(load, root)


def test_links_that_lead_out_are_followed(tmp_path, root, load):
    elsewhere = (root / "train").rename(tmp_path / "elsewhere")
    (root / "train").mkdir()
    for name in ("a", "b"):
        (root / "train" / name).symlink_to(elsewhere / name)
    (root / "test/a/2.png").symlink_to(elsewhere / "a/1.png")
    (root / "test/a/3.png").symlink_to("1.png")
    assert (len(load(root)[0]), len(load(root)[1])) == (4, 4)


def test_a_split_that_is_a_link_may_lead_out_and_back(tmp_path, root, load, capsys):
    elsewhere = (root / "train").rename(tmp_path / "elsewhere")
    (root / "train").symlink_to(elsewhere)
    (elsewhere / "a/loop").symlink_to("..")
    assert load(root)[0].classes == ("a", "b")
    assert "1 folders that are there twice (train/a/loop)" in capsys.readouterr().err


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path, root, load, linked):
    places = {kind: (tmp_path if linked else root / "train/a") / f"{kind}.png" for kind in ("pipe", "socket")}
    os.mkfifo(places["pipe"])
    with socket.socket(socket.AF_UNIX) as bound:
        home = os.getcwd()
        os.chdir(places["socket"].parent)  # the path of a socket must be short
        bound.bind("socket.png")
        os.chdir(home)
        if linked:
            for kind, path in places.items():
                (root / f"train/a/{kind}.png").symlink_to(path)
        (root / "train/a/zero.png").symlink_to("/dev/zero")
        with pytest.raises(RunError) as error:
            load(root)
        named = ", ".join(f"train/a/{kind}.png (not a regular file)" for kind in ("pipe", "socket", "zero"))
        assert f"3 of 9 images cannot be decoded: {named};" in str(error.value)
        with pytest.raises(RunError, match="3 of 9 images"):  # the script hashes without decoding
            file_digests(list_images(root), tmp_path / "cache")


def test_a_subfolder_that_cannot_be_listed_is_named(root, load, monkeypatch):
    """Root may list everything, so the refusal is made up."""
    (root / "train/a/night").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("night"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "Permission denied" in refused(load, root)


def test_people_who_were_erased_may_leave_empty_folders(root, load, capsys):
    for split in ("train", "test"):
        (root / split / "erased").mkdir()
    train, test = load(root)
    assert train.classes == test.classes == ("a", "b")
    assert capsys.readouterr().err == f"{root}: skipped 1 class folders without images (train/erased)\n"
