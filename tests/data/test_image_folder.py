import io
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.image_folder
from data import load_data
from data.image_folder import image_folder
from util.errors import RunError, UsageError

SIZE = 16
FACES = os.environ.get("FACES")


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def noise(seed, size=(20, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def root(tmp_path):
    """Two classes, two training images and one test image each."""
    for seed, name in enumerate(["train/b/1.png", "train/b/2.png", "train/a/1.png", "train/a/2.png"]):
        save(noise(seed), tmp_path / "faces" / name)
    for seed, name in enumerate(["test/a/1.png", "test/b/1.png"]):
        save(noise(10 + seed), tmp_path / "faces" / name)
    return tmp_path / "faces"


@pytest.fixture
def load(tmp_path):
    return lambda root, image_size=SIZE, **options: image_folder(root, image_size, tmp_path / "cache", **options)


@pytest.fixture
def decoded(monkeypatch):
    """How often each file has been decoded."""
    counts, decode = Counter(), data.image_folder.decode_image

    def count(path, image_size):
        counts[os.path.relpath(path, Path(path).parents[2])] += 1
        return decode(path, image_size)

    monkeypatch.setattr(data.image_folder, "decode_image", count)
    return counts


def test_sets_labels_and_order(root, load, capsys):
    train, test = load(root)
    assert (train.name, test.name) == ("faces", "faces")
    assert train.classes == test.classes == ("a", "b")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [0, 1]
    assert train.labels.dtype == torch.int64
    assert (train.images.shape, test.images.shape) == ((4, 3, SIZE, SIZE), (2, 3, SIZE, SIZE))
    assert train.images.dtype == test.images.dtype == torch.uint8
    assert capsys.readouterr().err == ""


def test_pixels_of_images_of_the_right_size_are_the_files_own(tmp_path, load):
    """Enough images for several jobs of several threads, each to land in its own place."""
    expected = []
    for index in range(80):
        image = noise(index, (SIZE, SIZE))
        save(image, tmp_path / f"set/train/{'ab'[index // 40]}/{index:02d}.png")
        expected.append(np.asarray(image).transpose(2, 0, 1))
    save(noise(99), tmp_path / "set/test/a/1.png")
    save(noise(99), tmp_path / "set/test/b/1.png")
    train, _ = load(tmp_path / "set", workers=3)
    assert np.array_equal(train.images.numpy(), np.stack(expected))


def test_resized_on_the_shorter_side_and_cropped_in_the_centre(tmp_path, load):
    """Columns of 40 pixels, red, green, green, blue: the centre square, half the width, is green."""
    wide = Image.new("RGB", (160, 80), (0, 255, 0))
    wide.paste((255, 0, 0), (0, 0, 40, 80))
    wide.paste((0, 0, 255), (120, 0, 160, 80))
    for name, image in {"a": wide, "b": wide.transpose(Image.Transpose.ROTATE_90)}.items():
        save(image, tmp_path / f"set/train/{name}/1.png")
        save(image, tmp_path / f"set/test/{name}/1.png")
    train, _ = load(tmp_path / "set")
    for image in train.images:
        assert image[:, 1:-1, 1:-1].flatten(1).unique(dim=1).flatten().tolist() == [0, 255, 0]


@pytest.fixture
def pixels_of(root, load):
    """Load one file among others and return its image (3, SIZE, SIZE)."""
    return lambda: load(root)[0].images[0].numpy()


def flat(value):
    return np.broadcast_to(np.array(value).reshape(-1, 1, 1), (3, SIZE, SIZE))


FLAT_IMAGES = {
    "rgb.png": (Image.new("RGB", (9, 5), (10, 20, 30)), (10, 20, 30)),
    "rgb.webp": (Image.new("RGB", (9, 5), (128, 128, 128)), 128),
    "rgb.bmp": (Image.new("RGB", (9, 5), (10, 20, 30)), (10, 20, 30)),
    "rgb.tiff": (Image.new("RGB", (9, 5), (10, 20, 30)), (10, 20, 30)),
    "rgb.ppm": (Image.new("RGB", (9, 5), (10, 20, 30)), (10, 20, 30)),
    "upper.JPG": (Image.new("RGB", (9, 5), (128, 128, 128)), 128),
    "grey.png": (Image.new("L", (9, 5), 77), 77),
    "grey.pgm": (Image.new("L", (9, 5), 77), 77),
    "grey.jpeg": (Image.new("L", (40, 90), 77), 77),
    "icon.ico": (Image.new("RGB", (48, 32), (10, 20, 30)), (10, 20, 30)),
    "two_tone.png": (Image.new("1", (9, 5), 1), 255),
    "pixel.png": (Image.new("RGB", (1, 1), (10, 20, 30)), (10, 20, 30)),
    "line.png": (Image.new("RGB", (1, 300), (10, 20, 30)), (10, 20, 30)),
    "palette.gif": (Image.new("RGB", (9, 5), (10, 20, 30)).quantize(4), (10, 20, 30)),
    "cmyk.tiff": (Image.new("CMYK", (9, 5), (0, 255, 255, 0)), (255, 0, 0)),
    "deep.png": (Image.fromarray(np.full((5, 9), 0x8080, np.uint16)), 128),
    "deep.tiff": (Image.fromarray(np.full((5, 9), 65535, np.uint16)), 255),
    "deep_dark.png": (Image.fromarray(np.full((5, 9), 1000, np.uint16)), 4),  # 1000 / 65535 * 255 = 3.89
    "integer.tiff": (Image.fromarray(np.full((5, 9), 0x8080, np.int32)), 128),
    "float.tiff": (Image.fromarray(np.full((5, 9), 0.5, np.float32)), 128),
    "half_clear.png": (Image.new("RGBA", (9, 5), (200, 100, 50, 51)), (40, 20, 10)),
    "clear.png": (Image.new("RGBA", (9, 5), (200, 100, 50, 0)), 0),
    "clear_grey.png": (Image.new("LA", (9, 5), (200, 51)), 40),
}


@pytest.mark.parametrize("name", FLAT_IMAGES)
def test_formats_and_modes(root, pixels_of, name):
    image, value = FLAT_IMAGES[name]
    save(image, root / "train/a" / f"0{name}")
    tolerance = 2 if name.lower().endswith(("jpg", "jpeg", "webp")) else 0
    assert np.abs(pixels_of().astype(int) - flat(value)).max() <= tolerance


def test_cmyk_jpeg(root, pixels_of):
    save(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), root / "train/a/0.jpg", quality=100)
    assert np.abs(pixels_of().astype(int) - flat((255, 0, 0))).max() <= 3


def test_transparent_palette_entry_is_black(root, pixels_of):
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([255, 255, 255, 10, 20, 30])
    image.paste(1, (0, 0, SIZE, SIZE // 2))
    save(image, root / "train/a/0.png", transparency=0)
    pixels = pixels_of()
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, -1, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tiff"])
def test_first_frame_of_an_animation(root, pixels_of, extension):
    frames = [Image.new("RGB", (SIZE, SIZE), (grey,) * 3) for grey in (40, 200, 120)]
    save(frames[0], root / f"train/a/0.{extension}", save_all=True, append_images=frames[1:])
    assert np.abs(pixels_of().astype(int) - 40).max() <= 2


# By the EXIF standard: where the stored top left corner is shown, and whether rows and columns are exchanged.
ORIENTATIONS = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl swapped", 6: "tr swapped", 7: "br swapped", 8: "bl swapped"}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
def test_exif_rotation_is_carried_out(root, pixels_of, extension, orientation):
    """The stored image: white, grey towards the right end, black towards the lower end of its centre square."""
    image = Image.new("L", (2 * SIZE, SIZE), 255)
    image.paste(128, (SIZE, 0, 2 * SIZE, SIZE))
    image.paste(0, (0, SIZE // 2, 2 * SIZE, SIZE))
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(image.convert("RGB"), root / f"train/a/0.{extension}", exif=exif, quality=95)
    pixels = pixels_of()[0].astype(int)
    edge = {"t": 1, "b": -2, "l": 1, "r": -2}
    corner, swapped = ORIENTATIONS[orientation][:2], "swapped" in ORIENTATIONS[orientation]
    row, column = edge[corner[0]], edge[corner[1]]
    along_row, along_column = pixels[row, -1 - column], pixels[-1 - row, column]
    expected = (0, 128) if swapped else (128, 0)
    assert np.abs(np.array([pixels[row, column], along_row, along_column]) - (255, *expected)).max() <= 8


def test_unreadable_exif_is_ignored(root, pixels_of):
    save(Image.new("L", (SIZE, SIZE), 77), root / "train/a/0.jpg", exif=b"Exif\0\0nonsense")
    assert np.array_equal(pixels_of(), flat(77))


def test_large_jpeg_agrees_with_a_full_decoding(root, load):
    smooth = noise(3, (6, 8)).resize((643, 481), Image.Resampling.BICUBIC)
    path = save(smooth, root / "train/a/0.jpg", quality=95)
    with Image.open(path) as image:
        full = np.asarray(image.resize((56, 56), Image.Resampling.BICUBIC, box=(81, 0, 562, 481)), int)
    difference = np.abs(load(root, 56)[0].images[0].numpy() - full.transpose(2, 0, 1))
    assert 0 < difference.mean() < 0.5  # decoded at a fraction of its size, which never gives the same pixels
    assert difference.max() <= 4


def test_wrong_extension_of_another_image_format(root, pixels_of):
    save(Image.new("RGB", (9, 5), (10, 20, 30)), root / "train/a/0.jpg", format="PNG")
    assert np.array_equal(pixels_of(), flat((10, 20, 30)))


def test_what_is_no_image_is_skipped_and_counted(root, load, capsys):
    for name in ("train/.DS_Store", "train/a/Thumbs.db", "train/a/.hidden.png", "test/notes.txt", "train/b/face.eps"):
        (root / name).write_bytes(b"nothing")
    (root / "train/a/folder.png").mkdir()
    (root / "train/.git").mkdir()
    os.mkfifo(root / "train/b/pipe.png")
    assert len(load(root)[0]) == 4
    assert capsys.readouterr().err == f"{root}: skipped 8 entries that are not images, {root}/test/notes.txt first\n"


def test_links_are_followed(tmp_path, root, load):
    save(Image.new("RGB", (9, 5), (10, 20, 30)), tmp_path / "elsewhere/c/face.png")
    (root / "train/a/0.png").symlink_to(tmp_path / "elsewhere/c/face.png")
    (root / "train/c").symlink_to(tmp_path / "elsewhere/c")
    train, _ = load(root)
    assert train.classes == ("a", "b", "c")
    assert np.array_equal(train.images[0].numpy(), flat((10, 20, 30)))
    assert np.array_equal(train.images[-1].numpy(), flat((10, 20, 30)))


def test_names_that_are_not_utf_8(root, load):
    for split in ("train", "test"):
        os.rename(os.fsencode(root / split / "a"), os.fsencode(root / split) + b"/a\xff")
    train, _ = load(root)
    assert train.classes == ("a\\xff", "b")
    with open(os.fsencode(root / "train") + b"/b/\xfe\n.png", "wb") as file:
        file.write(b"")
    with pytest.raises(RunError, match=r"train/b/\\xfe\\n\.png \(not an image\)"):
        load(root)


def test_class_without_test_images_is_warned_about_once(root, load, capsys):
    (root / "test/b/1.png").unlink()
    train, test = load(root)
    assert (len(train), len(test)) == (4, 1)
    assert capsys.readouterr().err == f"warning: {root}: 1 classes have no test images, b first\n"
    (root / "test/b").rmdir()
    assert load(root)[1].classes == ("a", "b")


def test_second_call_decodes_nothing(root, load, decoded):
    first = load(root)
    assert len(decoded) == 6 and set(decoded.values()) == {1}
    second = load(root)
    assert set(decoded.values()) == {1}
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert one.classes == other.classes


def rewritten(root):
    save(noise(77), root / "train/a/1.png")


def touched(root):
    os.utime(root / "train/a/1.png", (1, 1))


def added(root):
    save(noise(77), root / "train/a/3.png")


def removed(root):
    (root / "train/a/1.png").unlink()


def renamed(root):
    (root / "train/a/1.png").rename(root / "train/a/9.png")


def moved_to_another_class(root):
    (root / "train/a/1.png").rename(root / "train/b/1a.png")


@pytest.mark.parametrize("change", [rewritten, touched, added, removed, renamed, moved_to_another_class])
def test_a_changed_folder_is_decoded_again(tmp_path, root, load, decoded, change):
    load(root)
    change(root)
    decoded.clear()
    cached = load(root)
    assert decoded.total() == len(cached[0]) + len(cached[1])
    fresh = image_folder(root, SIZE, tmp_path / "another_cache")
    assert torch.equal(cached[0].images, fresh[0].images)


def test_another_size_another_version_and_another_place_are_decoded_again(tmp_path, root, load, decoded, monkeypatch):
    load(root)
    assert load(root, SIZE + 1)[0].images.shape == (4, 3, SIZE + 1, SIZE + 1)
    assert set(decoded.values()) == {2}
    monkeypatch.setattr(data.image_folder, "VERSION", data.image_folder.VERSION + 1)
    load(root)
    assert set(decoded.values()) == {3}
    root.rename(tmp_path / "elsewhere")
    load(tmp_path / "elsewhere")
    assert set(decoded.values()) == {4}


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
        "train/b/3.png (not an image), test/b/2.png (not an image), test/b/3.png (No such file or directory); "
        "replace or remove them"
    )
    assert "\n" not in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_the_first_of_many_damaged_images_are_named(root, load):
    for index in range(40):
        (root / f"train/b/x{index:02d}.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"40 of 46 images.*x00\.png.*x04\.png \(not an image\) and 35 more; "):
        load(root)


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


def empty_folder(root):
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


WRONG_FOLDERS = {
    "no such folder of images": lambda root: root.rename(root.with_name("moved")),
    "has no folder train/": lambda root: (root / "train").rename(root / "training"),
    "has no folder test/": lambda root: (root / "test").rename(root / "val"),
    "has no folder train/; expected {train,test}/<class>/<image>": empty_folder,
    "/train: 0 class folders; at least 2 are needed": lambda root: empty_folder(root / "train"),
    "/train: 1 class folders; at least 2 are needed": lambda root: (root / "train/a").rename(root / "train/.a"),
    "/train/c: no images (1 such class folders)": lambda root: (root / "train/c").mkdir(),
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
    with pytest.raises(UsageError, match=r"1\.png: no such folder of images"):
        load(root / "train/a/1.png")


def test_image_size_of_nothing(root, load):
    with pytest.raises(UsageError, match="image size 0"):
        load(root, 0)


def test_folder_that_cannot_be_listed(root, load, monkeypatch):
    """Root may list everything, so the refusal is made up."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"train/b: cannot be listed \(Permission denied\)$"):
        load(root)


def test_interrupted_decoding_stops_and_leaves_nothing(tmp_path, root, load, monkeypatch):
    """Ctrl-C arrives in the main thread, here while the progress bar is moved; most jobs are never started."""
    for index in range(2000):
        os.link(root / "train/a/1.png", root / f"train/a/x{index}.png")
    decoded, decode = [], data.image_folder.decode_image

    class Bar:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, _):
            raise KeyboardInterrupt

    def count(path, image_size):
        decoded.append(path)
        return decode(path, image_size)

    monkeypatch.setattr(data.image_folder, "tqdm", Bar)
    monkeypatch.setattr(data.image_folder, "decode_image", count)
    with pytest.raises(KeyboardInterrupt):
        load(root, workers=1)
    assert len(decoded) < 1000
    assert list((tmp_path / "cache").iterdir()) == []


def test_load_data_reads_folders(root, tmp_path):
    train, test = load_data(str(root), SIZE, 100, 24, 6, 0, tmp_path / "cache")
    assert (train.name, len(train), len(test)) == ("faces", 4, 2)


def test_load_data_draws_synthetic_faces_once(tmp_path, monkeypatch):
    faces = pytest.importorskip("data.synthetic_faces")
    drawn = faces.synthetic_faces(3, 2, 1, 16, 7)
    for _ in range(2):  # as drawn, and as mapped
        for expected, got in zip(drawn, load_data("synthetic_faces", 16, 3, 2, 1, 7, tmp_path), strict=True):
            assert torch.equal(expected.images, got.images) and torch.equal(expected.labels, got.labels)
            assert (expected.name, expected.classes) == (got.name, got.classes)
        monkeypatch.setattr(faces, "render", None)
    with pytest.raises(TypeError):  # another seed must be drawn
        load_data("synthetic_faces", 16, 3, 2, 1, 8, tmp_path)


WRONG_NUMBERS = [
    (0, 3, 2, 1, 7),
    (8, 3, 2, 1, 7),
    (16, 0, 2, 1, 7),
    (16, -1, 2, 1, 7),
    (16, 3, 0, 1, 7),
    (16, 3, 2, 0, 7),
    (16, 3, 0, 0, 7),
    (16, 3, 2, 1, -1),
]


@pytest.mark.parametrize("numbers", WRONG_NUMBERS)
def test_load_data_refuses_impossible_numbers_of_synthetic_faces(tmp_path, numbers):
    with pytest.raises(UsageError):
        load_data("synthetic_faces", *numbers, tmp_path)


@pytest.mark.skipif(not FACES, reason="FACES names no folder of real faces")
@pytest.mark.parametrize(("name", "classes", "train_images", "test_images"), [("yaleb38", 38, 1924, 490),
                                                                              ("orl40", 40, 320, 80)])  # fmt: skip
def test_real_faces(tmp_path, name, classes, train_images, test_images, decoded):
    for _ in range(2):
        train, test = image_folder(Path(FACES) / name, 112, tmp_path)
        assert (len(train.classes), len(train), len(test)) == (classes, train_images, test_images)
        assert train.labels.unique().tolist() == test.labels.unique().tolist() == list(range(classes))
    assert set(decoded.values()) == {1}
    for split, image_set in (("train", train), ("test", test)):
        folders = sorted(path for path in (Path(FACES) / name / split).iterdir())
        first, last = min(folders[0].iterdir()), max(folders[-1].iterdir())
        for path, image in ((first, image_set.images[0]), (last, image_set.images[-1])):
            with Image.open(path) as original:
                assert np.array_equal(image.numpy(), np.asarray(original.convert("RGB")).transpose(2, 0, 1))
