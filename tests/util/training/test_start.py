"""Which row of a classifier is whose."""

import pytest

from util.runtime.errors import UsageError
from util.training.start import class_ids


def test_places_are_taken_only_where_nothing_else_tells_and_that_is_said(tmp_path, capsys):
    assert class_ids(("ann", "bob"), 2, None) == [0, 1]
    assert "in the order of the folders' names" in capsys.readouterr().err
    (tmp_path / "map.txt").write_text("bob\nann\n")
    assert class_ids(("ann", "bob"), 2, tmp_path / "map.txt") == [1, 0]
    assert class_ids(("1", "0"), 2, None) == [1, 0]
    assert class_ids(("n01443537", "n01440764"), 1000, None) == [1, 0]  # ImageNet's second and first class
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="give --class-map"):
        class_ids(("ann", "bob"), 3, None)
