"""statistics.concentration: shares and counts that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nvfp4lab.statistics import effective_count, top_share


@pytest.mark.parametrize(
    ("values", "of", "share"),
    [
        ([1, 1, 1, 1], 0.5, 0.5),
        ([0, 3, 1], 0.01, 0.75),  # at least one
        ([[1, 2], [3, 4]], 0.5, 0.7),  # any shape
        ([5, 7], 1, 1.0),
    ],
)
def test_the_largest_terms_have_their_share(values, of, share):
    assert top_share(values, of) == share


@pytest.mark.parametrize(("values", "count"), [([3] * 7, 7), ([0, 0, 5], 1), ([3, 1], 1.6)])
def test_equal_terms_count_each_and_one_that_outweighs_all_is_one(values, count):
    assert effective_count(values) == count


@pytest.mark.parametrize("values", [[], [0.0, 0.0], np.zeros((2, 2))])
def test_nothing_has_no_concentration(values):
    assert math.isnan(top_share(values, 0.5)) and math.isnan(effective_count(values))


def test_a_share_is_from_0_to_1():
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        top_share([1], of=1.5)
