import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import data.image_folder
from data.image_files import list_images
from data.image_folder import image_folder
from tests.data.conftest import SIZE, noise, save


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
    train, _ = load(tmp_path / "set")
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


@pytest.mark.parametrize("crop_pct", [0.8, 0.875])
def test_a_central_crop_is_timms_evaluation(tmp_path, load, crop_pct):
    smooth = noise(1, (6, 12)).resize((192, 96), Image.Resampling.BICUBIC)
    for file in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
        save(smooth, tmp_path / "set" / file)
    theirs = create_transform(56, crop_pct=crop_pct, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))(smooth)
    ours = load(tmp_path / "set", 56, crop_pct=crop_pct)[0].images[0] / 255
    torch.testing.assert_close(ours[:, 2:-2, 2:-2], theirs[:, 2:-2, 2:-2], rtol=0, atol=4 / 255)


def test_a_crop_has_a_cache_of_its_own_and_the_whole_keeps_its_older_one(tmp_path, root, load, decoded):
    known = (data.image_folder.VERSION, SIZE, list_images(root).states)
    load(root)
    (file,) = (tmp_path / "cache").glob("*.raw")
    assert file.stem == f"faces-{SIZE}-{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}"
    load(root, crop_pct=1.0)
    assert set(decoded.values()) == {1}
    load(root, crop_pct=0.5)
    assert set(decoded.values()) == {2}


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
    (root / "train/.git").mkdir()
    (root / "train/a/.thumbnails").mkdir()
    for name in ("a/.hidden.png", "a/Thumbs.db", "a/face.eps", "a/.thumbnails/1.png", "outside.png"):
        (root / "train" / name).write_bytes(b"nothing")
    (root / "test/notes").write_bytes(b"nothing")
    (root / "train/erased").mkdir()
    (root / "train/unused/texts").mkdir(parents=True)
    (root / "train/unused/texts/why.txt").write_bytes(b"nothing")
    assert load(root)[0].classes == ("a", "b")
    assert capsys.readouterr().err == (
        f"{root}: skipped 8 files that are hidden or no image of a class (train/.git, …), "
        "2 class folders without images (train/erased, …)\n"
    )


def test_folders_in_class_folders_belong_to_the_class(root, load):
    (root / "train/a/night").mkdir()
    (root / "train/a/2.png").rename(root / "train/a/night/2.png")
    assert load(root)[0].labels.tolist() == [0, 0, 1, 1]


def test_links_are_followed(tmp_path, root, load):
    save(Image.new("RGB", (9, 5), (10, 20, 30)), tmp_path / "elsewhere/c/face.png")
    (root / "train/a/0.png").symlink_to(tmp_path / "elsewhere/c/face.png")
    (root / "train/c").symlink_to(tmp_path / "elsewhere/c")
    train, _ = load(root)
    assert train.classes == ("a", "b", "c")
    assert np.array_equal(train.images[0].numpy(), flat((10, 20, 30)))
    assert np.array_equal(train.images[-1].numpy(), flat((10, 20, 30)))


def test_class_without_test_images_is_warned_about_once(root, load, capsys):
    (root / "test/b/1.png").unlink()
    train, test = load(root)
    assert (len(train), len(test)) == (4, 1)
    assert capsys.readouterr().err == f"warning: {root}: 1 classes have no test images, b first\n"
    (root / "test/b").rmdir()
    assert load(root)[1].classes == ("a", "b")


def test_test_images_among_the_training_images_are_counted_at_every_run(root, load, capsys):
    (root / "test/a/copy.png").write_bytes((root / "train/b/1.png").read_bytes())
    os.link(root / "train/a/2.png", root / "test/b/another.png")
    os.link(root / "train/b/1.png", root / "train/b/9.png")
    padded = (root / "train/a/1.png").read_bytes()
    (root / "test/a/same_size.png").write_bytes(padded[:-1] + b"\0")  # as long, and another file
    for _ in range(2):
        load(root)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "as well" in line]
        assert "2 of 5 test images are training images as well (test/a/copy.png is train/b/1.png)" in line


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


@pytest.mark.parametrize(
    ("name", "classes", "train_images", "test_images"), [("yaleb38", 38, 1924, 490), ("orl40", 40, 320, 80)]
)
def test_real_faces(faces, tmp_path, name, classes, train_images, test_images, decoded):
    for _ in range(2):
        train, test = image_folder(faces / name, 112, tmp_path)
        assert (len(train.classes), len(train), len(test)) == (classes, train_images, test_images)
        assert train.labels.unique().tolist() == test.labels.unique().tolist() == list(range(classes))
    assert set(decoded.values()) == {1}
    for split, image_set in (("train", train), ("test", test)):
        folders = sorted(path for path in (faces / name / split).iterdir())
        first, last = min(folders[0].iterdir()), max(folders[-1].iterdir())
        for path, image in ((first, image_set.images[0]), (last, image_set.images[-1])):
            with Image.open(path) as original:
                assert np.array_equal(image.numpy(), np.asarray(original.convert("RGB")).transpose(2, 0, 1))
