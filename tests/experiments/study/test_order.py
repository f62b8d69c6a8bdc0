"""Agreement of two orders, against a count by hand."""

import math

import pytest

from experiments.study.order import kendall_tau, swapped


@pytest.mark.parametrize(
    ("second", "tau"),
    [
        ([1, 2, 3, 4], 1),
        ([4, 3, 2, 1], -1),
        ([2, 1, 3, 4], 4 / 6),  # one pair of six
        ([4, 1, 2, 3], 0),  # three pairs
        ([1, 1, 3, 4], 5 / 6),  # a tie is neither
        ([1, 2, math.inf, math.inf], 5 / 6),
    ],
)
def test_kendalls_tau(second, tau):
    assert kendall_tau([10, 20, 30, 40], second) == pytest.approx(tau)


def test_pairs_in_opposite_orders_have_names():
    assert swapped("abcd", [1, 2, 3, 4], [2, 1, 3, 3]) == [("a", "b")]
    assert swapped("abc", [3, 2, 1], [1, 2, 3]) == [("a", "b"), ("a", "c"), ("b", "c")]
