"""What is said of another library's error."""

import pytest

from util.runtime.errors import one_line


@pytest.mark.parametrize(
    ("error", "line", "said"),
    [
        (ValueError("first\nlast\n"), 0, "first"),
        (ValueError("first\nlast\n"), -1, "last"),
        (ValueError(""), 0, "ValueError"),
        (KeyError(), -1, "KeyError"),
        (OSError(" \n"), 0, "OSError"),
    ],
)
def test_a_line_is_said_also_of_an_error_without_words(error, line, said):
    assert one_line(error, line) == said
