"""What of an error's message stands in one line for a user."""

from __future__ import annotations

import pytest

from openclip_otco.errors import first_line, last_line


@pytest.mark.parametrize(
    ("message", "first", "last"),
    [("one", "one", "one"), ("\n  one\ntwo \n\nthree\n \n", "one", "three"), ("", "OSError", "OSError")],
)
def test_one_line_of_a_message(message: str, first: str, last: str) -> None:
    assert (first_line(OSError(message)), last_line(OSError(message))) == (first, last)
