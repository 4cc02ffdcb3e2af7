"""Parts of error messages."""

import pytest

from region_pretrain.errors import did_you_mean, first_few

NAMES = ["max_iter", "max_size", "period"]


@pytest.mark.parametrize(
    ("name", "count", "cutoff", "expected"),
    [
        ("max_itr", 1, 0.6, "; did you mean max_iter?"),
        ("max_itr", 3, 0.5, "; did you mean max_iter, max_size?"),
        ("max_itr", 3, 0.95, "; known names: 3"),
        ("width", 3, 0.6, "; known names: 3"),
    ],
)
def test_similar_names_are_offered(name, count, cutoff, expected):
    assert did_you_mean(name, iter(NAMES), count, cutoff, "; known names: 3") == expected
    assert did_you_mean("width", NAMES) == ""


def test_the_first_few_of_many():
    assert first_few(NAMES, 3) == "max_iter, max_size, period"
    assert first_few(NAMES, 2) == "max_iter, max_size and 1 more"
    assert first_few(NAMES, 1, "; ") == "max_iter and 2 more"
    assert first_few([], 1) == ""
