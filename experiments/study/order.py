"""Whether two orders of the same arms agree."""

from collections.abc import Iterator, Sequence


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    r"""Agreement of two orders of the same things, from -1 (reversed) to 1 (the same).

    .. math:: \tau = (c - d) / (n (n - 1) / 2)

    with :math:`c` pairs in the same order in both and :math:`d` in opposite orders
    (Kendall 1938, tau a); a tie is neither.

    Args:
        first: A value for each of two or more things.
        second: Another, likewise.
    """
    signs = [sign for _, _, sign in _pairs(first, second)]
    return sum(signs) / len(signs)


def swapped(
    names: Sequence[str], first: Sequence[float], second: Sequence[float]
) -> list[tuple[str, str]]:
    """Returns the pairs of names that are in opposite orders."""
    return [(names[i], names[j]) for i, j, sign in _pairs(first, second) if sign < 0]


def _pairs(
    first: Sequence[float], second: Sequence[float]
) -> Iterator[tuple[int, int, int]]:
    """Each pair, and 1, 0 or -1: the same order, a tie, opposite orders."""
    for j in range(len(first)):
        for i in range(j):
            yield i, j, _order(first[i], first[j]) * _order(second[i], second[j])


def _order(a: float, b: float) -> int:
    # Not the sign of a difference: that of two infinities is none.
    return (a > b) - (a < b)
