"""What the collectives of a compiled program move, by kind."""

import math
import re

import jax

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
_COLLECTIVE = re.compile(
    rf"= (?P<result>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?:-start)?\("
)
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")


def collectives(program: jax.stages.Compiled) -> list[tuple[str, str, int]]:
    """Kind, dtype and elements of every array that a collective produces.

    Of one device; a loop's body counts once.
    """
    found = []
    for match in _COLLECTIVE.finditer(program.as_text()):
        for name, bits, shape in _ARRAY.findall(match["result"]):
            size = math.prod(int(side) for side in shape.split(",") if side)
            found.append((match["kind"], name + bits, size))
    return found


def elements_by_dtype(program: jax.stages.Compiled) -> dict[str, int]:
    """Elements that collectives produce, by dtype."""
    total: dict[str, int] = {}
    for _, dtype, size in collectives(program):
        total[dtype] = total.get(dtype, 0) + size
    return total


def bytes_by_kind(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that collectives produce, by kind."""
    total: dict[str, int] = {}
    for kind, dtype, size in collectives(program):
        width = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
        total[kind] = total.get(kind, 0) + width * size
    return total
