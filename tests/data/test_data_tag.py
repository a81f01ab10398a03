"""The short name of a data set, and the script that prints it."""

import shutil

import pytest

from data.tasks import split_validation
from tests.data.conftest import noise, save, tag_of


def test_the_tag_is_of_the_images_however_split_and_named(root, load, tmp_path):
    train, test = load(root)
    tag = tag_of((train, test))
    assert tag.startswith("faces-") and len(tag) == 14
    kept, held = split_validation(train.labels, 2, 0.5)
    assert tag_of((train.subset(kept), train.subset(held))) == tag_of((train, train.subset(slice(0)))) != tag
    (root / "train/a/1.png").rename(root / "test/a/9.png")
    assert tag_of(load(root)) == tag
    shutil.copytree(root, tmp_path / "copies/faces")
    assert tag_of(load(tmp_path / "copies/faces")) == tag
    save(noise(50), root / "train/a/1.png")
    assert tag_of(load(root)) != tag


def test_the_script_prints_the_tag(root, load, command):
    expected = tag_of(load(root))
    assert command("scripts/data_tag.py", root) == (0, f"{expected}\n", "")


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
