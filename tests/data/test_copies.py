"""The same photo under two names."""

from dataclasses import replace

import pytest
import torch

from data.copies import check_copies, find_copies
from data.image_set import ImageSet
from data.tasks import forgetting_tasks
from util.runtime.errors import UsageError


def images(*labelled: tuple[int, str, str]) -> ImageSet:
    """Of (label, file, content)."""
    labels, files, digests = zip(*labelled, strict=True)
    pixels = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    return ImageSet("data", pixels, torch.tensor(labels), ("ann", "bob", "eve", "mallory"), files, digests)


TRAIN = images((0, "a1", "x"), (0, "a2", "y"), (1, "b1", "x"), (1, "b2", "z"), (2, "e1", "y"), (2, "e2", "w"), (3, "m", "v"))
TEST = images((1, "b3", "y"), (3, "n", "u"))


def test_every_pair_of_files_is_found():
    assert find_copies([TRAIN, TEST], {0}, {1, 2, 3}) == {(0, 1): [("a1", "b1"), ("a2", "b3")], (0, 2): [("a2", "e1")]}
    assert find_copies([TRAIN, TEST], {0, 1}, {2, 3}) == {(0, 2): [("a2", "e1")], (1, 2): [("b3", "e1")]}
    assert find_copies([TRAIN, TEST], {3}, {0, 1, 2}) == {}


def test_whoever_is_forgotten_later_is_not_kept(capsys):
    tasks = forgetting_tasks(TRAIN.labels, 4, [[0], [1, 2]], seed=0)
    check_copies([TRAIN, TEST], tasks, refuse=True)
    with pytest.raises(UsageError, match=r"2 of the photos of ann are kept as bob's \(a1 is b1\); 1 of the photos of ann"):
        check_copies([TRAIN, TEST], tasks[:1], refuse=True)
    assert "ann are kept as bob's (a1 is b1)" in capsys.readouterr().err  # until they are forgotten as well
    with pytest.raises(UsageError):
        check_copies([TRAIN, TEST], tasks[:1], refuse=True)
    assert capsys.readouterr().err == ""
    check_copies([TRAIN, TEST], tasks[:1], refuse=False)
    assert "warning: data: 2 of the photos of ann" in capsys.readouterr().err
    check_copies([replace(TRAIN, digests=()), TEST], tasks[:1], refuse=True)  # of images that are no files
