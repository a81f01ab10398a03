"""The short name of a data set, and the script that prints it."""

import shutil

import pytest

from data import data_tag
from data.image_set import data_digest
from data.tasks import split_validation
from tests.data.conftest import noise, save


def test_the_tag_is_of_the_images_however_split_and_named(root, load, tmp_path):
    train, test = load(root)
    tag = data_tag((train, test))
    assert tag == f"faces-{data_digest(train, test)[:8]}"
    kept, held = split_validation(train.labels, 2, 0.5)
    assert data_tag((train.subset(kept), train.subset(held))) == data_tag((train, train.subset(slice(0)))) != tag
    (root / "train/a/1.png").rename(root / "test/a/9.png")
    assert data_tag(load(root)) == tag
    shutil.copytree(root, tmp_path / "copies/faces")
    assert data_tag(load(tmp_path / "copies/faces")) == tag
    save(noise(50), root / "train/a/1.png")
    assert data_tag(load(root)) != tag


def test_the_script_prints_the_tag(root, load, tmp_path, command):
    expected = data_tag(load(root))
    assert command("scripts/data_tag.py", root, "--cache-dir", tmp_path / "cache") == (0, f"{expected}\n", "")
    assert command("scripts/data_tag.py", "synthetic_faces") == (0, "synthetic_faces\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one data folder is needed"),
        (["a", "b"], "one data folder is needed"),
        (["a", "--rank", "4"], "one data folder is needed"),
        (["nowhere"], "nowhere: cannot be read as {train,test}/<class>/<image>: [Errno 2]"),
    ],
)
def test_the_script_refuses_in_one_line(command, arguments, message):
    code, out, err = command("scripts/data_tag.py", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
