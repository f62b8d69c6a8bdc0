"""Reads the text of a compiled program: computations, instructions, sizes of arrays.

The text is that of `compiled.as_text()`. Jax has no public reader of it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{$")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: str  # such as "f32[8,4]{1,0}", or a tuple of such
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A program for one device of several."""

    computations: dict[str, list[Instruction]]  # by name
    entry: str  # name of the one that runs
    devices: int


def read_program(text: str) -> Program:
    """Reads a program.

    Raises:
        ValueError: The text is no compiled program.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif _ASSIGNMENT.match(line):
            computations[name].append(_parse(line))
    if not entry:
        raise ValueError("no compiled program: the text has no ENTRY computation.")
    partitions = re.search(r"\bnum_partitions=(\d+)", text.split("\n", 1)[0])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _arrays(type_: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Element type and shape of every array of a type."""
    for element, shape in _ARRAY.findall(type_):
        yield element, tuple(int(size) for size in shape.split(",") if size)


def shape_of(type_: str) -> tuple[int, ...]:
    """Returns the shape of an array's type."""
    return next(_arrays(type_))[1]


def bytes_of(type_: str) -> float:
    """Returns the size of a type's array, or of the arrays of a tuple."""
    total = 0.0
    for element, shape in _arrays(type_):
        digits = re.search(r"\d+", element)
        bits = _BITS.get(element) or (int(digits[0]) if digits else 0)
        total += bits / 8 * math.prod(shape)
    return total


def _parse(line: str) -> Instruction:
    assignment = _ASSIGNMENT.match(line)
    type_end = _end_of_type(line, assignment.end())
    opcode = _OPCODE.match(line, type_end)
    operands_end = _closing(line, opcode.end() - 1)
    operands = re.sub(r"/\*.*?\*/", "", line[opcode.end() : operands_end])
    return Instruction(
        name=assignment[2],
        opcode=opcode[1],
        type=line[assignment.end() : type_end],
        # Some versions write each operand's type in front of its name.
        operands=tuple(
            operand.split()[-1].lstrip("%")
            for operand in re.split(r", (?![^\[{(]*[\]})])", operands)
            if operand.strip()
        ),
        attributes=line[operands_end + 1 :],
        is_root=bool(assignment[1]),
    )


def _end_of_type(line: str, start: int) -> int:
    return _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)


def _closing(line: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in the program: {line[:200]}")
