"""Damaged images and folders of another layout."""

import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data.image_files
import data.image_folder
from data.image_folder import image_folder
from tests.data.conftest import SIZE, noise, save
from util.runtime.errors import RunError, UsageError


def test_cache_in_the_way_of_a_file(tmp_path, root, load, capsys):
    expected = load(root)
    (tmp_path / "file").write_text("")
    train, _ = image_folder(root, SIZE, tmp_path / "file")
    assert torch.equal(train.images, expected[0].images)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_damaged_images_of_both_splits_are_named_together(tmp_path, root, load):
    whole = io.BytesIO()
    noise(0, (64, 64)).save(whole, "JPEG")
    (root / "train/a/0.jpg").write_bytes(whole.getvalue()[:-200])
    (root / "train/b/3.png").write_bytes(b"")
    (root / "test/b/2.png").write_bytes(b"no image at all")
    (root / "test/b/3.png").symlink_to(root / "nowhere.png")
    with pytest.raises(RunError) as error:
        load(root)
    message = str(error.value)
    assert message.startswith(f"{root}: 4 of 10 images cannot be decoded: train/a/0.jpg (image file is truncated")
    assert message.endswith(
        f"train/b/3.png (not an image), test/b/2.png (not an image), "
        f"test/b/3.png ([Errno 2] No such file or directory: '{root}/test/b/3.png'); "
        "replace or remove them"
    )
    assert "\n" not in message
    assert not [*(tmp_path / "cache").glob("*.raw*")]


def test_the_first_of_many_damaged_images_are_named_and_all_are_listed(tmp_path, root, load):
    names = [f"train/b/x{index:02d}.png" for index in range(40)]
    for name in names:
        (root / name).write_bytes(b"")
    listed = tmp_path / "cache/damaged-faces.txt"
    shown = r"40 of 46 images.*x00\.png.*x04\.png \(not an image\) and 35 more, all in "
    with pytest.raises(RunError, match=f"{shown}{listed}; replace or remove them$"):
        load(root)
    assert listed.read_text().splitlines() == [f"{name} (not an image)" for name in names]
    for name in names[1:]:
        (root / name).unlink()
    with pytest.raises(RunError, match=r"1 of 7 images.*x00\.png \(not an image\); replace or remove them$"):
        load(root)
    assert listed.read_text().splitlines() == [f"{names[0]} (not an image)"]


def test_damaged_images_are_named_where_no_list_can_be_kept(tmp_path, root):
    for index in range(40):
        (root / f"train/b/x{index:02d}.png").write_bytes(b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"x04\.png \(not an image\) and 35 more; replace or remove them$"):
        image_folder(root, SIZE, tmp_path / "file")


def png_of_zeros(width, height):
    """A PNG that claims its size and holds one row of pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(width * 3 + 1))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [30_000, 10_000])  # above PIL's error, between its warning and its error
def test_decompression_bomb(root, load, width, recwarn):
    (root / "train/a/0.png").write_bytes(png_of_zeros(width, width))
    with pytest.raises(RunError, match=r"1 of 7 images.*train/a/0\.png \(Image size \(\d+ pixels\) exceeds limit"):
        load(root)
    assert len(recwarn) == 0


@pytest.mark.parametrize("value", [-0.5, 1.5, np.nan])
def test_float_pixels_of_unknown_range(root, load, value):
    save(Image.fromarray(np.full((5, 9), value, np.float32)), root / "train/a/0.tiff")
    with pytest.raises(RunError, match=r"0\.tiff \(pixel values outside 0 to 1\)"):
        load(root)


def copy(root, name, other):
    shutil.copytree(root / "train" / name, root / "train" / other)


def empty_folder(root):
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


WRONG_FOLDERS = {
    "No such file or directory: ": lambda root: root.rename(root.with_name("moved")),
    "faces/train'": lambda root: (root / "train").rename(root / "training"),
    "faces/test'": lambda root: (root / "test").rename(root / "val"),
    ": cannot be read as {train,test}/<class>/<image>: [Errno 2] No such file or directory": empty_folder,
    "/train: 0 class folders; at least 2 are needed": lambda root: empty_folder(root / "train"),
    "/train: 1 class folders; at least 2 are needed": lambda root: (root / "train/a").rename(root / "train/.a"),
    "/train: 1 class folders; at least 2 are needed, <": lambda root: empty_folder(root / "train/a"),
    "/test/a: no class of that name in train/": lambda root: (empty_folder(root / "train/a"), copy(root, "b", "c")),
    "/test/c: no class of that name in train/ (1 such class folders)": lambda root: (root / "test/c").mkdir(),
    "/test: no images": lambda root: empty_folder(root / "test"),
}


@pytest.mark.parametrize("message", WRONG_FOLDERS)
def test_wrong_folder(tmp_path, root, load, message):
    WRONG_FOLDERS[message](root)
    with pytest.raises(UsageError) as error:
        load(root)
    assert str(error.value).startswith(str(root))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_root_that_is_a_file(root, load):
    with pytest.raises(UsageError, match=r"1\.png: cannot be read as .*Not a directory"):
        load(root / "train/a/1.png")


def test_folder_that_cannot_be_listed(root, load, monkeypatch):
    """Root may list everything, so the refusal is made up."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot be read as .* Permission denied: .*train'$"):
        load(root)


def test_interrupted_decoding_stops_and_leaves_nothing(tmp_path, root, load, monkeypatch):
    """Ctrl-C arrives in the main thread, here while the progress bar is moved; most jobs are never started."""
    for index in range(2000):
        os.link(root / "train/a/1.png", root / f"train/a/x{index}.png")
    decoded, decode = [], data.image_folder.decode_image

    def bar(done, *_, **__):
        yield next(done)
        raise KeyboardInterrupt

    def count(path, *how):
        decoded.append(path)
        return decode(path, *how)

    monkeypatch.setattr(data.image_files, "tqdm", bar)
    monkeypatch.setattr(data.image_folder, "decode_image", count)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert len(decoded) < 1000
    assert not [*(tmp_path / "cache").glob("*.raw*")]
