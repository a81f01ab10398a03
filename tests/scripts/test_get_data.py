"""Data recipes, on archives of drawn images."""

import errno
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from scripts import get_data
from tests.conftest import ROOT
from util.runtime.errors import RunError, UsageError

RECIPES = json.loads((ROOT / "data/recipes.json").read_text())


def picture(size: tuple[int, int], kind: str, seed: int = 0) -> bytes:
    shape = (size[1], size[0], 3)[: 2 if kind == "PPM" else 3]
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def orl(tmp_path) -> dict[str, bytes]:
    image = picture((92, 112), "PPM")
    return {"README": b"x"} | {f"s{person}/{number}.pgm": image for person in range(1, 41) for number in range(1, 11)}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Let a recipe have these lists, or these paths, alone."""

    def shrink(name: str, paths: list[str], **changes) -> dict:
        recipe = RECIPES[name] | {"files": len(paths), "names": get_data.digest(paths)} | changes
        (tmp_path / "recipes.json").write_text(json.dumps({name: recipe}))
        monkeypatch.setattr(get_data, "RECIPES", tmp_path / "recipes.json")
        return recipe

    return shrink


def test_orl_is_made_as_listed_and_once(orl, tmp_path, command):
    archive, output = zipped(tmp_path / "att_faces.zip", orl), tmp_path / "sets/orl"
    code, out, err = command("scripts/get_data.py", "orl40", archive, "--output-dir", output)
    assert (code, err) == (0, "")
    assert "licence: free for research" in out and "Samaria" in out
    assert "40 people, images: 320 train, 80 test" in out and "the same photos in other files" in out
    assert {path.name for path in (output / "test/s01").iterdir()} == {"03.jpg", "08.jpg"}
    with Image.open(output / "train/s40/10.jpg") as face:
        assert (face.size, face.mode) == ((112, 112), "L")
    assert [path.name for path in output.parent.iterdir()] == ["orl"]
    # What is there is checked, not made again.
    assert command("scripts/get_data.py", "orl40", "nowhere.zip", "--output-dir", output)[:2] == (0, out)


def test_casia_keeps_the_bytes(tmp_path, small, capsys):
    paths = [f"{split}/{person}/{number}.jpg" for split in ("train", "test") for person in (3, 41) for number in (1, 2)]
    files = {path: bytes([number]) for number, path in enumerate(paths)}
    contents = get_data.digest([f"{path}  {hashlib.sha256(data).hexdigest()}" for path, data in files.items()])
    small("casia100", paths, contents=contents)
    inside = {f"data/faces/{path}": data for path, data in files.items()}
    inside |= {"__MACOSX/data/train/3/._1.jpg": b"", "data/Labels.json": b""}
    get_data.main(["casia100", str(zipped(tmp_path / "data.zip", inside)), "--output-dir", str(tmp_path / "out")])
    assert "2 people, images: 4 train, 4 test" in (told := capsys.readouterr().out)
    assert "the same files as ours" in told
    assert {path: (tmp_path / "out" / path).read_bytes() for path in files} == files


def test_a_clean_casia_has_no_test_image_that_is_a_training_image(tmp_path, small, capsys):
    paths = [f"{split}/{person}/{number}.jpg" for split in ("train", "test") for person in (3, 41) for number in (1, 2)]
    files = {path: bytes([number]) for number, path in enumerate(paths)} | {"test/41/2.jpg": bytes([0])}  # as train/3/1.jpg
    kept = get_data.digest([path for path in paths if path != "test/41/2.jpg"])
    small("casia100_clean", paths, planned=get_data.digest(paths), names=kept)
    archive = zipped(tmp_path / "data.zip", files)
    for _ in range(2):  # made, and found again
        get_data.main(["casia100_clean", str(archive), "--output-dir", str(tmp_path / "out")])
        assert "2 people, images: 4 train, 3 test" in capsys.readouterr().out
    assert not (tmp_path / "out/test/41/2.jpg").exists()


@pytest.mark.parametrize("kind", ["tgz", "folder"])
def test_lfw_is_cut_out_of_an_archive_or_a_folder(kind, tmp_path, small, capsys):
    small("lfw_unseen", ["Al_Gore/Al_Gore_0001.jpg"], lists={"Al_Gore": {".": "1"}})
    photo = tmp_path / "lfw_funneled/Al_Gore/Al_Gore_0001.jpg"
    photo.parent.mkdir(parents=True)
    image = Image.new("RGB", (250, 250), "red")
    image.paste((0, 0, 255), (61, 61, 189, 189))
    image.save(photo, quality=100)
    photo.with_name("Al_Gore_0002.jpg").write_bytes(b"not of the list")
    source = tmp_path / "lfw_funneled"
    if kind == "tgz":
        source = tmp_path / "lfw.tgz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(tmp_path / "lfw_funneled", "lfw_funneled")
    get_data.main(["lfw_unseen", str(source), "--output-dir", str(tmp_path / "out")])
    assert "the same photos in other files (ours are cut from lfw-deepfunneled.tgz" in capsys.readouterr().out
    with Image.open(tmp_path / "out/Al_Gore/Al_Gore_0001.jpg") as face:
        pixels = np.asarray(face).reshape(-1, 3)
    assert face.size == (112, 112) and abs(pixels.mean(0) - (0, 0, 255)).max() < 8


def test_yale_leaves_out_the_ambient_and_the_damaged(tmp_path, small):
    # Negative azimuths come after positive ones in the archive's names.
    lights = [f"A{sign}{azimuth:03d}E+00" for sign in "+-" for azimuth in (5, 10, 20, 35, 50)]
    inside = {f"CroppedYale/yaleB01/yaleB01_P00{light}.pgm": picture((168, 192), "PPM") for light in lights}
    inside |= {"CroppedYale/yaleB01/yaleB01_P00_Ambient.pgm": b"", "CroppedYale/yaleB01/yaleB01_P00A+000E+00.pgm.bad": b""}
    plan = get_data.plan_yale([*inside])
    test = {path for path in plan.values() if path.startswith("test/")}
    assert test == {f"test/yaleB01/yaleB01_P00A{light}Ep00.jpg" for light in ("m020", "m035")}
    small("yaleb38", [*plan.values()])
    archive = zipped(tmp_path / "yale.zip", inside)
    get_data.main(["yaleb38", str(archive), "--output-dir", str(tmp_path / "out")])
    assert len([*(tmp_path / "out").rglob("*.jpg")]) == 10


def theirs(name: str, person: str, stem: str) -> str:
    """How the archive names our image."""
    if name == "yaleb38":
        return f"{person}/{stem[:11]}{stem[11:].replace('m', '-').replace('p', '+')}.pgm"
    return f"s{int(person[1:])}/{int(stem)}.pgm" if name == "orl40" else f"{person}/{stem}.jpg"


@pytest.mark.parametrize("name", ["lfw100", "lfw_unseen", "yaleb38", "orl40"])
def test_the_recipe_names_our_files(name, faces):
    recipe = RECIPES[name]
    paths = get_data.files_of(faces / recipe["folder"])
    members = [theirs(name, path.split("/")[-2], Path(path).stem) for path in paths]
    assert get_data.plan_of(name, recipe, members) == dict(zip(members, paths, strict=True))
    assert (len(paths), get_data.digest(paths)) == (recipe["files"], recipe["names"])
    contents = [f"{path}  {hashlib.sha256((faces / recipe['folder'] / path).read_bytes()).hexdigest()}" for path in paths]
    assert get_data.digest(contents) == recipe["contents"]


def refused(error: type, *arguments: object) -> str:
    with pytest.raises(error) as caught:
        get_data.main(["orl40", *map(str, arguments)])
    return str(caught.value)


def test_what_is_wrong_is_one_line_and_leaves_nothing(orl, tmp_path, command, monkeypatch):
    (tmp_path / "sets").mkdir()
    output = ("--output-dir", tmp_path / "sets/orl")
    code, _, err = command("scripts/get_data.py", "orl40", tmp_path / "nowhere.zip", *output)
    assert (code, err) == (2, f"get_data.py: error: no file {tmp_path / 'nowhere.zip'}\n")
    plain = tmp_path / "plain.zip"
    plain.write_text("no archive")
    assert "no folder, zip or tar" in refused(UsageError, plain, *output)
    fewer = zipped(tmp_path / "fewer.zip", {name: data for name, data in orl.items() if name != "s7/3.pgm"})
    assert "is not the archive of orl40: 399 of its 400 images are there" in refused(UsageError, fewer, *output)
    for data, told in ((b"no image", "cannot identify image"), (picture((90, 112), "PPM"), "90 × 112 pixels instead of")):
        archive = zipped(tmp_path / "damaged.zip", orl | {"s40/10.pgm": data})
        assert f"s40/10.pgm is damaged: {told}" in refused(RunError, archive, *output)
    with tarfile.open(tmp_path / "cut.tgz", "w:gz") as tar:
        tar.add(fewer)
        tar.add(archive)
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "cut.tgz").read_bytes()[:-30000])
    assert "cut.tgz is damaged" in refused(RunError, tmp_path / "cut.tgz", *output)
    monkeypatch.setattr(get_data, "urlretrieve", lambda url, path: (_ for _ in ()).throw(OSError("no network")))
    assert "att_faces.zip: no network; get it another way" in refused(RunError, *output)

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert refused(RunError, zipped(tmp_path / "whole.zip", orl), *output).endswith(
        "No space left on device; nothing is left of it"
    )
    assert not [*(tmp_path / "sets").iterdir()]


def test_a_folder_of_others_is_left_alone(orl, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("mine")
    (tmp_path / "file").write_text("mine")
    archive = zipped(tmp_path / "att_faces.zip", orl)
    for name in ("mine", "file"):
        assert "exists and is not orl40" in refused(UsageError, archive, "--output-dir", tmp_path / name)
    assert (tmp_path / "mine/photo.jpg").read_text() == (tmp_path / "file").read_text() == "mine"
    assert len([*(tmp_path / "mine").iterdir()]) == 1


def test_drive_needs_gdown(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UsageError, match="pip install gdown"):
        get_data.main(["casia100", "--output-dir", str(tmp_path / "casia")])
    asked = []
    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=lambda **options: asked.append(options)))
    get_data.download(RECIPES["casia100"]["url"], tmp_path)
    assert asked == [{"id": "16CaYf45UsHPff1smxkCXaHE8tZo4wTPv", "output": str(tmp_path / "archive")}]
